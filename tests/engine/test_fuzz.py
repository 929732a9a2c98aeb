"""Thousands of damaged checkpoints: each is refused with a SourceError or read bit for bit, and nothing else.

What is right is told by others: the safetensors library for files, Python's own JSON for an index. Inputs
are the same in every run.
"""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from reload_plugin import reload_weights
from reload_plugin.checkpoint import open_folder
from reload_plugin.checkpoint.config import check_config
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.errors import ReloadError, SourceError
from tests.transaction.test_session import A, B, Model, cold, identities, registered, values  # noqa: F401

HEADERS, BYTES, INDICES, CONFIGS, RELOADS = 6000, 2200, 1200, 400, 300
"""Inputs of each kind: more than 10,000 in all."""


def fuzz(count: int) -> Callable:
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class Score:
    """How many inputs were tried, and what became of them."""

    def __init__(self) -> None:
        self.tried = self.read = self.refused = 0

    def add(self, read: bool) -> None:
        self.read += read
        self.refused += not read

    def show(self, kind: str, at_least: int, capsys: pytest.CaptureFixture) -> None:
        survived = self.read + self.refused
        with capsys.disabled():
            print(f"\n{kind}: survived {survived} / tried {self.tried}; {self.refused} refused", end="")
        assert survived == self.tried >= at_least
        assert self.read > at_least // 100
        assert self.refused > at_least // 3


# --- damaged headers ---


class Raw(str):
    """Text that goes into JSON as it is."""


class Pairs(list):
    """A JSON object as (name, value) pairs, so that a name may come twice."""


def rendered(value: object) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{rendered(name)}:{rendered(entry)}" for name, entry in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(rendered, value)) + "]"
    return json.dumps(value)


TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4, dtype=torch.int8),
    "c.bias": torch.arange(3, dtype=torch.uint8),
}
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def base() -> tuple[Pairs, bytes]:
    """A whole header and the bytes behind it."""
    header, body = Pairs([("__metadata__", Pairs([("format", "pt")]))]), b""
    for name, tensor in TENSORS.items():
        end = len(body) + tensor.nbytes
        entry = [
            ("dtype", KINDS[tensor.dtype]),
            ("shape", list(tensor.shape)),
            ("data_offsets", [len(body), end]),
        ]
        header.append((name, Pairs(entry)))
        body += raw(tensor)
    return header, body


TOKENS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "-0",
        "-1",
        "0.0",
        "1.0",
        "1e2",
        "1e400",
        "00",
        "0x1",
        "true",
        "{}",
        "[]",
    ),
    *(
        '"\\ud800"',
        '"\\u0000"',
        "9223372036854775807",
        "18446744073709551616",
        "9" * 5000,
        "[" * 3000 + "]" * 3000,
    ),
    *("", "[[", '"', "\x00", "null", "[0,6]", "[0,24]", "[24,0]"),
)
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(TOKENS).map(Raw),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(st.tuples(st.text(max_size=3), inner), max_size=2).map(Pairs)
    ),
    max_leaves=4,
)
place = st.integers(0, 5)
field = st.sampled_from(("dtype", "shape", "data_offsets"))
delta = st.integers(-9, 9) | st.sampled_from((-(2**64), -(2**63), 2**31, 2**63, 2**64))
edit = st.one_of(
    st.tuples(st.just("drop"), place),
    st.tuples(st.just("again"), place, place),
    st.tuples(st.just("swap"), place, place),
    st.tuples(st.just("order"), place, place),
    st.tuples(
        st.just("rename"), place, st.text(max_size=5) | st.sampled_from(("a.weight", "__metadata__", "é☃𝄞"))
    ),
    st.tuples(
        st.just("rename"), place, st.sampled_from(('"\\udc00"', "1", "null", '"\\u0061.weight"')).map(Raw)
    ),
    st.tuples(st.just("drop field"), place, field),
    st.tuples(st.just("field again"), place, field, junk),
    st.tuples(st.just("retype"), place, field, junk),
    st.tuples(st.just("replace"), place, junk),
    st.tuples(st.just("extra"), place, st.text(max_size=4), junk),
    st.tuples(st.just("offset"), place, st.integers(0, 1), delta),
    st.tuples(st.just("dim"), place, place, delta),
    st.tuples(
        st.just("kind"), place, st.sampled_from(("F32", "I32", "U8", "I8", "F4", "F8_E4M3", "f32", ""))
    ),
    st.tuples(
        st.just("empty"), st.text(max_size=3), st.lists(st.sampled_from((0, 1, 7, 2**62)), max_size=70)
    ),
)
around = st.tuples(
    st.sampled_from((0,) * 12 + (1, -1, 8, -8, 2**31, 2**63, 2**64 - 1)),
    st.sampled_from(("",) * 12 + (" ", "\n", "\ufeff", "\x00", "[")),
    st.sampled_from(("",) * 8 + (" ", "     ", "\n\t", "\x00", ",", "}", "{}")),
    st.sampled_from(("utf-8",) * 15 + ("utf-16", "utf-32-le", "latin-1")),
    st.sampled_from((0,) * 9 + (1, 100, -1, -9)),
)


