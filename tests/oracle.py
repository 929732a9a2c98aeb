"""Is a reloaded engine the engine that a cold start gives? Bit for bit, and down to the last tensor.

An engine is started on checkpoint A, reloaded to A, to B, back to A and to B again, and compared with an
engine started on B: sampled tokens, logprobs, the value of every tensor that can be reached from the model;
and before against after a reload, the identity and the address of each.

    python -m tests.oracle llama mixtral     # run cases here and print what differs
    python -m tests.oracle --table           # every case with the plugin off and on, as a Markdown table
"""

import argparse
import contextlib
import enum
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

# One thread an engine: two threads that wait for each other on a busy machine are ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

from tests.checkpoints import read_tensors
from tests.zoo import CASES, DIES, MOVED, RAISES, RIGHT, WRONG, Case, case_named

PROMPTS = ([1, 2, 3, 4, 5, 6, 7], list(range(20, 57)), [101, 7, 101, 9])
TOKENS = 16
ENGINE_KWARGS = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
}
SEED_A, SEED_B = 0, 1


# --- engines ---


def start(case: Case, folder: Path, **overrides: object):
    """An engine in this process, on this checkpoint."""
    from vllm import LLM

    import tests.online_methods  # noqa: F401  registers the tests' quantization methods

    with gc_paused():
        return LLM(model=str(folder), **(ENGINE_KWARGS | dict(case.engine_kwargs) | overrides))


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Make `gc.collect` do nothing: vLLM calls it nine times an engine, half a second each."""
    collect, gc.collect = gc.collect, lambda *_: 0
    try:
        yield
    finally:
        gc.collect = collect


def stop(llm: object) -> None:
    """Shut an engine down so that the next one can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with gc_paused():
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    gc.collect()


@contextlib.contextmanager
def running(case: Case, folder: Path, **overrides: object) -> Iterator:
    """`start`, and `stop` whatever happens."""
    llm = start(case, folder, **overrides)
    try:
        yield llm
    finally:
        stop(llm)


@contextlib.contextmanager
def built(case: Case, folder: Path) -> Iterator[torch.nn.Module]:
    """The model of a case as vLLM makes, loads and processes it, with no engine around it.

    The plugin stays registered: vLLM loads its plugins once in a process.
    """
    from vllm.model_executor.model_loader import get_model

    import tests.online_methods  # noqa: F401  registers the tests' quantization methods
    from reload_plugin import vllm_api
    from reload_plugin.vllm_hooks import plugin

    plugin.register()
    empty_cache = torch.accelerator.empty_cache
    torch.accelerator.empty_cache = lambda: None  # vLLM's CPU runner does this too: there is no accelerator
    try:
        with vllm_api.one_rank(str(folder), ENGINE_KWARGS | dict(case.engine_kwargs)) as config:
            yield get_model(vllm_config=config)
    finally:
        torch.accelerator.empty_cache = empty_cache


def model_of(llm: object) -> torch.nn.Module:
    """The model inside the one worker of an in-process engine."""
    return llm.collective_rpc(lambda worker: worker.get_model())[0]


def reload_from_folder(llm: object, folder: Path) -> None:
    """The public reload of a checkpoint folder, unchanged."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def reload_from_stream(llm: object, folder: Path) -> None:
    """The same checkpoint pushed as (name, tensor) pairs, as a trainer does."""
    weights = iter(read_tensors(folder).items())
    llm.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=weights))


# --- answers ---


def answer(llm: object, pooling: bool = False) -> list:
    """What a user sees, exactly: tokens with the logprobs of the best five, or embeddings."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if pooling:
        return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=5, prompt_logprobs=5
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [plain(position) for position in output.outputs[0].logprobs],
            "prompt_logprobs": [plain(position) for position in output.prompt_logprobs],
        }
        for output in outputs
    ]


def plain(position: dict | None) -> dict | None:
    """{token: logprob} of one position; the first prompt position has none."""
    return position and {token: entry.logprob for token, entry in position.items()}


