"""Commands, options and help texts. What a command does lies in the modules beside this one."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .show import (
    FINE,
    INTERRUPTED,
    NO,
    TROUBLE,
    CommandError,
    as_json,
    complain,
    human,
    progress,
    table,
    waiting,
)

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
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file or folder of weights.")]
Url = Annotated[str, typer.Argument(metavar="[URL]", help="Address of the server.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="VLLM_API_KEY", help="Key that the server was started with.")
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the reload.", min=0.1)]
LOCAL = "http://localhost:8000"


class Pause(StrEnum):
    """What becomes of running requests while weights change."""

    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"
    NONE = "none"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        app(arguments, prog_name="reload-plugin")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FINE if end.code is None else TROUBLE
    return FINE


def _command(function: Callable[..., int]) -> Callable[..., None]:
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


@_command
def inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 - read where errors are told
) -> int:
    r"""What is in a checkpoint: format, tensors, bytes, layers, dtypes. Reads headers only.

    \b
    Examples:
      reload-plugin inspect /checkpoints/step-12
      reload-plugin inspect model.safetensors --tensors --json | jq '.by_tensor | keys'
    """
    from .listing import listing, show_listing

    return show_listing(listing(checkpoint, tensors), json)


@_command
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A file or folder of weights.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    headers: Annotated[
        bool, typer.Option("--headers", help="Names, shapes and dtypes only: reads no weights.")
    ] = False,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""What is different between two checkpoints: names, shapes, dtypes, share of elements changed.

    Values are compared bit for bit, one tensor of each in memory at a time.
    Exit code 0: the same; 1: different; 2: trouble.

    \b
    Examples:
      reload-plugin diff /checkpoints/step-11 /checkpoints/step-12
      reload-plugin diff old.safetensors new.safetensors --json | jq .changed_share
    """
    from .listing import difference, show_difference

    return show_difference(difference(a, b, headers), json)


@_command
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A file or folder of weights, or a torch file.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A folder to make, or a file NAME.safetensors.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, whatever is there.")] = False,
    if_stale: Annotated[
        bool,
        typer.Option(
            "--if-stale",
            help="Do nothing where SRC has not changed, else replace what was converted; other files stay.",
        ),
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Of a torch file take only the weights.")
    ] = False,
    max_file_gb: Annotated[float, typer.Option(help="Largest file, in gigabytes.", min=0.000001)] = 5.0,
    config: Annotated[
        Path | None, typer.Option(help="Folder with config.json and tokenizer to copy along.")
    ] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Write a checkpoint as safetensors, one tensor in memory at a time; whole or not at all.

    A single torch file is kept exactly, nested state and all; --weights-only takes what an engine needs.

    \b
    Examples:
      reload-plugin convert /checkpoints/step-12 /exports/step-12 --config /models/base
      reload-plugin convert trainer.pt trainer.safetensors --if-stale
    """
    from ..tools.conversion import convert as converted
    from ..tools.conversion import is_stale

    if if_stale and dst.exists() and not is_stale(dst, src):
        _say(json, {"target": str(dst), "converted": False}, f"{dst} is up to date.")
        return FINE
    with progress(f"converting {src.name}") as tick:
        report = converted(
            src,
            dst,
            overwrite=overwrite,
            replace_converted=if_stale,
            weights_only=weights_only,
            max_file_bytes=int(max_file_gb * 1e9),
            config=config,
            progress=tick,
        )
    copied = f", and {len(report.copied)} files beside them" if report.copied else ""
    text = (
        f"{dst}: {report.tensors:,} tensors, {human(report.nbytes)} in {len(report.files)} files{copied}, "
        f"from {report.format}, {report.seconds:.1f} s"
    )
    _say(json, report.model_dump(mode="json") | {"converted": True}, text)
    return FINE


@_command
def save(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A folder that transformers can open.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A folder; made if it does not exist.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest file, like 5GB or 500MiB.")] = "5GB",
    own_format: Annotated[
        bool,
        typer.Option("--own-format", help="Names and shapes of transformers' modules, not the checkpoint's."),
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Folder for weights that transformers converts; beside DST by default."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that SRC brings along.")
    ] = False,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Open a model with all its weights on disk and save it anew, one group of weights in memory at a time.

    Fused and stacked weights become those of the checkpoint format, or transformers' own with --own-format.
    An older save in DST is replaced whole, or not touched; DST may be SRC.

    \b
    Examples:
      reload-plugin save /models/mixtral /exports/mixtral --max-shard-size 2GB
      reload-plugin save /models/mixtral /models/mixtral --max-shard-size 500MB --json | jq .files
    """
    from .saving import save as saved

    report = saved(src, dst, max_shard_size, own_format, scratch, trust_remote_code)
    count = len(set(report.files.values()))
    converted = sum(tier == "converted" for tier in report.tiers.values())
    text = (
        f"{dst}: {report.tensors:,} tensors, {human(report.nbytes)} in {count} files, of which {converted:,} "
        f"tensors were converted, {report.seconds:.1f} s"
    )
    _say(json, report.model_dump(mode="json"), text)
    return FINE


