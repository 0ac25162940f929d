"""Lists of experiments."""
