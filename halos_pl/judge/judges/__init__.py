"""The shipped judges: a YAML file or a module each. They are found by their place in this folder."""