def differing_answers(warm: list, cold: list) -> list[str]:
    """`tokens`, `logprobs`, `prompt_logprobs` or `embeddings`, as far as they differ."""
    if not isinstance(cold[0], dict):
        return [] if warm == cold else ["embeddings"]
    return [kind for kind in cold[0] if [a[kind] for a in warm] != [b[kind] for b in cold]]


# --- tensors ---


@dataclass(frozen=True)
class Live:
    """One reachable tensor or number. `keep` holds the object, so that no other takes its id or address."""

    object_id: int
    address: int
    digest: str
    keep: object = field(compare=False, repr=False, default=None)


# Caches and their bookkeeping: bound after loading, filled by serving, no weights.
SKIPPED_ATTRIBUTES = {"kv_cache", "_modules", "_parameters", "_buffers", "weight_loader"}
SKIPPED_ATTRIBUTES |= {"_do_torchao_reload", "_original_do_torchao_reload"}
WALKED_PACKAGES = ("vllm.", "tests.", "torchao.", "compressed_tensors.")
LEFT_ALONE = (
    "vllm.config",
    "vllm.logger",
    "vllm.platforms",
    "vllm.distributed",
    "vllm.compilation",
    "vllm.v1.worker",
)
NUMBERS = (bool, int, float, complex)


def digest(tensor: torch.Tensor) -> str:
    """Hash of dtype, shape, strides and bytes; one without bytes (on meta, or freed) says so."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())}"
    if tensor.is_meta:
        return "meta " + head
    if not tensor.numel():
        return "empty " + head
    if not tensor.untyped_storage().nbytes():
        return "freed " + head
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.sha256(head.encode() + data).hexdigest()[:16]


def is_handle(value: object) -> bool:
    """Whether this object owns memory outside torch, by a pointer kept in `handler_tensor`."""
    return hasattr(value, "handler_tensor")


class Walk:
    """Collects every tensor and number reachable from a model, each under the first path that leads to it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.found: dict[str, Live] = {}
        self.seen: set[int] = set()
        self.modules = {id(module) for module in model.modules()}

    def visit(self, path: str, value: object) -> None:
        """Record `value`, or go into it, or leave it if it can hold no weights."""
        if isinstance(value, torch.Tensor):
            self.tensor(path, value)
        elif isinstance(value, NUMBERS) and not isinstance(value, enum.Enum):
            self.found[path] = Live(0, 0, repr(value))
        elif is_handle(value):
            self.handle(path, value)
        elif id(value) not in self.modules and id(value) not in self.seen:
            self.seen.add(id(value))
            for name, child in children(value):
                self.visit(f"{path}{name}", child)

    def tensor(self, path: str, tensor: torch.Tensor) -> None:
        """Record a tensor; a wrapper subclass stands for the tensors inside it."""
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            self.found[path] = Live(id(tensor), 0, type(tensor).__name__, tensor)
            for name in names:
                self.visit(f"{path}.{name}", getattr(tensor, name))
            return
        address = 0 if tensor.is_meta else tensor.data_ptr()
        self.found[path] = Live(id(tensor), address, digest(tensor), tensor)

    def handle(self, path: str, handle: object) -> None:
        """The handle object and its pointer tensor must stay; the pointer in it may change."""
        pointer = handle.handler_tensor
        self.found[path] = Live(id(handle), 0, f"{handle.k} x {handle.n}", handle)
        self.found[path + ".handler_tensor"] = Live(id(pointer), pointer.data_ptr(), "pointer", pointer)

    def module(self, path: str, module: torch.nn.Module) -> None:
        """All that one module owns by itself, and what its packed weight computes."""
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                self.visit(f"{path}.{name}", tensor)
        for name, value in vars(module).items():
            if name not in SKIPPED_ATTRIBUTES and not name.startswith("_reload_plugin"):
                self.visit(f"{path}.{name}", value)
        weight = effective_weight(module)
        if weight is not None:
            self.found[f"{path}.apply(identity)"] = Live(0, 0, digest(weight))