@_command
def plan(
    checkpoint: Checkpoint,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder with config.json, or a cached repository.")
    ],
    engine: Annotated[
        str, typer.Option(metavar="JSON", help="Arguments of the engine that change the model.")
    ] = "{}",
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Would this checkpoint fit that model? Tried on a model without memory; no engine, no weights read.

    Exit code 0: it fits; 1: it does not; 2: trouble.

    \b
    Examples:
      reload-plugin plan /checkpoints/step-12 /models/base
      reload-plugin plan step-12.safetensors /models/base --engine '{"quantization": "fp8"}'
    """
    from ..tools.preflight import preflight

    arguments = _arguments(engine)
    with waiting(f"planning {Path(checkpoint).name} for {Path(model).name}"):
        found = preflight(checkpoint, model, arguments)
    if json:
        as_json(found.model_dump(mode="json"))
        return FINE if found.fits else NO
    verdict = "fits" if found.fits else "does not fit"
    content = f"{found.tensors:,} tensors, {human(found.nbytes)}"
    print(f"{checkpoint} ({content}) {verdict} {found.architecture} of {model}")
    if found.config:
        print(found.config)
    kinds = ("missing", "unexpected", "duplicate", "misshapen", "ignored", "kept")
    rows = [(kind, name, reason) for kind in kinds for name, reason in getattr(found, kind).items()]
    if rows:
        table(("", "name", "why"), rows)
    return FINE if found.fits else NO


@_command
def push(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file or folder that the server can read.")
    ],
    url: Annotated[str, typer.Option(help="Address of the server.")] = LOCAL,
    version: Annotated[
        str | None, typer.Option(help="A name for these weights (for chunks: in /weight_info).")
    ] = None,
    pause: Annotated[Pause, typer.Option(help="What becomes of running requests meanwhile.")] = Pause.WAIT,
    reset_prefix_cache: Annotated[
        bool, typer.Option("--reset-prefix-cache", help="Drop what was computed with the old weights.")
    ] = False,
    chunk_mib: Annotated[
        int | None, typer.Option(help="Send pieces of so many MiB while the old weights are served.", min=1)
    ] = None,
    policy: Annotated[str | None, typer.Option(help="auto, host, spill, reread or streaming.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Only the weights that are there change.")
    ] = False,
    check_finite: Annotated[bool, typer.Option("--check-finite", help="Refuse NaN and infinity.")] = False,
    digest: Annotated[bool, typer.Option("--digest/--no-digest", help="Hash what is then served.")] = True,
    api_key: ApiKey = None,
    timeout: Timeout = 3600.0,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Reload a running server from a checkpoint, and say what it serves then.

    The server needs VLLM_SERVER_DEV_MODE=1. If anything fails it serves the old weights. --pause wait
    lets running requests end and clears the prefix cache; new ones wait meanwhile, or newer servers
    answer them with HTTP 503 (--pause keep queues them). --chunk-mib needs a server started with
    --weight-transfer-config '{"backend": "files"}', and pauses only for the last step.

    \b
    Examples:
      reload-plugin push /checkpoints/step-12 --version 12
      reload-plugin push /checkpoints/step-12 --url http://gpu-7:8000 --pause keep --reset-prefix-cache
      reload-plugin push /checkpoints/step-12 --chunk-mib 512
    """
    from . import server as remote

    given = {
        "weight_version": version,
        "policy": policy,
        "partial": partial,
        "check_finite": check_finite,
    }
    options = {name: value for name, value in given.items() if value} | ({} if digest else {"digest": False})
    chunk_bytes = None if chunk_mib is None else chunk_mib << 20
    with remote.Server(url, api_key, timeout) as server:
        return remote.push(server, checkpoint, options, pause.value, reset_prefix_cache, chunk_bytes, json)