def edited(header: Pairs, change: tuple) -> None:
    """Damage a header in place; edits that have nothing to work on do nothing."""
    kind, *arguments = change
    if kind == "empty":
        header.append(
            (arguments[0], Pairs([("dtype", "F32"), ("shape", arguments[1]), ("data_offsets", [0, 0])]))
        )
        return
    at = arguments[0] % len(header) if header else None
    if at is None:
        return
    name, entry = header[at]
    if kind == "drop":
        del header[at]
    elif kind in ("again", "order"):
        item = header[at] if kind == "again" else header.pop(at)
        header.insert(arguments[1], item)
    elif kind == "rename":
        header[at] = (arguments[1], entry)
    elif kind == "replace":
        header[at] = (name, arguments[1])
    elif isinstance(entry, Pairs):
        within(header, at, entry, kind, arguments[1:])


def within(header: Pairs, at: int, entry: Pairs, kind: str, arguments: list) -> None:
    """Edits of one tensor's description."""
    names = [name for name, _ in entry]
    if kind == "swap":
        other = header[arguments[0] % len(header)][1]
        if isinstance(other, Pairs) and entry and other:
            entry[-1], other[-1] = other[-1], entry[-1]
    elif kind in ("extra", "field again"):
        entry.append(tuple(arguments))
    elif kind == "drop field":
        entry[:] = [pair for pair in entry if pair[0] != arguments[0]]
    elif kind == "retype" and arguments[0] in names:
        entry[names.index(arguments[0])] = tuple(arguments)
    elif kind == "kind" and "dtype" in names:
        entry[names.index("dtype")] = ("dtype", arguments[0])
    elif kind in ("offset", "dim"):
        key = "data_offsets" if kind == "offset" else "shape"
        numbers = dict(entry).get(key) if all(isinstance(name, str) for name in names) else None
        if isinstance(numbers, list) and not isinstance(numbers, Pairs) and numbers:
            index = arguments[0] % len(numbers)
            if type(numbers[index]) is int:
                numbers[index] += arguments[1]


def file_with(edits: list[tuple], frame: tuple, header: Pairs, body: bytes) -> bytes:
    for change in edits:
        edited(header, change)
    length, before, behind, coding, cut = frame
    text = (before + rendered(header) + behind).encode(coding, "replace")
    body = body + b"\x07" * cut if cut >= 0 else body[:cut]
    return struct.pack("<Q", (len(text) + length) % 2**64) + text + body


STRICTER = re.compile(r" twice|not a JSON object|which torch has no name for|which no tensor has|surrogates")
"""Where this reader refuses what the library takes: for these reasons and no other."""


