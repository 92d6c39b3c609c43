"""What a program file and a machine say about themselves."""
