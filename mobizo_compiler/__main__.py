"""`python -m mobizo_compiler` is the command `mobizo`."""

from mobizo_compiler.cli import app

if __name__ == "__main__":
    app(prog_name="mobizo")