def bits(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, raw(tensor)


def by_the_library(file: Path) -> dict[str, tuple] | None:
    """What the safetensors library reads; None where it refuses."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: bits(handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118
    except Exception:  # noqa: BLE001 - whatever it says, it does not read this
        return None


def refused_or_right(file: Path, score: Score) -> None:
    score.tried += 1
    try:
        source = SafetensorsSource([str(file)], "the checkpoint")
        found = {name: bits(tensor) for name, tensor in source.read()}
    except SourceError as error:
        found, said = None, str(error)
    score.add(found is not None)
    if found is None:
        assert file.name in said
        assert by_the_library(file) is None or STRICTER.search(said), said
    else:
        assert found == by_the_library(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_damaged_headers(folder: Path, capsys: pytest.CaptureFixture) -> None:
    score, file = Score(), folder / "model.safetensors"

    @fuzz(HEADERS)
    @given(st.lists(edit, max_size=3), around)
    def run(edits: list[tuple], frame: tuple) -> None:
        file.write_bytes(file_with(edits, frame, *base()))
        refused_or_right(file, score)

    run()
    score.show("headers", HEADERS, capsys)


def test_damaged_bytes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Random files, random headers of the right length, and whole files with some bytes changed."""
    score, file = Score(), folder / "model.safetensors"
    whole = file_with([], (0, "", "", "utf-8", 0), *base())
    flips = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=3)
    spaces = st.lists(st.sampled_from(range(8, len(whole) - 30)), max_size=2)

    @fuzz(BYTES)
    @given(st.binary(max_size=64) | st.binary(max_size=64).map(bytearray) | flips | st.tuples(flips, spaces))
    def run(found: bytes | bytearray | list | tuple) -> None:
        if isinstance(found, bytearray):
            content = struct.pack("<Q", len(found)) + found
        elif isinstance(found, bytes):
            content = found
        else:
            changed, (changes, holes) = bytearray(whole), found if isinstance(found, tuple) else (found, [])
            for at, byte in changes:
                changed[at] = byte if at % 3 else changed[at] ^ 1  # often one digit or letter for the next
            for at in sorted(holes, reverse=True):
                changed[at : at + 1] = b" "
            content = bytes(changed)
        file.write_bytes(content)
        refused_or_right(file, score)

    run()
    score.show("bytes", BYTES, capsys)


# --- an index that says something else ---

SHARDS = {
    "model-1.safetensors": {"a": torch.arange(3), "b": torch.ones(2)},
    "model-2.safetensors": {"c": torch.zeros(1), "d": torch.full((2, 2), 5.0)},
}
INDEX = {name: file for file, tensors in SHARDS.items() for name in tensors}


def config() -> SimpleNamespace:
    from vllm.config.load import LoadConfig

    return SimpleNamespace(load_config=LoadConfig())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    for file, tensors in SHARDS.items():
        save_file(tensors, root / file)
    return root


names = st.sampled_from((*INDEX, "e", "")) | st.text(max_size=3)
targets = (
    st.sampled_from((*SHARDS, *SHARDS, "model-3.safetensors", "../x", "", ".", "x" * 5000, "\x00")) | junk
)
entries = st.one_of(
    st.tuples(st.just("put"), names, targets),
    st.tuples(st.just("drop"), st.sampled_from(list(INDEX)), st.none()),
    st.tuples(st.just("forget"), st.sampled_from(list(SHARDS)), st.none()),
    st.tuples(st.just("again"), st.sampled_from(list(INDEX)), targets),
)
frames = st.sampled_from(
    ("{'weight_map': X}",) * 9 + ("X", "[X]", "{'weights': X}", "X{'weight_map': X}", "\ufeffX")
)


def index_text(changes: list[tuple], frame: str) -> bytes:
    table = Pairs(INDEX.items())
    for kind, name, target in changes:
        if kind == "put":
            table[:] = [(n, t) for n, t in table if n != name] + [(name, target)]
        elif kind == "again":
            table.append((name, target))
        else:
            table[:] = [(n, t) for n, t in table if name not in (n, t)]
    return frame.replace("'", '"').replace("X", rendered(table)).encode("utf-8", "replace")


def right_table(text: bytes) -> dict[str, str] | None:
    """The table of an index that agrees with the files, or None."""
    try:
        table = json.loads(text)["weight_map"]
        listed = set(table.values())
        agrees = listed and table == {name: file for name, file in INDEX.items() if file in listed}
    except Exception:  # noqa: BLE001 - no index
        return None
    return table if agrees else None