def children(value: object) -> Iterator[tuple[str, object]]:
    """(path suffix, object) of what a container, closure or helper object of the model holds."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items() if isinstance(key, (str, int)))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from closure(value)
    elif is_helper(value):
        for name, child in attributes(value):
            if name not in SKIPPED_ATTRIBUTES:
                yield f".{name}", child


def closure(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The captured variables and defaults of a function."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            yield f"<{name}>", cell.cell_contents
    yield ".__defaults__", function.__defaults__ or ()
    yield ".__kwdefaults__", function.__kwdefaults__ or {}


def is_helper(value: object) -> bool:
    """Quant methods, schemes, kernels and the like: objects of vLLM's, but not configuration or services."""
    if isinstance(value, (type, types.ModuleType, enum.Enum)):
        return False
    if isinstance(value, torch.nn.Module):
        return True
    module = type(value).__module__ + "."
    return module.startswith(WALKED_PACKAGES) and not module.startswith(LEFT_ALONE)


def attributes(value: object) -> Iterator[tuple[str, object]]:
    """Instance attributes, from `__dict__`, from slots, and for a loose module from its tensor tables."""
    yield from getattr(value, "__dict__", {}).items()
    if isinstance(value, torch.nn.Module):
        yield from (value._parameters | value._buffers | value._modules).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


