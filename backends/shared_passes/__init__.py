"""Passes that more than one backend puts into its own list."""
