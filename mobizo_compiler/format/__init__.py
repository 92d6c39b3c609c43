"""What lies in a file, and how files are written."""
