"""``push`` and ``status``: a running vLLM server, over HTTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..checkpoint import open_source
from ..errors import ReloadError
from ..report import ReloadReport
from ..transaction.status import ReloadStatus
from .show import FINE, NO, CommandError, as_json, human, progress, table, waiting

QUICK = 30.0
"""Seconds for a question that a server answers at once."""

RESUME_TRIES = 5
RESUME_AGAIN = 1.0
"""Seconds until a server that did not resume is asked again."""

Pause = str
"""``wait``, ``keep`` or ``abort``: what becomes of running requests; ``none``: no pause."""


class Server:
    """A running vLLM server.

    Args:
        url: where it answers, without a path.
        api_key: what it was started with, if it was.
        timeout: seconds to wait for a reload.

    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise CommandError(f"{url} is no address of a server.", "Give one like http://localhost:8000.")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        # A kept connection may be closed by the server at the moment it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, headers=headers, limits=limits)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def status(self) -> list[ReloadStatus]:
        """The state of every rank."""
        try:
            answer = self.rpc("reload_status", QUICK)
            return [ReloadStatus.model_validate(state) for state in answer]
        except ServerError as error:
            raise CommandError(
                f"{self.url} could not say what it serves: {error}.",
                "Install this package beside its vLLM and start it again; its log says if it was loaded.",
            ) from error
        except (ValueError, TypeError) as error:
            raise CommandError(
                f"{self.url} answered with something that is no state of a reload.",
                "Install the same version of this package there and here.",
            ) from error

    def rpc(self, method: str, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every worker."""
        answer = self.post("collective_rpc", {"method": method, "kwargs": kwargs}, timeout)
        results = answer.get("results")
        return results if isinstance(results, list) else []

    def post(self, route: str, body: Any = None, timeout: float | None = None) -> dict[str, Any]:
        """POST to a route; what it answers.

        Raises:
            CommandError: no server, no such route, not allowed, or no answer in time.
            ServerError: the server says that it failed.

        """
        seconds = self._timeout if timeout is None else timeout
        try:
            answer = self._client.post(route, json=body, timeout=httpx.Timeout(seconds, connect=QUICK))
        except httpx.TimeoutException as error:
            raise CommandError(
                f"{self.url} did not answer /{route} within {seconds:g} s; it may still be at work.",
                f"Ask reload-plugin status {self.url}, or wait longer with --timeout.",
            ) from error
        except httpx.HTTPError as error:
            raise CommandError(
                f"No server answers at {self.url}/{route}: {error}.", "Start it, or give its address."
            ) from error
        return self._checked(route, answer)

    def _checked(self, route: str, answer: httpx.Response) -> dict[str, Any]:
        code = answer.status_code
        if code in (401, 403):
            raise CommandError(
                f"{self.url} does not allow /{route} (HTTP {code}).",
                "Give its key with --api-key or VLLM_API_KEY.",
            )
        if code in (404, 405):
            raise CommandError(
                f"{self.url} has no route /{route}.",
                "Start the server with VLLM_SERVER_DEV_MODE=1; never let strangers reach such a server.",
            )
        try:
            body = answer.json() if answer.content else {}
        except ValueError:
            body = {}
        if code >= 400:
            raise ServerError(_reason(body) or f"HTTP {code}")
        return body if isinstance(body, dict) else {}


class ServerError(ReloadError):
    """The server answered that something failed there."""


def _reason(body: Any) -> str:
    """The text of an error in one of the forms that vLLM's routes give it."""
    found = body.get("error", body.get("detail")) if isinstance(body, dict) else None
    found = found.get("message") if isinstance(found, dict) else found
    return "" if found is None else str(found)


# -- status ---------------------------------------------------------------------------------------


def show_status(server: Server, in_json: bool) -> int:
    """``status``: exit code 1 where a rank does not serve."""
    states = server.status()
    _print_states(states, in_json)
    return NO if any(state.state not in ("serving", "updating") for state in states) else FINE


def _print_states(states: list[ReloadStatus], in_json: bool) -> None:
    if in_json:
        as_json([state.model_dump(mode="json") for state in states])
        return
    rows = [
        (
            s.rank if len({state.replica for state in states}) == 1 else f"{s.replica}/{s.rank}",
            s.state if s.known else f"{s.state}, unknown weights",
            s.version,
            s.weight_version or "-",
            s.weights or "-",
            time.strftime("%F %T", time.localtime(s.since)),
            s.source,
            s.digest or "-",
        )
        for s in states
    ]
    table(("rank", "state", "version", "name", "weights on", "since", "source", "digest"), rows)
    for state in states:
        if state.report is not None:
            print(f"{label(state)}: last reload: {_described(state.report)}")
        if state.update:
            print(f"{label(state)}: update open: {state.update}")
        if state.last_error:
            print(f"{label(state)}: last error: {' '.join(state.last_error.split())}")


def label(state: ReloadStatus) -> str:
    """The rank that a state is of, with its replica where there may be several."""
    return f"replica {state.replica} rank {state.rank}" if state.replica else f"rank {state.rank}"


def _described(report: ReloadReport) -> str:
    """What the last reload loaded, and how much of it without the model's loader."""
    loaded = f"{report.tensors:,} tensors, {human(report.nbytes)}"
    return f"{loaded}; {report.replayed:,} replayed, {report.computed:,} computed by the model's loader"


# -- push -----------------------------------------------------------------------------------------


def push(
    server: Server,
    checkpoint: str,
    options: dict[str, Any],
    pause: Pause,
    empty_prefix_cache: bool,
    chunk_bytes: int | None,
    in_json: bool,
) -> int:
    """Reload a server from a checkpoint that lies where the server can read it.

    Args:
        server: the server.
        checkpoint: path; where it exists here it is made absolute and its headers are read first.
        options: of ``reload_weights``.
        pause: what becomes of running requests while weights change.
        empty_prefix_cache: drop what was computed with the old weights, once the new ones are served.
        chunk_bytes: send it in pieces of about so many bytes while the old weights are served; needs a server
            with the weight-transfer engine ``files``.
        in_json: print the states of the ranks as JSON.

    """
    path = path_on_server(checkpoint)
    before = server.status()
    started = time.perf_counter()
    if chunk_bytes is None:
        with paused(server, pause), waiting(f"reloading from {path}"), _explained(server):
            server.rpc("reload_weights", weights_path=path, **options)
    else:
        _push_chunks(server, path, options, pause, chunk_bytes)
    seconds = time.perf_counter() - started
    if empty_prefix_cache:
        reset_prefix_cache(server)
    states = server.status()
    if any(now.version == then.version for now, then in zip(states, before, strict=False)):
        raise CommandError(
            f"{server.url} answered, but still serves version {states[0].version}.",
            "Look into its log: its reload is not this plugin's.",
        )
    if not in_json:
        nbytes = sum(state.report.nbytes for state in states if state.report is not None)
        print(f"{server.url} serves {path} ({human(nbytes)}) after {seconds:.1f} s")
    _print_states(states, in_json)
    return FINE


def reset_prefix_cache(server: Server) -> None:
    """Drop what a server computed with the old weights."""
    if not server.post("reset_prefix_cache", timeout=QUICK).get("success", True):
        raise CommandError(
            "The new weights are served, but the prefix cache could not be reset: requests are running.",
            "Push with --pause wait, which lets them end and clears it.",
        )
    server.rpc("note_reset_caches", QUICK, outcomes={"prefix": "reset"})


def path_on_server(checkpoint: str) -> str:
    """A checkpoint that is here is looked at here: what cannot be read need not trouble the server."""
    place = Path(checkpoint)
    if place.exists():
        open_source(place)
        return str(place.absolute())
    if not place.is_absolute():
        raise CommandError(
            f"There is no {checkpoint} here.",
            "Give a path that exists here, or an absolute one on the server.",
        )
    return checkpoint


@contextlib.contextmanager
def paused(server: Server, pause: Pause) -> Iterator[None]:
    """Around a reload: running requests are treated as ``pause`` says."""
    if pause == "none":
        yield
        return
    with waiting("pausing"):
        server.post(f"pause?mode={pause}")
    try:
        yield
    finally:
        resume(server)


def resume(server: Server) -> None:
    """End the pause. Newer servers answer requests with 503 until then, so it is tried more than once.

    Raises:
        CommandError: the server is still paused.

    """
    for left in range(RESUME_TRIES - 1, -1, -1):
        try:
            server.post("resume", timeout=QUICK)
            return
        except ReloadError as error:
            if not left:
                raise CommandError(
                    f"{server.url} is still paused and may refuse requests: {error}",
                    f"Resume it: curl -X POST {server.url}/resume",
                ) from error
            time.sleep(RESUME_AGAIN)


@contextlib.contextmanager
def _explained(server: Server) -> Iterator[None]:
    """What failed on the server, in the words of its workers, which the route may not pass on."""
    try:
        yield
    except ServerError as error:
        reasons = {state.last_error for state in server.status() if state.last_error}
        text = "; ".join(sorted(reasons)) or str(error)
        raise CommandError(
            f"{server.url} did not take the weights: {text}",
            f"See what it serves with reload-plugin status {server.url}.",
        ) from error


def _push_chunks(server: Server, path: str, options: dict[str, Any], pause: Pause, chunk_bytes: int) -> None:
    """Piece by piece; only the last step needs the pause."""
    version = options.pop("weight_version", None)
    if options:
        raise CommandError(
            f"A push in chunks takes no {', '.join(sorted(options))}.",
            "Leave out --chunk-mib, or these options.",
        )
    source = open_source(path)
    infos = source.infos() or ()
    total, done = sum(info.meta().nbytes for info in infos), 0
    with _explained(server):
        server.post("start_weight_update", {})  # older versions want a body
        try:
            with progress("sending") as tick:
                for names, nbytes in _chunks({info.name: info.meta().nbytes for info in infos}, chunk_bytes):
                    server.post("update_weights", {"update_info": {"path": path, "names": names}})
                    done += nbytes
                    tick(done, total)
            with paused(server, pause), waiting("committing"):
                server.post("finish_weight_update", {"weight_version": version} if version else {})
        except BaseException:
            with contextlib.suppress(ReloadError):
                server.rpc("abort_weight_update", QUICK)
            raise


def _chunks(sizes: dict[str, int], chunk_bytes: int) -> Iterator[tuple[list[str], int]]:
    names: list[str] = []
    held = 0
    for name, nbytes in sizes.items():
        names.append(name)
        held += nbytes
        if held >= chunk_bytes:
            yield names, held
            names, held = [], 0
    if names:
        yield names, held
