"""The command line, `mobizo`: one module a group of commands, each a function that is decorated with `@app.command`."""

# Each module adds its commands.
from mobizo_compiler.cli import (  # noqa: F401
    bundles,
    compiling,
    extensions,
    gguf,
    machine,
    passes,
    predict,
    programs,
    talk,
    text,
)
from mobizo_compiler.cli.app import app

__all__ = ["app"]
