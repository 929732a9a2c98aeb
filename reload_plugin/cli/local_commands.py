"""Commands that need no server: they look at files, or at this environment."""

from __future__ import annotations

import json as _json
from pathlib import Path
from typing import Annotated, Any

import typer

from .program import Debug, Json, command, say
from .show import FINE, NO, CommandError, as_json, human, progress, table, waiting

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file or folder of weights.")]


@command
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


@command
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


@command
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
        say(json, {"target": str(dst), "converted": False}, f"{dst} is up to date.")
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
    say(json, report.model_dump(mode="json") | {"converted": True}, text)
    return FINE


@command
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
    say(json, report.model_dump(mode="json"), text)
    return FINE


@command
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


@command
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
        found = _json.loads(text)
    except ValueError as error:
        raise CommandError(
            f"--engine is not JSON: {error}.", """Give an object like '{"quantization": "fp8"}'."""
        ) from error
    if not isinstance(found, dict):
        raise CommandError("--engine is not a JSON object.", """Give one like '{"quantization": "fp8"}'.""")
    return found
