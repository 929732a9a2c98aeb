"""The command line. What a command does lies in the modules beside this one."""

from __future__ import annotations

import os

from . import local_commands, server_commands  # noqa: F401 - each command joins the program
from .program import app
from .show import FINE, TROUBLE

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        app(arguments, prog_name="reload-plugin")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FINE if end.code is None else TROUBLE
    return FINE
