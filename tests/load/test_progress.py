"""A bar for whoever watches a reload from disk: on a terminal, never in logs, and never in the way."""

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import termios
import threading
import tty
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin.checkpoint import DirectRead, HostCopy
from reload_plugin.errors import SourceError
from reload_plugin.load import progress
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Closed(Terminal):
    """A terminal that goes away after some lines."""

    def write(self, text: str) -> int:
        if self.tell() > 200:
            raise BrokenPipeError("nobody reads this any more")
        return super().write(text)


def kept(count: int = 40) -> HostCopy:
    source = HostCopy("twelve tensors of step-7")
    for index in range(count):
        source.add(f"tensor.{index}", torch.ones(1 << 10))
    return source


def looking(terminal: Terminal | None = None) -> contextlib.redirect_stderr[Terminal]:
    """Stderr is a terminal inside (pytest takes what a fixture puts there away again)."""
    return contextlib.redirect_stderr(Terminal() if terminal is None else terminal)


def test_bytes_are_counted_on_a_terminal() -> None:
    source = kept()
    with looking() as shown:
        found = [name for name, _ in progress.with_progress(source.read(), source, None)]
    assert len(found) == 40
    assert "reloading twelve tensors of step-7: 100%" in shown.getvalue()
    assert "160k/160k" in shown.getvalue()


@pytest.mark.parametrize("wanted", [None, False])
def test_without_a_bar_the_stream_is_the_one_that_was_given(
    wanted: bool | None,
) -> None:
    for stream in (io.StringIO(), None, closed_file()) if wanted is None else (Terminal(),):
        source = kept()
        weights = source.read()
        with contextlib.redirect_stderr(stream):
            assert progress.with_progress(weights, source, wanted) is weights


def closed_file() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def test_only_rank_0_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_rank", lambda: 1)
    source = kept()
    weights = source.read()
    with looking() as shown:
        assert progress.with_progress(weights, source, None) is weights
        list(progress.with_progress(weights, source, True))
    assert "(rank 1): 100%" in shown.getvalue()


def test_a_direct_read_of_many_tensors_counts_all_their_bytes() -> None:
    source = kept()
    direct_read = DirectRead(["a", "b"], {"a": (3,), "b": (4,)}, 160 << 10, {"p": ["a", "b"]})
    with looking() as shown:
        assert list(progress.with_progress((item for item in [direct_read]), source, True)) == [direct_read]
    assert "160k/160k" in shown.getvalue()


def test_the_bar_keeps_no_tensor() -> None:
    """A layer that is complete gives its memory back, and the reader takes its own again."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def fresh() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            assert all(tensor() is None for tensor in alive)
            found = [torch.ones(3)]
            alive.append(weakref.ref(found[0]))
            yield name, found.pop()

    with looking():
        weights = progress.with_progress(fresh(), kept(), True)
        for _ in "abc":
            assert next(weights)[1].sum() == 3
            assert alive[-1]() is None
        weights.close()


def test_a_closed_terminal_fails_no_reload() -> None:
    source = kept(1000)
    with looking(Closed()):
        assert len(list(progress.with_progress(source.read(), source, True))) == 1000


def test_the_bar_is_drawn_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    source = kept(1000)
    with looking():
        weights = progress.with_progress(source.read(), source, True)
        monkeypatch.setattr(weights._bar._bar, "update", drawn.append)
        list(weights)
    assert len(drawn) <= progress.STEPS
    assert sum(drawn) == source.nbytes


def test_an_error_closes_the_bar_and_the_stream() -> None:
    closed = []

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield "a", torch.ones(3)
            raise SourceError("the disk is gone")
        finally:
            closed.append(True)

    with looking() as shown:
        weights = progress.with_progress(failing(), kept(), True)
        next(weights)
        with pytest.raises(SourceError, match="the disk is gone"):
            next(weights)
    assert closed == [True]
    assert weights._bar._bar is None
    assert shown.getvalue().endswith("\n")


# --- a model that is reloaded ---


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[torch.nn.Module, dict[str, Path]]]:
    case = case_named("llama_tied")
    folders = oracle.write(case, tmp_path_factory.mktemp("checkpoints"))
    with oracle.built(case, folders["A"]) as model:
        yield model, folders


@contextlib.contextmanager
def on_a_terminal() -> Iterator[list[str]]:
    """Stderr is a pseudo-terminal while this lasts; what was written to it is in the list afterwards."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    written: list[str] = []

    def collect() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(master, 1 << 16):
                written.append(chunk.decode(errors="replace"))

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        with os.fdopen(slave, "w") as stream, contextlib.redirect_stderr(stream):
            yield written
    finally:
        reader.join()
        os.close(master)


