"""Rows of text into steps."""