@torch.no_grad()
def effective_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """A linear layer's weight as its kernel has it, transposed, by feeding an identity; None for others."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if isinstance(module, ParallelLMHead):
        size = module.embedding_dim
    elif isinstance(module, LinearBase) and module.quant_method is not None:
        size = getattr(module, "input_size_per_partition", module.input_size)
    else:
        return None
    if isinstance(module.quant_method, UnquantizedLinearMethod) and not hasattr(module, "cpu_linear"):
        return None  # a convolution, or a layer that keeps its weight as a plain tensor
    if getattr(module, "cpu_linear", None) is torch.nn.functional.linear and not module.weight.numel():
        return None  # absorbed into the tensors of an attention layer, as kv_b_proj is where AMX is used
    device = next((p.device for p in module.parameters()), None)
    dtype = getattr(module, "params_dtype", torch.bfloat16)  # a router of experts may want float32
    return module.quant_method.apply(module, torch.eye(size, dtype=dtype, device=device))


def live_tensors(model: torch.nn.Module) -> dict[str, Live]:
    """Everything the model computes with, by path."""
    walk = Walk(model)
    for name, module in model.named_modules():
        walk.module(name or "model", module)
    return walk.found


# --- comparisons ---


PLACES = ("object", "address")


@dataclass(frozen=True)
class Snapshot:
    """An engine at one moment."""

    answers: list
    tensors: dict[str, Live]
    digest: str = ""
    """What the plugin says it serves; empty without the plugin."""


@dataclass(frozen=True)
class Difference:
    """`leg` is the reload after which it was seen; `kind` is tokens, logprobs, value, object, address, ..."""

    leg: str
    kind: str
    path: str = ""


@dataclass
class Result:
    """What became of one case.

    `error` is the exception that ended it, or the last words of a process that `crashed`; `reload_from` is
    the module whose reload the engine used, vLLM's or this plugin's.
    """

    case: str
    differences: list[Difference] = field(default_factory=list)
    tensors: int = 0
    reload_from: str = ""
    error: str = ""
    crashed: bool = False

    @property
    def verdict(self) -> str:
        """`dies` or `raises`; `wrong` if a value differs; `moved` if only places do; `right`."""
        if self.error:
            return DIES if self.crashed else RAISES
        if any(difference.kind not in PLACES for difference in self.differences):
            return WRONG
        return MOVED if self.differences else RIGHT

    def summary(self, limit: int = 4) -> str:
        """One line: the verdict and the kinds of differences, each with its first few paths."""
        if self.error:
            return f"{self.verdict}: {self.error}"
        kinds: dict[str, dict[str, None]] = {}
        for difference in sorted(self.differences, key=lambda found: found.kind in PLACES):
            kinds.setdefault(difference.kind, {})[difference.path] = None
        details = "; ".join(named(kind, paths, limit) for kind, paths in kinds.items())
        return f"{self.verdict}: {details}" if details else self.verdict


def named(kind: str, paths: dict[str, None], limit: int) -> str:
    """`value of a.b, c.d and 7 more`, or the kind alone where there are no paths."""
    found = [path for path in paths if path]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return kind + (f" of {', '.join(found[:limit])}{more}" if found else "")


def snapshot(llm: object, case: Case) -> Snapshot:
    """Answers first: serving may fill lazily made state."""
    answers = answer(llm, case.pooling)
    return Snapshot(answers, live_tensors(model_of(llm)), served_digest(llm))


def served_digest(llm: object) -> str:
    """The digest in the plugin's status, hashed anew at an engine's start and else by the last commit."""
    if not reload_module().startswith("reload_plugin"):
        return ""
    import reload_plugin

    return reload_plugin.status(llm)[0].digest or "unknown"


def compare_values(leg: str, warm: Snapshot, cold: Snapshot) -> list[Difference]:
    """Answers and tensor values, of two engines or of one at two times."""
    found = [Difference(leg, kind) for kind in differing_answers(warm.answers, cold.answers)]
    if warm.digest != cold.digest or warm.digest == "unknown":
        found.append(Difference(leg, "digest", f"{warm.digest} instead of {cold.digest}"))
    for path in sorted(warm.tensors.keys() | cold.tensors.keys()):
        ours, theirs = warm.tensors.get(path), cold.tensors.get(path)
        if ours is None or theirs is None:
            found.append(Difference(leg, "missing" if ours is None else "extra", path))
        elif ours.digest != theirs.digest:
            found.append(Difference(leg, "value", path))
    return found


def compare_places(leg: str, before: Snapshot, after: Snapshot) -> list[Difference]:
    """Object identity and address of every tensor, before and after a reload of one engine."""
    found = []
    for path in sorted(before.tensors.keys() & after.tensors.keys()):
        old, new = before.tensors[path], after.tensors[path]
        if old.object_id != new.object_id:
            found.append(Difference(leg, "object", path))
        elif old.address != new.address:
            found.append(Difference(leg, "address", path))
    return found


LEGS = (
    ("A", reload_from_folder),
    ("B", reload_from_folder),
    ("A", reload_from_stream),
    ("B", reload_from_stream),
)


def write(case: Case, root: Path) -> dict[str, Path]:
    """Checkpoints A and B of a case under `root`, written once."""
    folders = {}
    for letter, seed in (("A", SEED_A), ("B", SEED_B)):
        folders[letter] = root / case.name / letter
        if not folders[letter].exists():
            folders[letter].mkdir(parents=True)
            case.builder(folders[letter], case.config, seed)
    return folders


def warm_legs(
    llm: object, case: Case, folders: dict[str, Path]
) -> tuple[list[Difference], dict[str, Snapshot]]:
    """Reload through all legs: what differed from the first time, and the first snapshot by letter."""
    started = snapshot(llm, case)
    first = {} if case.starts_on_dummy else {"A": started}
    found = []
    for number, (letter, reload) in enumerate(LEGS, 1):
        leg = f"{number}:{reload.__name__}({letter})"
        reload(llm, folders[letter])
        now = snapshot(llm, case)
        found += compare_places(leg, started, now)
        if letter in first:
            found += compare_values(leg, now, first[letter])
        first.setdefault(letter, now)
    return found, first


def run_case(case: Case, root: Path, **overrides: object) -> Result:
    """The whole oracle for one case, in this process; an exception goes into `error` and to stderr."""
    result = Result(case.name)
    try:
        folders = write(case, root)
        with running(case, folders["A"], **overrides) as llm:
            result.reload_from = reload_module()
            result.differences, warm = warm_legs(llm, case, folders)
        cold = cold_snapshot(case, folders["B"], **overrides)
        result.tensors = len(cold.tensors)
        result.differences += compare_values("cold(B)", warm["B"], cold)
        check_power(warm["A"], cold)
    except Exception as error:  # noqa: BLE001  one case must not end the others
        traceback.print_exc()
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def check_power(a: Snapshot, b: Snapshot) -> None:
    """Raise if A and B cannot be told apart by their answers: such a case could not fail."""
    if not differing_answers(a.answers, b.answers):
        raise AssertionError("checkpoints A and B give the same answers")


def reload_module() -> str:
    """The module that the runner's `reload_weights` comes from, once an engine has been started."""
    from vllm.v1.worker import gpu_model_runner

    method = gpu_model_runner.GPUModelRunner.reload_weights  # some versions have a function that it calls
    return getattr(gpu_model_runner, "reload_weights", method).__globals__["__name__"]


