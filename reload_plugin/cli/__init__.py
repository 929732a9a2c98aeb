"""The command line ``reload-plugin``."""

from .app import main

__all__ = ["main"]
