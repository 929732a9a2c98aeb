"""The command line ``reload-plugin``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        from .app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "httpx"):
            raise
        print(f"The command line needs {error.name}: pip install typer rich httpx", file=sys.stderr)
        return 2
    return run(arguments)