def cold_snapshot(case: Case, folder: Path, **overrides: object) -> Snapshot:
    """An engine started on this checkpoint from the files, even if the case starts on dummy weights."""
    with running(case, folder, **({"load_format": "auto"} | overrides)) as llm:
        return snapshot(llm, case)


# --- subprocesses and the table ---


THIS = (sys.executable, "-m", "tests.oracle")


def run_in_subprocesses(
    names: list[str], root: Path, plugin: bool = True, silence: float = 300, command: tuple[str, ...] = THIS
) -> Iterator[Result]:
    """Run cases in one fresh process, and where a case kills it, the rest in the next.

    Results come as they are ready. A process that is silent for `silence` seconds is killed, and the case it
    was in counts as crashed.
    """
    remaining = list(names)
    while remaining:
        process = start_process([*command, "--json", "--root", str(root), *remaining], plugin)
        for line in lines_of(process, silence):
            fields = json.loads(line)
            fields["differences"] = [Difference(**entry) for entry in fields["differences"]]
            remaining.remove(fields["case"])
            yield Result(**fields)
        process.wait()
        if remaining:
            yield Result(remaining.pop(0), error=last_words(process), crashed=True)
        process.stderr_file.close()


def start_process(command: list[str], plugin: bool) -> subprocess.Popen:
    """A process with this plugin on or off, its stderr in a temporary file (a pipe could fill up)."""
    environment = os.environ | {"RELOAD_PLUGIN": str(int(plugin)), "PYTHONFAULTHANDLER": "1"}
    stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed when the process has ended
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    process.stderr_file = stderr
    return process


def lines_of(process: subprocess.Popen, silence: float) -> Iterator[str]:
    """The JSON lines a process prints; it is killed if the next one takes longer than `silence` seconds."""
    while True:
        timer = threading.Timer(silence, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        if line.startswith("{"):
            yield line


def last_words(process: subprocess.Popen) -> str:
    """The signal or exit status that ended a process, and the line of its stderr that says most about why."""
    process.stderr_file.seek(0)
    lines = [line.strip() for line in process.stderr_file if line.strip()]
    telling = [line for line in lines if "Fatal" in line or "corrupted" in line or "Error" in line]
    status = process.returncode
    ended = f"exit {status}" if status >= 0 else signal.Signals(-status).name
    return f"{ended}: {telling[-1][:200]}" if telling else ended


def print_table(names: list[str], root: Path) -> None:
    """Markdown, one row a case: two fresh processes at once, plugin off and on. Progress on stderr."""

    def cell(name: str, plugin: bool) -> str:
        return next(run_in_subprocesses([name], root, plugin)).summary(1).replace("|", "\\|")

    print("| case | vLLM's own reload | with this plugin |\n|---|---|---|")
    with ThreadPoolExecutor() as pool:
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
            write(case_named(name), root)
            own, ours = pool.map(cell, [name, name], [False, True])
            print(f"| {name} | {own} | {ours} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle")
    parser.add_argument("cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument(
        "--table", action="store_true", help="plugin off and on, each case in fresh processes"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each case")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager mode")
    parser.add_argument("--root", type=Path, help="where to keep checkpoints (default: a temporary folder)")
    options = parser.parse_args(arguments)
    overrides = {"enforce_eager": False} if options.compiled else {}
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        if options.table:
            print_table(options.cases, root)
            return
        for name in options.cases:
            result = run_case(case_named(name), root, **overrides)
            print(json.dumps(asdict(result)) if options.json else f"{name}: {result.summary()}", flush=True)


if __name__ == "__main__":
    main()
