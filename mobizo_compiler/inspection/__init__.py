"""What a program file and a machine say about themselves, as data and as pictures; nothing is compiled or trained."""