def test_damaged_indices(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    score, index, settled = Score(), sharded / "model.safetensors.index.json", config()

    @fuzz(INDICES)
    @given(st.tuples(st.lists(entries, max_size=2), frames) | st.binary(max_size=30))
    def run(found: tuple | bytes) -> None:
        score.tried += 1
        text = found if isinstance(found, bytes) else index_text(*found)
        index.write_bytes(text)
        right = right_table(text)
        try:
            source = open_folder(str(sharded), settled, None, torch.nn.Module())
            read = {name: bits(tensor) for name, tensor in source.read()}
        except SourceError as error:
            read, said = None, str(error)
        score.add(read is not None)
        if read is None:
            assert right is None or " twice" in said, (text, said)
        else:
            assert right is not None, text
            assert read == {name: bits(SHARDS[file][name]) for name, file in right.items()}

    run()
    index.unlink()
    score.show("indices", INDICES, capsys)


# --- a config.json of anything ---

CONFIG = json.loads("""{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32, "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "bfloat16"}""")
deep = st.sampled_from(("[" * 400 + "]" * 400, '{"a":' * 400 + "1" + "}" * 400)).map(Raw)
settings_changed = st.dictionaries(
    st.sampled_from((*CONFIG, "use_cache", "head_dim", "quantization_config", "text_config"))
    | st.text(max_size=3),
    junk | deep,
    max_size=2,
)


def test_damaged_configs(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture) -> None:
    score, place = Score(), tmp_path_factory.mktemp("config")

    @fuzz(CONFIGS)
    @given(settings_changed | settings_changed | st.binary(max_size=30))
    def run(found: dict | bytes) -> None:
        score.tried += 1
        text = found if isinstance(found, bytes) else rendered(Pairs((CONFIG | found).items())).encode()
        (place / "config.json").write_bytes(text)
        try:
            check_config(str(place), None, CONFIG)
        except SourceError:
            score.add(read=False)
        else:
            score.add(read=True)
            assert json.loads(text)["vocab_size"] == CONFIG["vocab_size"]

    run()
    score.show("configs", CONFIGS, capsys)


# --- through a reload ---


def checkpoint(tensors: dict[str, torch.Tensor]) -> tuple[Pairs, bytes]:
    header, body = Pairs(), b""
    for name, tensor in tensors.items():
        end = len(body) + tensor.nbytes
        entry = [("dtype", "F32"), ("shape", list(tensor.shape)), ("data_offsets", [len(body), end])]
        header.append((name, Pairs(entry)))
        body += raw(tensor)
    return header, body


@pytest.fixture(scope="module")
def served() -> tuple:
    """A model that serves A, and what it looks like on A and on B."""
    model = cold(Model, A)
    return model, values(model), values(cold(Model, B)), identities(model)


def test_a_damaged_file_leaves_the_model_as_it_was(
    folder: Path, served: tuple, capsys: pytest.CaptureFixture
) -> None:
    model, on_a, on_b, places = served
    score, file = Score(), folder / "reload.safetensors"

    @fuzz(RELOADS)
    @given(st.lists(edit, max_size=2), around)
    def run(edits: list[tuple], frame: tuple) -> None:
        score.tried += 1
        file.write_bytes(file_with(edits, frame, *checkpoint(B)))
        try:
            reload_weights(model, weights_path=str(file))
        except ReloadError:
            score.add(read=False)
            assert values(model) == on_a
        else:
            score.add(read=True)
            found = by_the_library(file)
            assert found is not None
            if found == {name: bits(tensor) for name, tensor in B.items()}:
                assert values(model) == on_b
            reload_weights(model, iter(A.items()))
            assert values(model) == on_a
        assert identities(model) == places

    run()
    score.show("reloads", RELOADS, capsys)


def test_there_are_enough_inputs() -> None:
    assert sum((HEADERS, BYTES, INDICES, CONFIGS, RELOADS)) >= 10_000