def test_a_reload_from_disk_shows_how_far_it_is(served: tuple[torch.nn.Module, dict[str, Path]]) -> None:
    model, folders = served
    with on_a_terminal() as written:
        report = reload_plugin.reload_weights(model, weights_path=str(folders["B"]))
    text = "".join(written)
    assert re.search(rf"reloading .*{folders['B'].name}: 100%", text)
    assert f"{report.nbytes / 1024:.0f}k/" in text
    with on_a_terminal() as written:
        reload_plugin.reload_weights(model, weights_path=str(folders["A"]), progress=False)
        reload_plugin.reload_weights(model, iter(read_tensors(folders["A"]).items()))
    assert written == []


def test_logs_contain_no_bar(
    served: tuple[torch.nn.Module, dict[str, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    model, folders = served
    reload_plugin.reload_weights(model, weights_path=str(folders["B"]))
    assert capfd.readouterr().err == ""
    reload_plugin.reload_weights(model, weights_path=str(folders["A"]), progress=True)
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize("how", [{"partial": True}, {"policy": "host"}, {"keep_load_format": "host"}])
def test_the_weights_are_the_same_with_a_bar(
    served: tuple[torch.nn.Module, dict[str, Path]], how: dict[str, object]
) -> None:
    model, folders = served
    digests = []
    for bar in (False, True):
        reload_plugin.reload_weights(model, weights_path=str(folders["A"]))
        with looking() as shown:
            report = reload_plugin.reload_weights(model, weights_path=str(folders["B"]), progress=bar, **how)
        assert ("100%" in shown.getvalue()) is bar
        digests.append(report.digest)
    assert digests[0] == digests[1]


def test_ctrl_c_ends_the_bar_too(
    served: tuple[torch.nn.Module, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folders = served
    before = reload_plugin.status(model)[0].digest
    plain, threads = progress._Counted.__next__, threading.active_count()

    def interrupted(self: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(progress._Counted, "__next__", interrupted)
    before_us = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with looking() as shown, pytest.raises(KeyboardInterrupt):
            reload_plugin.reload_weights(model, weights_path=str(folders["B"]), progress=True, policy="host")
    finally:
        signal.signal(signal.SIGINT, before_us)
    assert shown.getvalue().endswith("\n"), "the bar is still open"
    assert reload_plugin.status(model)[0].digest == before
    assert threading.active_count() <= threads


def test_the_bar_of_a_partial_update_is_as_long_as_what_it_reads(
    served: tuple[torch.nn.Module, dict[str, Path]], tmp_path: Path
) -> None:
    model, folders = served
    reload_plugin.reload_weights(model, weights_path=str(folders["A"]))
    name, tensor = next(iter(read_tensors(folders["B"]).items()))
    save_file({name: tensor}, tmp_path / "update.safetensors")
    with looking() as shown:
        report = reload_plugin.reload_weights(
            model, weights_path=str(tmp_path / "update.safetensors"), partial=True, progress=True
        )
    assert report.tensors < len(read_tensors(folders["A"]))
    assert "100%" in shown.getvalue()