@_command
def status(url: Url = LOCAL, api_key: ApiKey = None, json: Json = False, debug: Debug = False) -> int:  # noqa: ARG001
    r"""What a running server serves, and how its last reload went. Exit code 1 where a rank refuses to serve.

    \b
    Examples:
      reload-plugin status
      reload-plugin status http://gpu-7:8000 --json | jq '.[].weight_version'
    """
    from . import server as remote

    with remote.Server(url, api_key, remote.QUICK) as server:
        return remote.show_status(server, json)


@_command
def export(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder to make, on the server's machine.")
    ],
    max_shard_size: Annotated[str, typer.Option(help="Largest file, like 5GB.")] = "5GB",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Where quantization lost values: what kernels compute with.")
    ] = False,
    api_key: ApiKey = None,
    timeout: Timeout = 3600.0,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Write what a running server serves as a checkpoint: exact, or refused. Requests wait meanwhile.

    The server needs VLLM_SERVER_DEV_MODE=1. An older save in DIR is replaced whole, or not touched.

    \b
    Examples:
      reload-plugin export http://localhost:8000 /exports/step-12
      reload-plugin export http://gpu-7:8000 /exports/step-12 --max-shard-size 2GB --json | jq .tiers
    """
    from . import server as remote
    from . import weights_out

    options = {"max_shard_size": max_shard_size, "lossy": "dequantize" if dequantize else None}
    with remote.Server(url, api_key, timeout) as server:
        return weights_out.export(server, directory, options, json)


@_command
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file or folder that the server can read.")
    ],
    api_key: ApiKey = None,
    timeout: Timeout = 3600.0,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Does a running server serve this checkpoint? Tensor by tensor, bit for bit; nothing is changed.

    Exit code 0: it does; 1: it does not, or that cannot be told of some tensor; 2: trouble.

    \b
    Examples:
      reload-plugin verify http://localhost:8000 /checkpoints/step-12
      reload-plugin verify http://gpu-7:8000 /checkpoints/step-12 --json | jq '.different | keys'
    """
    from . import server as remote
    from . import weights_out

    with remote.Server(url, api_key, timeout) as server:
        return weights_out.verify(server, checkpoint, json)


@_command
def doctor(json: Json = False, debug: Debug = False) -> int:  # noqa: ARG001
    r"""Whether reloads in this environment go through this plugin. Exit code 1 where something is wrong.

    \b
    Examples:
      reload-plugin doctor
      reload-plugin doctor --json | jq '.findings[] | select(.state == "wrong")'
    """
    from .checkup import examine, show

    return show(examine(), json)


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CommandError(
            f"--engine is not JSON: {error}.", """Give an object like '{"quantization": "fp8"}'."""
        ) from error
    if not isinstance(found, dict):
        raise CommandError("--engine is not a JSON object.", """Give one like '{"quantization": "fp8"}'.""")
    return found


def _say(in_json: bool, value: dict[str, Any], text: str) -> None:
    if in_json:
        as_json(value)
    else:
        print(text)
