"""What every command has: the program it belongs to, its options, and how its errors are told."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .show import FINE, INTERRUPTED, TROUBLE, as_json, complain

EXIT_CODES = """Exit codes: 0 done, or yes; 1 no (different, does not fit, something is wrong); 2 trouble
(wrong usage, a file or server that cannot be read); 130 interrupted."""

app = typer.Typer(
    name="reload-plugin",
    help=f"Look at checkpoints, convert them, and push them into a running vLLM server.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def command(function: Callable[..., int]) -> Callable[..., None]:
    """A command whose errors are told in one line, and whose result is the exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(_code_of(function, args, kwargs))

    app.command()(run)
    return run


def _code_of(function: Callable[..., int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    try:
        code = function(*args, **kwargs)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("reload-plugin: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of whoever read our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except Exception as error:  # noqa: BLE001 - the outermost place: told to the person who typed the command
        complain(error, bool(kwargs.get("debug")))
        return TROUBLE
    return code


def say(in_json: bool, value: dict[str, Any], text: str) -> None:
    """Print ``value`` as JSON, or ``text``."""
    if in_json:
        as_json(value)
    else:
        print(text)
