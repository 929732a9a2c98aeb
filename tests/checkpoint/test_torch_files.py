"""Files of torch.save, whole and broken: what torch reads, or SourceError; and nothing in them runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reload_plugin import open_source
from reload_plugin.checkpoint.io import reading
from reload_plugin.checkpoint.pickle.unpickling import unpickle
from reload_plugin.errors import SourceError

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path: Path, value: object, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tuple(tensor.shape), tensor.dtype, flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def read(path: Path, **how: object) -> dict[str, tuple]:
    return {name: bits(tensor) for name, tensor in open_source(path, **how)}


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Views, shared storage, strides and sizes of every kind."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
    base = raw.view(dtype).view(2, 3, 4)
    return {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "row": base[1],
        "column": base[:, :, 1],
        "steps": base[:, ::2, ::3],
        "expanded": base[:1].expand(5, 3, 4),
        "again": base.view(6, 4),
        "number": base[1, 2, 3].clone(),
        "of_many": base[1, 2, 3],
        "none": base[:0],
        "none_inside": torch.empty(3, 0, 2, dtype=dtype),
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
    }


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    tensors = layouts(dtype)
    found = read(saved(tmp_path / "model.pt", tensors, zipped))
    assert found == {name: bits(tensor) for name, tensor in tensors.items()}
    infos = open_source(tmp_path / "model.pt").infos()
    assert {i.name: (i.shape, i.dtype) for i in infos} == {n: b[:2] for n, b in found.items()}


shapes = st.lists(st.integers(0, 4), max_size=4)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_view_is_read_as_torch_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = torch.randn(data.draw(st.integers(30, 400))).to(
        data.draw(st.sampled_from([torch.float32, torch.int8]))
    )
    tensors = {}
    for name in "abc":
        shape = data.draw(shapes)
        strides = [data.draw(st.integers(0, 7)) for _ in shape]
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
        offset = data.draw(st.integers(0, 20))
        if 0 in shape or offset + max(reach, 0) < len(base):
            tensors[name] = base.as_strided(shape, strides, min(offset, len(base) - 1))
    if not tensors:
        return
    path = saved(tmp_path_factory.mktemp("views") / "x.pt", tensors, data.draw(st.booleans()))
    assert read(path) == {name: bits(t) for name, t in torch.load(path, weights_only=True).items()}


def test_a_large_view_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SCRATCH", 4096)
    base = torch.randn(300, 200)
    tensors = {"t": base.t(), "some": base[::7, 3:11], "one": base[:, 5]}
    assert read(saved(tmp_path / "x.pt", tensors)) == {name: bits(t) for name, t in tensors.items()}


# --- finding the state dict ---

W = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(2)}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}},
    "param_groups": [{"lr": 1.0}],
}


@pytest.mark.parametrize(
    "value",
    [
        W,
        OrderedDict(W),
        {"model": W},
        {"state_dict": W, "optimizer_states": [OPTIMIZER], "epoch": 3, "pytorch-lightning_version": "2.5"},
        {"model": W, "optimizer": OPTIMIZER, "step": 5, "rng_state": torch.ones(4), "args": None},
        {"module": {f"module.{n}": t for n, t in W.items()}},
        {"app": {"model": W, "optim": OPTIMIZER}},
        {f"_orig_mod.{n}": t for n, t in W.items()},
        {f"_fsdp_wrapped_module.{n.replace('.', '._checkpoint_wrapped_module.')}": t for n, t in W.items()},
        {f"module._orig_mod.{n}": t for n, t in W.items()} | {"steps": 3, "name": "x", "extra": None},
        {
            "model": W,
            "lr_scheduler": {"last_epoch": 2, "base": torch.ones(1)},
            "scaler": {"scale": torch.ones(1)},
        },
    ],
    ids=range(11),
)
@FORMS
def test_the_state_dict_is_found(tmp_path: Path, value: object, zipped: bool) -> None:
    assert read(saved(tmp_path / "x.pt", value, zipped)) == {name: bits(t) for name, t in W.items()}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            {"model": W, "ema": dict(W)},
            r"more than one set of weights: model \(2 tensors\), ema \(2 tensors\)",
        ),
        ({"actor": {"model": W}, "critic": {"model": dict(W)}}, r"actor\.model \(2 tensors\), critic\.model"),
        (W | {"teacher": W}, r"the top level \(2 tensors\), teacher \(2 tensors\)"),
        (OPTIMIZER, "holds no weights"),
        ({}, "holds no weights"),
        ([W], "holds no weights"),
        (torch.ones(3), "holds no weights"),
        ({"step": 3}, "holds no weights"),
        ({"module.w": torch.ones(1), "w": torch.zeros(1)}, r"module\.w and w, which are both w"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "flattened into one.*SHARDED_STATE_DICT"),
    ],
    ids=range(10),
)
def test_what_is_ambiguous_or_no_model_is_refused(tmp_path: Path, value: object, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        open_source(saved(tmp_path / "x.pt", value))


def test_one_of_several_state_dicts_can_be_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"model": W, "ema": {"shadow": {"a": torch.ones(3)}}})
    assert read(path, within="ema.shadow") == {"a": bits(torch.ones(3))}
    assert set(read(path, within="model")) == set(W)
    with pytest.raises(
        SourceError, match=r"no weights under 'other'. It holds model \(2 tensors\), ema\.shadow"
    ):
        open_source(path, within="other")


def test_two_names_of_one_tensor_are_one(tmp_path: Path) -> None:
    shared = torch.ones(3)
    path = saved(tmp_path / "x.pt", {"module.w": shared, "w": shared})
    assert read(path) == {"w": bits(shared)}


# --- pickles that would run something ---

MARK = "RELOAD_PLUGIN_TEST_RAN"


class Command:
    """Runs when it is unpickled."""

    def __init__(self, make: Callable[[Path], tuple], where: Path) -> None:
        self.made = make(where)

    def __reduce__(self) -> tuple:
        return self.made


def run_by_eval(where: Path) -> tuple:
    return eval, (f"open({str(where)!r}, 'w')",)


ATTACKS: list[Callable[[Path], tuple]] = [
    lambda where: (os.system, (f"touch {where}",)),
    run_by_eval,
    lambda _: (getattr, (Path, "cwd")),
    lambda _: (__import__, ("os",)),
    lambda where: (torch.load, (str(where),)),
    lambda where: (Path.touch, (where,)),
    lambda where: (torch.hub.load, (str(where), "x")),
]


@FORMS
@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
@pytest.mark.parametrize("beside", [{}, W], ids=["alone", "beside weights"])
def test_a_pickle_that_would_run_a_command_does_not(
    tmp_path: Path, attack: Callable[[Path], tuple], zipped: bool, beside: dict
) -> None:
    where = tmp_path / "ran"
    with pytest.raises((SourceError, pickle.PicklingError, TypeError)) as caught:
        open_source(saved(tmp_path / "x.pt", beside | {"evil": Command(attack, where)}, zipped))
    assert not where.exists()
    if isinstance(caught.value, SourceError):
        assert "could run code" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch x'\ntR.",
        b"(S'touch x'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07touch x\x85R.",
        b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00x\x86R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00}X\x0b\x00\x00\x00__globals__}sb.",
        b"\x80\x02ccollections\nOrderedDict\n(lq\x00h\x00b.",
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x97.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"\x80\x02r\xff\xff\xff\xffN.",
        b"\x80\x02}" + b"(" * 10 + b"ttttttttttNs.",
        b"\x80\x02(" + b"\x85" * 5000 + b".",
        b"\x80\x02U\x01xQ.",
        b"",
    ],
    ids=range(14),
)
def test_operations_of_a_pickle_that_are_not_needed_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpickle(data)


def test_keys_that_would_take_for_ever_are_refused() -> None:
    """Hashing a tuple of (t, t) of (t, t) ... doubles with each level."""
    data = b"\x80\x02}N" + b"".join(b"2\x86" for _ in range(200)) + b"Ns."
    with pytest.raises(ValueError, match="keys that are no names"):
        unpickle(data)


# --- damaged files ---


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def archived(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def test_an_archive_written_by_another_tool_is_read(tmp_path: Path) -> None:
    path = archived(tmp_path / "y.pt", records(saved(tmp_path / "x.pt", W)))
    assert read(path) == {name: bits(t) for name, t in W.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c | {"x/byteorder": b"big"}, "another byte order"),
        (lambda c: {n: d for n, d in c.items() if n != "x/data.pkl"}, r"no data\.pkl"),
        (lambda c: c | {"y/data.pkl": b""}, r"no data\.pkl"),
        (lambda c: c | {"x/constants.pkl": b""}, "TorchScript"),
        (lambda c: {n: d for n, d in c.items() if n != "x/data/1"}, r"storage 1 are not all there"),
        (lambda c: c | {"x/data/0": c["x/data/0"][:-1]}, r"storage 0 are not all there"),
        (lambda c: c | {"x/data.pkl": c["x/data.pkl"][:-9]}, "pickle is damaged"),
        (
            lambda c: c | {"x/data.pkl": c["x/data.pkl"].replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")},
            "beyond the end",
        ),
        (
            lambda c: c | {"x/data.pkl": c["x/data.pkl"].replace(b"FloatStorage", b"RoughStorage")},
            "could run code",
        ),
    ],
    ids=range(9),
)
def test_an_archive_that_is_not_whole_is_refused(tmp_path: Path, change: Callable, says: str) -> None:
    content = records(saved(tmp_path / "x.pt", W))
    with pytest.raises(SourceError, match=says):
        open_source(archived(tmp_path / "y.pt", change(content)))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    content = records(saved(tmp_path / "x.pt", W))
    with pytest.raises(SourceError, match="compressed"):
        open_source(archived(tmp_path / "y.pt", content, zipfile.ZIP_DEFLATED))


@FORMS
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "x.pt", W, zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"x\.pt"):
            open_source(path)


def test_sparse_quantized_and_meta_tensors_are_refused(tmp_path: Path) -> None:
    odd = [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.empty(2, device="meta"),
        torch.ones(2, dtype=torch.complex64).conj(),
    ]
    for tensor in odd:
        with pytest.raises(SourceError, match=r"x\.pt"):
            open_source(saved(tmp_path / "x.pt", {"w": tensor}))


@FORMS
def test_a_shape_that_no_tensor_has_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.empty(0, 3, 5)}, zipped)
    whole = path.read_bytes()
    start = whole.index(b"K\x00K\x03K\x05\x87")
    huge = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    data = whole[:start] + b"K\x00" + huge * 2 + b"\x87" + whole[start + 7 :]
    if zipped:
        content = records(path)
        name = next(n for n in content if n.endswith("data.pkl"))
        content[name] = content[name].replace(whole[start : start + 7], b"K\x00" + huge * 2 + b"\x87")
        archived(path, content)
    else:
        path.write_bytes(data)
    with pytest.raises(SourceError, match="which no tensor has"):
        open_source(path)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {f"w{i}": torch.randn(64) for i in range(20)})
    source = open_source(path)
    iterator = iter(source)
    next(iterator)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SourceError, match=r"changed while it was read|was cut"):
        list(iterator)
    assert not source.unchanged()


# --- folders ---


def test_an_index_names_the_files(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": torch.ones(1)})
    saved(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": torch.ones(2)})
    assert set(read(tmp_path)) == {"a", "b"}
    index = tmp_path / "pytorch_model.bin.index.json"
    table = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00003.bin"}
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(SourceError, match=r"names pytorch_model-00002-of-00003\.bin that are not there"):
        open_source(tmp_path)
    index.unlink()
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(SourceError, match="lacks file 1 of the 2 of pytorch_model"):
        open_source(tmp_path)


def test_several_files_of_weights_are_a_question(tmp_path: Path) -> None:
    for name in ("step1.pt", "step2.pt", "optimizer.pt", "training_args.bin"):
        saved(tmp_path / name, W)
    with pytest.raises(SourceError, match=r"several files of weights: step1\.pt, step2\.pt\. Give the one"):
        open_source(tmp_path)
    assert set(read(tmp_path / "step2.pt")) == set(W)


# --- damaged at random ---

FUZZED = 2500


@FORMS
def test_damaged_bytes(tmp_path: Path, zipped: bool) -> None:
    """Refused, or read as torch reads it."""
    whole = saved(tmp_path / "whole.pt", {"model": layouts(torch.float32), "step": 3}, zipped).read_bytes()
    path, generator = tmp_path / "x.pt", torch.Generator().manual_seed(5)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    refused = right = 0
    said: set[bool] = set()
    for _ in range(FUZZED):
        data = bytearray(whole)
        for _ in range(1 + number(3)):
            data[number(len(data))] = number(256) if number(2) else data[number(len(data))]
        if not number(10):
            del data[number(len(data)) :]
        path.write_bytes(data)
        try:
            found = read(path)
        except SourceError as error:
            refused += 1
            said.add("x.pt" in str(error))
            continue
        right += 1
        theirs = by_torch(path)
        if theirs is not None:
            assert found == theirs
    assert said == {True}
    assert refused > FUZZED // 20
    assert right > FUZZED // 20


def by_torch(path: Path) -> dict[str, tuple] | None:
    try:
        loaded = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        weights = loaded["model"]
        return {name: bits(tensor) for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    except Exception:  # noqa: BLE001 - whatever it says, it does not read this
        return None


def test_text_in_base64_is_refused(tmp_path: Path) -> None:
    import base64

    for inside in (
        pickle.dumps(W),
        saved(tmp_path / "x.pt", W).read_bytes(),
        struct.pack("<Q", 2) + b"{}" + b" " * 30,
    ):
        for name in ("model.safetensors", "model.txt", "model.pt"):
            (tmp_path / name).write_bytes(base64.b64encode(inside))
            with pytest.raises(SourceError, match=r"in base64.*base64 -d .*weights_iterator"):
                open_source(tmp_path / name)
            (tmp_path / name).unlink()
