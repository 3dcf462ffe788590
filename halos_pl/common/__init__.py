"""What every part uses: messages, files, YAML, signals."""
