"""Passes that more than one backend uses."""
