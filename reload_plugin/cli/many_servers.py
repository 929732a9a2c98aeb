"""``push`` to several servers: all of them commit, or none does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import ReloadError
from ..ranks.joint import JointReload
from ..ranks.votes import NOT_EVERY_RANK, VOTE_TIMEOUT
from ..transaction.status import ReloadStatus
from .server import QUICK, Server, label, path_on_server, paused, reset_prefix_cache
from .show import FINE, CommandError, as_json, human, progress

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class PushOptions:
    """How to push to several servers."""

    reload: dict[str, Any]
    """Options of ``reload_weights``."""
    pause: str
    reset_prefix_cache: bool
    timeout: float
    """Seconds to wait for the reload."""
    address: str | None
    """This machine, as the servers see it; None: found out."""


def push_together(servers: Sequence[Server], checkpoint: str, how: PushOptions, in_json: bool) -> int:
    """Reload several servers from a checkpoint that lies where each of them can read it.

    They load and process it at the same time, and their ranks vote in a store that this process holds; each
    commits when all are ready. While a server loads, and waits for the others, it answers no requests.

    Args:
        servers: each once.
        checkpoint: path; where it exists here it is made absolute and its headers are read first.
        how: see there.
        in_json: print the states of the ranks of each server as JSON.

    Raises:
        CommandError: a server failed and all serve the old weights; or one cannot be asked, and it says so.

    """
    urls = [server.url for server in servers]
    if len(set(urls)) < len(urls):
        raise CommandError("A server is named twice.", "Name each once.")
    path = path_on_server(checkpoint)
    before = dict(zip(urls, _each(servers, lambda server: server.status()), strict=True))
    joint = JointReload({url: len(states) for url, states in before.items()}, min(how.timeout, VOTE_TIMEOUT))
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(paused(server, how.pause))
        replicas = {url: min(state.replica for state in states) for url, states in before.items()}
        failed = _reload_all(servers, replicas, joint, path, how)
    seconds = time.perf_counter() - started
    if failed:
        raise _failure(servers, before, failed)
    if how.reset_prefix_cache:
        _each(servers, reset_prefix_cache)
    now = dict(zip(urls, _each(servers, lambda server: server.status()), strict=True))
    if old := [url for url in urls if not _all_newer(now[url], before[url])]:
        raise CommandError(
            f"{', '.join(old)} answered, but did not change what is served.",
            "Look into the log: its reload is not this plugin's.",
        )
    _print(now, path, seconds, in_json)
    return FINE


def _reload_all(
    servers: Sequence[Server], replicas: dict[str, int], joint: JointReload, path: str, how: PushOptions
) -> dict[str, ReloadError]:
    """Reload all at once; ``replicas``: URL -> the number of its first. Returns what failed, by URL.

    On Ctrl-C all servers refuse, unless they have decided; their answers are waited for.
    """
    failed: dict[str, ReloadError] = {}
    lock, done = threading.Lock(), 0

    def one(server: Server) -> None:
        nonlocal done
        host = how.address or _address_for(server)
        try:
            together = joint.option(server.url, host, replicas[server.url])
            server.rpc("reload_weights", weights_path=path, together=together, **how.reload)
        except ReloadError as error:
            joint.refuse(server.url, error)
            failed[server.url] = error
        with lock:
            done += 1
            tick(done, len(servers))

    with progress("servers", unit_bytes=False) as tick, ThreadPoolExecutor(len(servers)) as pool:
        futures = [pool.submit(one, server) for server in servers]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            for server in servers:
                joint.refuse(server.url, error)
            raise
    return failed


def _failure(
    servers: Sequence[Server], before: dict[str, list[ReloadStatus]], failed: dict[str, ReloadError]
) -> CommandError:
    """What to say of servers that failed. Each is asked what it serves: an answer may have been lost."""
    lines, newer = [], []
    for server in servers:
        try:
            states = server.status()
        except ReloadError as error:
            lines.append(f"{server.url} cannot be asked what it serves: {error}")
            continue
        if _all_newer(states, before[server.url]):
            newer.append(server.url)
        elif server.url in failed:
            said = {state.last_error for state in states if state.last_error}
            own = sorted(text for text in said if NOT_EVERY_RANK not in text) or sorted(said)
            if own and not (len(failed) > 1 and all(NOT_EVERY_RANK in text for text in own)):
                lines.append(f"{server.url}: {'; '.join(own)}")
    if not lines:
        lines = [f"{url}: {error}" for url, error in failed.items()]
    if newer:
        return CommandError(
            f"{', '.join(newer)} serve the new weights, and the others may not. {' '.join(lines)}",
            "Ask each with reload-plugin status, and push again.",
        )
    return CommandError(
        f"No server took the weights: {' | '.join(lines)}", "All serve what they served before; push again."
    )


def _all_newer(now: Sequence[ReloadStatus], then: Sequence[ReloadStatus]) -> bool:
    return all(new.version > old.version for new, old in zip(now, then, strict=True))


def _address_for(server: Server) -> str:
    """The address of this machine on the way to a server."""
    parts = urlsplit(server.url)
    host = parts.hostname or LOOPBACK
    if host in ("localhost", LOOPBACK, "::1"):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.settimeout(QUICK)
        probe.connect((host, parts.port or 80))
        return str(probe.getsockname()[0])


def _each(servers: Sequence[Server], ask: Callable[[Server], Any]) -> list[Any]:
    """Ask all servers at the same time; what each answered, in their order."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(ask, servers))


def _print(states: dict[str, list[ReloadStatus]], path: str, seconds: float, in_json: bool) -> None:
    if in_json:
        as_json({url: [state.model_dump(mode="json") for state in each] for url, each in states.items()})
        return
    for url, ranks in states.items():
        nbytes = sum(state.report.nbytes for state in ranks if state.report is not None)
        print(f"{url} serves {path} ({human(nbytes)}) after {seconds:.1f} s")
        for state in ranks:
            named = f", {state.weight_version}" if state.weight_version else ""
            print(f"  {label(state)}: version {state.version}{named}, digest {state.digest}")
