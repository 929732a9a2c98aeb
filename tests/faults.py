"""Every fault at every place: does a running engine stay what it was, bit for bit, when a reload fails?

A fault is raised in turn at every weight, every read, every layer, every allocation and every commit of a
reload. After each one the engine is compared with what it was: value, object and address of every tensor that
can be reached from the model, open files, threads; every so often what it answers. After each kind of fault a
good reload has to give the engine of a cold start.

    python -m tests.faults llama_tied   # every fault in one engine here, with this plugin
    python -m tests.faults --table      # vLLM's own reload and this plugin's, as a Markdown table
"""

import argparse
import contextlib
import dataclasses
import enum
import gc
import json
import multiprocessing
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests import oracle  # before torch: it sets the environment that engines read

import torch  # isort: skip
from safetensors.torch import save_file

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.checkpoint.io import read_batches, reading, vectored
from reload_plugin.commit import group_commit as commit
from reload_plugin.device import cpu
from reload_plugin.device import host_memory as memory
from reload_plugin.errors import EngineBrokenError, ReloadError
from reload_plugin.record import staged_group
from reload_plugin.transaction.chunked_update import restore_for_reloading
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.session import ReloadSession
from tests.checkpoints import WEIGHTS, read_tensors
from tests.oracle import Live
from tests.zoo import Case, case_named

ENGINES = ("llama_tied", "mixtral", "w8a8_dynamic")
ANSWERS_EVERY = 25
"""Faults between two times that an engine is asked for tokens and logprobs."""
VOTE_TIMEOUT = 60.0
"""Seconds after which a reload of vLLM's own counts as hanging."""

Weights = list[tuple[str, torch.Tensor]]
Errors = (OSError, ValueError, RuntimeError, KeyError, MemoryError)


class Ends(enum.Enum):
    """What the engine has to be after a fault."""

    OLD = "it raised, and the engine is what it was"
    NEW = "the engine is wholly the new one, whatever was raised"
    OLD_OR_NEW = "it raised, and the engine is what it was; or it did not, and the engine is the new one"
    ONE_OF_BOTH = "the engine is wholly the old or wholly the new one, whatever was raised"
    OLD_OR_REFUSES = "it raised, and the engine is what it was, or refuses to serve until it is healed"
    TAKEN = "no fault after all: the weights are served, and go with the next reload"


# --- one engine ---


def settled() -> int:
    """Bytes of this process in memory, once what nobody needs has gone."""
    gc.collect()
    if (heap := memory.allocator()) is not None:
        heap.release(1 << 40)
    return memory.resident()


