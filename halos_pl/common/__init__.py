"""Used by every part: messages, files, YAML, signals."""
