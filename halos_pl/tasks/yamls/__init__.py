"""Task files for the harness: ``python -m lm_eval --include_path`` takes this folder too."""
