"""Commands that talk to a running server."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from typing import Annotated

import typer

from .program import Debug, Json, command
from .show import CommandError

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


@command
def push(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file or folder that the server can read.")
    ],
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="Addresses of servers; all of them or none."),
    ] = None,
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
    address: Annotated[
        str | None, typer.Option(help="This machine, as several servers see it. Default: found out.")
    ] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Reload a running server from a checkpoint, and say what it serves then; or several servers at once.

    Several servers load at the same time and commit when all of them are ready; if one fails, all serve the
    old weights. They have to reach this machine, where they vote.

    A server needs VLLM_SERVER_DEV_MODE=1. If anything fails it serves the old weights. --pause wait
    lets running requests end and clears the prefix cache; new ones wait meanwhile, or newer servers
    answer them with HTTP 503 (--pause keep queues them). --chunk-mib needs a server started with
    --weight-transfer-config '{"backend": "files"}', and pauses only for the last step.

    \b
    Examples:
      reload-plugin push /checkpoints/step-12 --version 12
      reload-plugin push /checkpoints/step-12 --url http://gpu-7:8000 --pause keep --reset-prefix-cache
      reload-plugin push /checkpoints/step-12 --chunk-mib 512
      reload-plugin push /checkpoints/step-12 http://gpu-7:8000 http://gpu-8:8000
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
    addresses = urls or [url]
    if len(addresses) == 1:
        with remote.Server(addresses[0], api_key, timeout) as server:
            return remote.push(
                server, checkpoint, options, pause.value, reset_prefix_cache, chunk_bytes, json
            )
    if chunk_bytes is not None:
        raise CommandError("A push in chunks goes to one server.", "Leave out --chunk-mib.")
    from .many_servers import PushOptions, push_together

    how = PushOptions(options, pause.value, reset_prefix_cache, timeout, address)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(remote.Server(one, api_key, timeout)) for one in addresses]
        return push_together(servers, checkpoint, how, json)


@command
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


@command
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


@command
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


@command
def park(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    pause: Annotated[
        Pause, typer.Option(help="What becomes of running requests: wait, keep or abort.")
    ] = Pause.WAIT,
    api_key: ApiKey = None,
    timeout: Timeout = 3600.0,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Put the weights of a running server into host memory and give its device memory back.

    The server needs VLLM_SERVER_DEV_MODE=1, and --enable-sleep-mode where it captures CUDA graphs. It is
    paused until it is unparked: new requests wait, or newer servers answer them with HTTP 503. A push while
    it is parked counts after unpark.

    \b
    Examples:
      reload-plugin park http://localhost:8000
      reload-plugin park http://gpu-7:8000 --pause abort --json | jq '.[].nbytes'
    """
    from . import parking
    from . import server as remote

    with remote.Server(url, api_key, timeout) as server:
        return parking.park(server, pause.value, json)


@command
def unpark(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    api_key: ApiKey = None,
    timeout: Timeout = 3600.0,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    r"""Bring the weights of a parked server back to its device, and let it serve.

    \b
    Examples:
      reload-plugin unpark http://localhost:8000
      reload-plugin unpark http://gpu-7:8000 --json | jq '.[].state'
    """
    from . import parking
    from . import server as remote

    with remote.Server(url, api_key, timeout) as server:
        return parking.unpark(server, json)