class Lab:
    """A running engine on checkpoint A, what it looks like on A and B, and the count of its trials."""

    def __init__(
        self, llm: object, folders: dict[str, Path], cold_b: oracle.Snapshot, most: int | None = None
    ) -> None:
        self.llm = llm
        self.most = most
        self.folders = folders
        self.cold_b = cold_b
        self.model = oracle.model_of(llm)
        self.ours = oracle.reload_module().startswith("reload_plugin")
        self.weights: dict[str, Weights] = {x: list(read_tensors(folders[x]).items()) for x in "AB"}
        self.scratch = folders["B"].parent / "scratch"
        self.errors: Counter[str] = Counter()
        self.trials = 0
        self.live = {"A": oracle.live_tensors(self.model)}
        self.answers = {"A": oracle.answer(llm)}
        self.live["B"] = self.apart(self._warm_up)
        self.answers["B"] = cold_b.answers
        self.belongings = belongings()
        self.resident = settled()

    def _warm_up(self) -> dict[str, Live]:
        """Through both faces once: what is learnt from the first reload is there for all trials. Returns what
        a good reload of B gives.
        """
        for reload in (oracle.reload_from_folder, oracle.reload_from_stream):
            reload(self.llm, self.folders["B"])
            live_b = oracle.live_tensors(self.model)
            self.heal()
        return {path: dataclasses.replace(found, keep=None) for path, found in live_b.items()}

    # -- faces --

    def push(self, weights: object) -> None:
        """Reload from (name, tensor) pairs."""
        self.llm.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=weights))

    def reload(self, folder: Path) -> None:
        """Reload from a folder."""
        oracle.reload_from_folder(self.llm, folder)

    def heal(self) -> None:
        """A good reload of A."""
        self.reload(self.folders["A"])

    def copy(self, letter: str) -> Path:
        """A copy of a checkpoint, which a fault may damage."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.folders[letter], self.scratch)
        return self.scratch

    # -- what it is now --

    def differs_from(self, letter: str, answers: bool = False) -> str:
        """What is not as on that checkpoint: the first few paths, or what it answers; empty if nothing."""
        expected, now = self.live[letter], oracle.live_tensors(self.model)
        if letter == "B" and not self.ours:  # vLLM's own reload makes new objects even when all goes well
            expected, now = values_of(expected), values_of(now)
        paths = [path for path in sorted(expected.keys() | now.keys()) if expected.get(path) != now.get(path)]
        if paths:
            return f"{len(paths)} of {len(expected)} differ from {letter}: {', '.join(paths[:3])}"
        if answers and (found := oracle.differing_answers(oracle.answer(self.llm), self.answers[letter])):
            return f"other {', '.join(found)} than on {letter}"
        update_is_open = self.ours and state_of(self.model).update is not None
        if isinstance(vars(self.model).get("load_weights"), types.MethodType) and not update_is_open:
            return "model.load_weights is still taken over"
        return ""

    def assert_good_reloads(self) -> None:
        """A good reload gives the engine of a cold start, and back, by both faces."""
        for reload in (oracle.reload_from_folder, oracle.reload_from_stream):
            reload(self.llm, self.folders["B"])
            digest = oracle.served_digest(self.llm)
            now = oracle.Snapshot(oracle.answer(self.llm), oracle.live_tensors(self.model), digest)
            assert oracle.compare_values("cold(B)", now, self.cold_b) == []
            assert self.differs_from("B") == ""
            self.heal()
            assert self.differs_from("A", answers=True) == ""

    # -- trials --

    def try_kind(self, kind: "Kind") -> "Result":
        """Every place of one kind, or `most` of them."""
        result = Result(kind.name)
        most = None if self.most is None else self.most // kind.cost
        for place in spread(self.apart(lambda: list(kind.places(self))), most):
            reason = self.apart(lambda place=place: self.trial(kind, place))
            result.note(place, reason)
        return result

    def trial(self, kind: "Kind", place: object) -> str:
        """One fault; why the engine did not survive it, or an empty string. The engine is on A again."""
        self.trials += 1
        if not self.ours:
            self.belongings = belongings()  # this is a copy of the process
        error: BaseException | None = None
        try:
            kind.reload(self, place)
        except (Exception, kind.raises) as caught:  # noqa: BLE001  anything may come out of a fault
            error = caught.with_traceback(None)
        self.errors[type(error).__name__] += 1
        reason = self._judge(kind, error) or left_behind(self.belongings)
        if reason and self.ours:
            self.heal()
        return f"{reason} ({type(error).__name__}: {error})"[:500] if reason else ""

    def _judge(self, kind: "Kind", error: BaseException | None) -> str:
        asked = not self.trials % ANSWERS_EVERY
        if isinstance(error, NothingHappenedError):
            return str(error)
        if kind.ends is Ends.TAKEN:
            return self._judge_taken(error)
        if kind.ends is Ends.NEW or (kind.ends is Ends.OLD_OR_NEW and error is None):
            return self._judge_new(asked)
        if kind.ends is Ends.ONE_OF_BOTH and not self.differs_from("B"):
            return self._judge_new(asked)
        if kind.ends is Ends.OLD_OR_REFUSES and isinstance(error, EngineBrokenError):
            return self._judge_broken()
        if error is None:
            return "the reload did not raise"
        if self.ours and not isinstance(error, (ReloadError, kind.raises)):
            return "it raised something else than a ReloadError"
        return self.differs_from("A", asked)

    def _judge_broken(self) -> str:
        try:
            state_of(self.model).before_forward_pass()
        except EngineBrokenError:
            self.heal()
            state_of(self.model).before_forward_pass()
            return self.differs_from("A", answers=True)
        return "broken, and it serves"

    def _judge_new(self, asked: bool) -> str:
        """On B, and B is what a later reload that fails comes back to."""
        reason = self.differs_from("B", asked and self.ours)
        if reason or not self.ours:
            return reason
        with contextlib.suppress(ReloadError), processing(self, Trap(8, fail(ValueError("no")))):
            self.heal()
        reason = self.differs_from("B", asked)
        self.heal()
        return f"after the next reload failed: {reason}" if reason else self.differs_from("A")

    def _judge_taken(self, error: BaseException | None) -> str:
        if error is not None:
            return "it was refused"
        old = values_of(self.live["A"])
        if values_of(oracle.live_tensors(self.model)) == old:
            return "the old weights are served"
        self.heal()
        return "" if values_of(oracle.live_tensors(self.model)) == old else "some of it stayed"

    def apart(self, function: Callable[[], Any]) -> Any:
        """Call it here for this plugin, which has to leave a good engine behind. vLLM's own reload gets a
        copy of the process for each trial, so that none has to pay for the one before.
        """
        return function() if self.ours else in_a_fork(function)


def values_of(live: dict[str, Live]) -> dict[str, str]:
    """The values alone, without the places."""
    return {path: found.digest for path, found in live.items()}


@dataclass
class Result:
    """What became of one kind of fault."""

    kind: str
    tried: int = 0
    survived: int = 0
    reasons: list[str] = field(default_factory=list)

    def note(self, place: object, reason: str) -> None:
        """Count one trial."""
        self.tried += 1
        self.survived += not reason
        if reason:
            self.reasons.append(f"at {place}: {reason}")


@contextlib.contextmanager
def lab_of(case: Case, root: Path, most: int | None = None) -> Iterator[Lab]:
    """An engine on A, after a cold start on B to compare with; `most` places are tried of each kind."""
    folders = oracle.write(case, root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for one another on a busy machine
    try:
        cold_b = oracle.cold_snapshot(case, folders["B"])
        with oracle.running(case, folders["A"]) as llm:
            yield Lab(llm, folders, cold_b, most)
    finally:
        torch.set_num_threads(threads)


def spread(places: list[Any], most: int | None) -> list[Any]:
    """All of them, or `most`, evenly, the first and the last among them."""
    if most is None or len(places) <= most:
        return places
    return [places[i * (len(places) - 1) // (most - 1)] for i in range(most)]


Belongings = tuple[list[str], set[str], int, tuple[bool, tuple[int, int, int]]]


def belongings() -> Belongings:
    """Open files, threads, child processes and settings of this process."""
    links = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the handle of this listing
            links.append(str(handle.readlink()))
    threads = {f"{thread.name} {thread.ident}" for thread in threading.enumerate()}
    garbage = gc.isenabled(), gc.get_threshold()
    return sorted(links), threads, len(multiprocessing.active_children()), garbage


def left_behind(before: Belongings) -> str:
    """Files, threads and children that are there now and were not before, and settings that are others."""
    files, threads, children, garbage = belongings()
    found = list((Counter(files) - Counter(before[0])).elements()) + sorted(threads - before[1])
    found += ["a child process"] if children > before[2] else []
    found += [f"the garbage collector's settings {garbage}"] if garbage != before[3] else []
    return f"left behind: {', '.join(found)}" if found else ""


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What `function` returns in a copy of this process, or how the copy ended: it died or hung."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        status = 1
        with contextlib.suppress(BaseException), os.fdopen(sender, "wb") as out:
            pickle.dump(function(), out)
            status = 0
        os._exit(status)
    os.close(sender)
    with os.fdopen(receiver, "rb") as answer:
        ready, _, _ = select.select([answer], [], [], VOTE_TIMEOUT)
        if not ready:
            os.kill(child, signal.SIGKILL)
        found = answer.read()
    _, status = os.waitpid(child, 0)
    if not ready:
        return "it hangs"
    return pickle.loads(found) if not status and found else f"the process died: {ended_by(status)}"


def ended_by(status: int) -> str:
    """The signal or the exit status in what `waitpid` returned."""
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"


# --- traps: where a reload can be made to fail ---


class NothingHappenedError(Exception):
    """The place that the fault was meant for was never reached."""


class Trap:
    """Counts steps of a reload and springs at one of them, or at none."""

    def __init__(self, at: int | None, spring: Callable[[], object]) -> None:
        self.at = at
        self.spring = spring
        self.steps = 0

    def step(self) -> None:
        """One step further."""
        self.steps += 1
        if self.at == self.steps - 1:
            self.spring()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a step before and a step after it; calls inside it do not count."""
        inside = False

        def stepping(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            inside = True
            try:
                self.step()
                found = function(*args, **kwargs)
                self.step()
            finally:
                inside = False
            return found

        return stepping

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a step before it."""

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return stepping


def fail(error: BaseException) -> Callable[[], None]:
    """Raises the error, when it is called."""

    def failing() -> None:
        raise error

    return failing


def interrupt() -> None:
    """Ctrl-C, as the terminal sends it."""
    signal.raise_signal(signal.SIGINT)


Seam = Callable[[Lab, Trap], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def tensors_read(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step at each tensor that is read from a file."""
    if not lab.ours:
        from vllm.model_executor.model_loader import weight_utils

        with patch.object(weight_utils, "safe_open", opened_with(trap, weight_utils.safe_open)):
            yield
        return
    # Tensors of the real size fill a batch each; these are read one by one as well.
    one_by_one = patch.object(read_batches, "BATCH", 1), patch.object(reading, "AHEAD", 1)
    with one_by_one[0], one_by_one[1], patch.object(vectored, "preadv", trap.before(vectored.preadv)):
        yield


def opened_with(trap: Trap, safe_open: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `safe_open`, with a step at each tensor."""

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            trap.step()
            return self.file.get_tensor(name)

    return Opened


@contextlib.contextmanager
def processing(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step before and after whatever processes a layer, the attention layers and the model's own hook."""
    modules = list(lab.model.modules())
    owners = {type(getattr(module, "quant_method", None)) for module in modules}
    owners |= {type(module) for module in modules}
    with contextlib.ExitStack() as stack:
        for owner in sorted(owners, key=lambda cls: cls.__qualname__):
            if hasattr(owner, "process_weights_after_loading"):
                stack.enter_context(wrapped(owner, "process_weights_after_loading", trap.around))
        if lab.ours:
            stack.enter_context(wrapped(vllm_api, "process_layers", trap.around))
        yield


@contextlib.contextmanager
def allocating(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step at each allocation of staging."""
    if not lab.ours:
        with layerwise("materialize_layer", trap):
            yield
        return
    resize, empty = torch.UntypedStorage.resize_, torch.empty

    def resizing(storage: torch.UntypedStorage, size: int) -> object:
        if size:
            trap.step()
        return resize(storage, size)

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if args and args[0] != 0:
            trap.step()
        return empty(*args, **kwargs)

    with patch.object(torch.UntypedStorage, "resize_", resizing), patch.object(torch, "empty", allocate):
        yield


@contextlib.contextmanager
def pooling(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step at each block that is taken from the pool, which here serves small tensors as well."""
    small = [patch.object(module, "SMALL", 1) for module in (memory, cpu)]
    take = patch.object(memory.HostPool, "take", trap.before(memory.HostPool.take))
    with small[0], small[1], take:
        yield


@contextlib.contextmanager
def committing(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step before and after each layer's new values become the served ones."""
    if not lab.ours:
        with layerwise("_copy_and_restore_kernel_tensors", trap):
            yield
        return
    with wrapped(commit.Commit, "apply", trap.around):
        yield


@contextlib.contextmanager
def lines(lab: Lab, trap: Trap) -> Iterator[None]:
    """A step at each line of this package that is run."""
    folder = str(Path(reload_plugin.__file__).parent)

    def line(frame: types.FrameType, event: str, value: object) -> object:
        if event == "line":
            trap.step()
        return line

    def call(frame: types.FrameType, event: str, value: object) -> object:
        return line if frame.f_code.co_filename.startswith(folder) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def layerwise(name: str, trap: Trap) -> contextlib.AbstractContextManager[object]:
    """A step before and after a function of vLLM's own layer-by-layer reload."""
    from vllm.model_executor.model_loader.reload import layerwise as module

    return wrapped(module, name, trap.around)


@contextlib.contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` wrapped; inherited methods become the class's own for the time."""
    with patch.object(owner, name, wrap(getattr(owner, name))):
        yield


def from_stream(lab: Lab) -> None:
    """B by pairs."""
    lab.push(iter(lab.weights["B"]))


def from_folder(lab: Lab) -> None:
    """B from its folder."""
    lab.reload(lab.folders["B"])


def from_block(lab: Lab) -> None:
    """B by the model's own `load_weights`, in a block."""
    with restore_for_reloading(lab.model):
        lab.model.load_weights(iter(lab.weights["B"]))


def from_copy(lab: Lab) -> None:
    """B from a folder that the fault may damage."""
    lab.reload(lab.copy("B"))


# --- kinds of faults ---


@dataclass(frozen=True)
class Kind:
    """One way to fail: where it can happen, and a reload of B that fails there."""

    name: str
    places: Callable[[Lab], Iterable[Any]]
    reload: Callable[[Lab, Any], None]
    ends: Ends = Ends.OLD
    raises: type[BaseException] = ReloadError
    own: bool = True
    """Whether vLLM's own reload has such a place as well."""
    cost: int = 1
    """How many places of other kinds take as long as one of this."""


def trapped(
    name: str,
    seam: Seam,
    face: Callable[[Lab], None],
    spring: Callable[[Lab, int], None],
    prepare: Callable[[Lab], None] = lambda _: None,
    **fields: Any,
) -> Kind:
    """A fault at each step of a seam; a good reload shows how many there are."""

    def places(lab: Lab) -> range:
        trap = Trap(None, lambda: None)
        prepare(lab)
        with seam(lab, trap):
            face(lab)
        if lab.ours:
            lab.heal()
        return range(trap.steps)

    def reload(lab: Lab, place: int) -> None:
        trap = Trap(place, lambda: spring(lab, place))
        prepare(lab)
        with interruptible(), seam(lab, trap):
            face(lab)
        if trap.steps <= place:
            raise NothingHappenedError(f"only {trap.steps} steps")

    return Kind(name, places, reload, **fields)


LINES = 500
"""Lines of the package at which Ctrl-C is pressed, of some fifty thousand that a reload runs through."""


UNSTEADY = 50
"""Lines by which one good reload may be shorter than another."""


def thinned(kind: Kind) -> Kind:
    """A kind with so many places that only some of them are tried, evenly spread.

    Two good reloads differ by a few lines (what is kept, what is forgotten), so the last ones may not come.
    """

    def places(lab: Lab) -> list[object]:
        return spread(list(kind.places(lab))[:-UNSTEADY], LINES)

    return dataclasses.replace(kind, places=places, cost=4)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C; processes that were started in the background have none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def edited(
    name: str, edit: Callable[[Weights, int], Weights], face: Callable[[Lab, Weights], None], **fields: Any
) -> Kind:
    """One weight of B at a time is not what it should be."""

    def places(lab: Lab) -> range:
        return range(len(lab.weights["B"]))

    def reload(lab: Lab, place: int) -> None:
        face(lab, edit(list(lab.weights["B"]), place))

    return Kind(name, places, reload, **fields)


def as_stream(lab: Lab, weights: Weights) -> None:
    """Push these weights."""
    lab.push(iter(weights))


def as_folder(lab: Lab, weights: Weights) -> None:
    """Write these weights and reload them."""
    folder = lab.copy("B")
    save_file({name: tensor.contiguous() for name, tensor in weights}, folder / WEIGHTS)
    lab.reload(folder)


def missing(weights: Weights, place: int) -> Weights:
    return weights[:place] + weights[place + 1 :]


def cut_off(weights: Weights, place: int) -> Weights:
    return weights[:place]


def duplicate(weights: Weights, place: int) -> Weights:
    return weights[: place + 1] + weights[place:]


def duplicate_at_the_end(weights: Weights, place: int) -> Weights:
    return [*weights, weights[place]]


def changed(make: Callable[[str, torch.Tensor], Any]) -> Callable[[Weights, int], Weights]:
    """An edit of one pair."""

    def edit(weights: Weights, place: int) -> Weights:
        return [make(*pair) if i == place else pair for i, pair in enumerate(weights)]

    return edit


def with_nan(weights: Weights, place: int) -> Weights:
    """NaN in the first element of a weight; the next that is not an integer, if it is one."""
    order = weights[place:] + weights[:place]
    name, tensor = next((n, t.clone()) for n, t in order if t.is_floating_point())
    tensor.view(-1)[0] = float("nan")
    return [(n, tensor if n == name else t) for n, t in weights]


longer = changed(lambda name, tensor: (name, torch.cat([tensor, tensor[:1]])))
shorter = changed(lambda name, tensor: (name, tensor[:-1]))
one_dimension_more = changed(lambda name, tensor: (name, torch.stack([tensor, tensor])))
renamed = changed(lambda name, tensor: ("unknown." + name, tensor))
on_meta = changed(lambda name, tensor: (name, tensor.to("meta")))
no_tensor = changed(lambda name, _: (name, "seven"))


def raising(weights: Weights, place: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Ends in an exception before weight `place`."""
    yield from weights[:place]
    raise Errors[place % len(Errors)]("the source is gone")


def interrupted(weights: Weights, place: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Ctrl-C before weight `place`."""
    for i, pair in enumerate(weights):
        if i == place:
            interrupt()
        yield pair
    if place == len(weights):
        interrupt()


def up_to_the_end(lab: Lab) -> range:
    """Before each weight, and after the last."""
    return range(len(lab.weights["B"]) + 1)


def push_raising(lab: Lab, place: int) -> None:
    lab.push(raising(lab.weights["B"], place))


def push_interrupted(lab: Lab, place: int) -> None:
    with interruptible():
        lab.push(interrupted(lab.weights["B"], place))


def block_raising(lab: Lab, place: int) -> None:
    with restore_for_reloading(lab.model):
        lab.model.load_weights(raising(lab.weights["B"], place))


def update_raising(lab: Lab, place: int) -> None:
    """By the calls that transfer engines make: the source of an open update raises."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(lab.model)
    try:
        lab.model.load_weights(raising(lab.weights["B"], place))
    finally:
        if lab.ours:
            state_of(lab.model).before_forward_pass()


def fed_by(weights: Weights, place: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that another process sends, which is killed after `place` of them."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def feed() -> None:
        receiver.close()
        for name, tensor in weights:
            sender.send((name, tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy()))
        os.kill(os.getpid(), signal.SIGSTOP)

    trainer = context.Process(target=feed, daemon=True)
    trainer.start()
    sender.close()
    try:
        for i in range(len(weights) + 1):
            if i == place:
                trainer.kill()
            name, dtype, shape, values = receiver.recv()
            yield name, torch.from_numpy(values).view(dtype).view(shape)
    finally:
        receiver.close()
        trainer.kill()
        trainer.join()
        trainer.close()


def push_fed(lab: Lab, place: int) -> None:
    lab.push(fed_by(lab.weights["B"], place))


def three_places(lab: Lab) -> list[int]:
    """Early, half way, and when everything but the end was sent."""
    count = len(lab.weights["B"])
    return [1, count // 2, count]


def raise_memory_error(lab: Lab, place: int) -> None:
    raise MemoryError


def raise_as_torch_does(lab: Lab, place: int) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def raise_value_error(lab: Lab, place: int) -> None:
    raise ValueError("not with these weights")


def raise_io_error(lab: Lab, place: int) -> None:
    raise OSError(5, "Input/output error")


def press_ctrl_c(lab: Lab, place: int) -> None:
    interrupt()


def damaged(lab: Lab) -> Path:
    """The file of weights in the folder that is being read."""
    return lab.scratch / WEIGHTS


def truncate(lab: Lab, place: int) -> None:
    size = damaged(lab).stat().st_size
    os.truncate(damaged(lab), size * place // len(lab.weights["B"]))


def replace_by_rename(lab: Lab, place: int) -> None:
    following = lab.scratch / "following"
    shutil.copy(lab.folders["A"] / WEIGHTS, following)
    following.rename(damaged(lab))


def delete(lab: Lab, place: int) -> None:
    damaged(lab).unlink()


def from_a_folder_that_goes(lab: Lab) -> None:
    """The weights served now come from a folder that the fault removes."""
    lab.reload(lab.copy("A"))


def from_a_stream_before(lab: Lab) -> None:
    """The weights served now came by pairs, so that nobody can read them again."""
    lab.push(iter(lab.weights["A"]))


def remove_and_raise(lab: Lab, place: int) -> None:
    shutil.rmtree(lab.scratch, ignore_errors=True)
    raise ValueError("not with these weights")


REFUSES = {"ends": Ends.OLD_OR_REFUSES}
CTRL_C = {"raises": KeyboardInterrupt}
DEFERRED = CTRL_C | {"ends": Ends.NEW, "own": False}
ANYWHERE = CTRL_C | {"ends": Ends.ONE_OF_BOTH, "own": False}
ANY = {"raises": Exception}
"""What the fault raised may come out as it is."""

KINDS = (
    Kind("iterator: raises before weight k, and at the end", up_to_the_end, push_raising),
    Kind("iterator: its process is killed", three_places, push_fed),
    Kind("iterator: Ctrl-C before weight k", up_to_the_end, push_interrupted, **CTRL_C),
    Kind("open update: its source raises before weight k", up_to_the_end, update_raising),
    edited("iterator: ends before weight k", cut_off, as_stream),
    edited("iterator: weight k is missing", missing, as_stream),
    edited("iterator: weight k comes twice in a row", duplicate, as_stream),
    edited("iterator: weight k comes again at the end", duplicate_at_the_end, as_stream),
    edited("iterator: weight k has a row more", longer, as_stream),
    edited("iterator: weight k has a row less", shorter, as_stream),
    edited("iterator: weight k has a dimension more", one_dimension_more, as_stream),
    edited("iterator: weight k has an unknown name", renamed, as_stream),
    edited("iterator: weight k is a meta tensor", on_meta, as_stream),
    edited("iterator: weight k is no tensor", no_tensor, as_stream),
    edited("iterator: weight k holds NaN, which is no fault", with_nan, as_stream, ends=Ends.TAKEN),
    edited("folder: weight k is missing", missing, as_folder),
    edited("folder: weight k has a row more", longer, as_folder),
    edited("folder: weight k has a row less", shorter, as_folder),
    edited("folder: weight k has an unknown name", renamed, as_folder),
    edited("folder: weight k holds NaN, which is no fault", with_nan, as_folder, ends=Ends.TAKEN),
    trapped("folder: read k fails (EIO)", tensors_read, from_folder, raise_io_error),
    trapped("folder: truncated at read k", tensors_read, from_copy, truncate),
    trapped(
        "folder: replaced by rename at read k",
        tensors_read,
        from_copy,
        replace_by_rename,
        ends=Ends.OLD_OR_NEW,
    ),
    trapped("folder: deleted at read k", tensors_read, from_copy, delete, ends=Ends.OLD_OR_NEW),
    trapped("iterator: processing raises at step k", processing, from_stream, raise_value_error),
    trapped("folder: processing raises at step k", processing, from_folder, raise_value_error),
    trapped("iterator: Ctrl-C at step k of processing", processing, from_stream, press_ctrl_c, **CTRL_C),
    trapped("folder: Ctrl-C at step k of processing", processing, from_folder, press_ctrl_c, **CTRL_C),
    trapped(
        "folder: processing raises at step k, and the old folder is gone",
        processing,
        from_folder,
        remove_and_raise,
        from_a_folder_that_goes,
    ),
    trapped("iterator: allocation k fails (MemoryError)", allocating, from_stream, raise_memory_error, **ANY),
    trapped(
        "iterator: allocation k fails (RuntimeError)", allocating, from_stream, raise_as_torch_does, **ANY
    ),
    trapped("folder: allocation k fails (MemoryError)", allocating, from_folder, raise_memory_error, **ANY),
    trapped("folder: allocation k fails (RuntimeError)", allocating, from_folder, raise_as_torch_does, **ANY),
    trapped("folder: block k of the pool fails", pooling, from_folder, raise_memory_error, own=False, **ANY),
    trapped("iterator: commit raises at step k", committing, from_stream, raise_value_error, **ANY),
    trapped("folder: commit raises at step k", committing, from_folder, raise_value_error, **ANY),
    trapped(
        "iterator: commit raises at step k, and the old weights came by an iterator",
        committing,
        from_stream,
        raise_value_error,
        from_a_stream_before,
        **REFUSES,
        **ANY,
    ),
    trapped(
        "iterator: Ctrl-C at step k of the commit",
        committing,
        from_stream,
        press_ctrl_c,
        ends=Ends.NEW,
        **CTRL_C,
    ),
    trapped("folder: Ctrl-C at step k of the commit", committing, from_folder, press_ctrl_c, **CTRL_C),
    Kind("block: its source raises before weight k", up_to_the_end, block_raising, own=False),
    trapped("block: processing raises at step k", processing, from_block, raise_value_error, own=False),
    trapped("block: commit raises at step k", committing, from_block, raise_value_error, own=False, **ANY),
    trapped("block: Ctrl-C at step k of the commit", committing, from_block, press_ctrl_c, **DEFERRED),
    *(
        thinned(trapped(f"{face}: Ctrl-C at line k of the package", lines, reload, press_ctrl_c, **ANYWHERE))
        for face, reload in (("iterator", from_stream), ("folder", from_folder), ("block", from_block))
    ),
)


# --- runs and the table ---


def run(name: str, root: Path) -> Iterator[Result]:
    """All kinds in one engine, whichever reload is switched on; raises if a good reload goes wrong."""
    with lab_of(case_named(name), root) as lab:
        for kind in KINDS:
            if lab.ours or kind.own:
                yield lab.try_kind(kind)
                if lab.ours:
                    lab.assert_good_reloads()


def sessions_alive() -> int:
    """Reloads that are over and still in memory."""
    gc.collect()
    return sum(isinstance(found, (ReloadSession, staged_group.StagedGroup)) for found in gc.get_objects())


def run_in_subprocess(name: str, root: Path, plugin: bool) -> dict[str, Result]:
    """`run` in a fresh process, with this plugin on or off."""
    command = [sys.executable, "-m", "tests.faults", "--json", "--root", str(root), name]
    process = oracle.start_process(command, plugin)
    found = [Result(**json.loads(line)) for line in oracle.lines_of(process, silence=600)]
    if process.wait():
        raise RuntimeError(f"{name}, plugin {plugin}: {oracle.last_words(process)}")
    process.stderr_file.close()
    return {result.kind: result for result in found}


def print_table(names: list[str], root: Path) -> None:
    """Markdown: two fresh processes at once for each engine, plugin off and on. Progress on stderr."""
    found: dict[tuple[str, bool], dict[str, Result]] = {}
    with ThreadPoolExecutor() as pool:
        for name in names:
            jobs = {on: pool.submit(run_in_subprocess, name, root / str(on), on) for on in (False, True)}
            found |= {(name, on): job.result() for on, job in jobs.items()}
            print(f"{name} done", file=sys.stderr, flush=True)
    print("\n".join(table(names, found)))


def table(names: list[str], found: dict[tuple[str, bool], dict[str, Result]]) -> Iterator[str]:
    """One row a kind: survived and tried, vLLM's own and ours, for each engine."""
    columns = [(name, on) for name in names for on in (False, True)]
    yield "| fault | " + " | ".join(f"{name}: {'ours' if on else 'own'}" for name, on in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for kind in KINDS:
        cells = [counted(found[column].get(kind.name)) for column in columns]
        yield f"| {kind.name} | {' | '.join(cells)} |"
    totals = [counted(total(found[column].values())) for column in columns]
    yield f"| all | {' | '.join(totals)} |"


def counted(result: Result | None) -> str:
    """`survived/tried`."""
    return f"{result.survived}/{result.tried}" if result else "–"


def total(results: Iterable[Result]) -> Result:
    """The sum over all kinds."""
    found = Result("all")
    for result in results:
        found.tried += result.tried
        found.survived += result.survived
    return found


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("engines", nargs="*", default=ENGINES)
    parser.add_argument("--table", action="store_true", help="plugin off and on, in fresh processes")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each kind")
    parser.add_argument("--root", type=Path, help="where to keep checkpoints (default: a temporary folder)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        if options.table:
            print_table(list(options.engines), root)
            return
        for name in options.engines:
            for result in run(name, root):
                print(json.dumps(asdict(result)) if options.json else line_of(name, result), flush=True)


def line_of(name: str, result: Result) -> str:
    """One kind, and the first reason if there is one."""
    return f"{name}: {result.survived}/{result.tried} {result.kind} {'; '.join(result.reasons[:1])}".rstrip()


if __name__ == "__main__":
    main()
