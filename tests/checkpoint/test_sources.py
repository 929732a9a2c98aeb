"""Safetensors files, whole and broken: the right tensors, or SourceError, and nothing else."""

import json
import os
import random
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reload_plugin.checkpoint import HostCopy, Overlay, held_open, open_folder
from reload_plugin.checkpoint.formats import safetensors_files
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.errors import SourceError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.uint32,
    torch.int32,
    torch.float32,
    torch.uint64,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
OPEN = Path("/proc/self/fd")
SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (2, 1, 4)]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, which is what a reader has to hand on whatever they mean."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=dtype)
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def bits_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    return tuple(tensor.shape), tensor.dtype, bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def everything(source: SafetensorsSource) -> dict[str, tuple]:
    return {name: bits_of(tensor) for name, tensor in source.read()}


def source_of(*files: Path) -> SafetensorsSource:
    return SafetensorsSource([str(file) for file in files], "the checkpoint")


SMALL = {
    "z.weight": filled((2, 3), torch.float32),
    "a": filled((), torch.bfloat16),
    "m": filled((0, 4), torch.int8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file with tensors of several kinds."""
    path = tmp_path / "model.safetensors"
    save_file(SMALL, path, {"format": "pt"})
    return path


# --- whole files ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": filled(shape, dtype, i) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = source_of(tmp_path / "model.safetensors")
    assert everything(source) == {name: bits_of(t) for name, t in tensors.items()}
    assert {(i.name, i.shape, i.dtype) for i in source.infos()} == {
        (name, tuple(t.shape), dtype) for name, t in tensors.items()
    }


def test_infos_come_before_any_byte_and_describe_what_is_read(file: Path) -> None:
    source = source_of(file)
    for info, (name, tensor) in zip(source.infos(), source.read(), strict=True):
        meta = info.meta()
        assert (info.name, meta.shape, meta.dtype) == (name, tensor.shape, tensor.dtype)
        assert meta.is_meta


def test_tensors_come_in_stored_order_file_by_file(tmp_path: Path) -> None:
    files = []
    for index in range(3):
        path = tmp_path / f"{index}.safetensors"
        write(path, {f"{name}{index}": torch.zeros(2) for name in "zamq"})
        files.append(path)
    expected = [f"{name}{index}" for index in (2, 0, 1) for name in "zamq"]
    source = source_of(files[2], files[0], files[1])
    assert [info.name for info in source.infos()] == expected
    assert [name for name, _ in source.read()] == expected


def test_tensors_come_in_the_order_that_is_asked_for(file: Path) -> None:
    source = source_of(file)
    order = ["m", "z.weight", "a"]
    assert [name for name, _ in source.read(order)] == order
    assert [bits_of(t) for _, t in source.read(order)] == [bits_of(SMALL[name]) for name in order]
    assert [name for name, _ in source.read(["a"])] == ["a"]


def test_a_source_can_be_read_twice_and_a_tensor_is_the_callers(file: Path) -> None:
    source = source_of(file)
    first = everything(source)
    for _, tensor in source.read():
        tensor.view(-1).view(torch.uint8).fill_(255)
    assert everything(source) == first


def open_files() -> set[str]:
    return {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def test_no_file_stays_open(file: Path) -> None:
    source = source_of(file)
    iterator = source.read()
    next(iterator)
    assert str(file) in open_files()
    iterator.close()
    assert str(file) not in open_files()
    everything(source)
    assert str(file) not in open_files()


# --- broken files ---


def test_a_file_that_is_cut_off_anywhere_is_refused_at_once(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            source_of(file)


def test_a_file_with_bytes_behind_the_last_tensor_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(SourceError):
        source_of(file)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 64, b"not a checkpoint", b"\2\0\0\0\0\0\0\0[]"]
)
def test_a_file_that_is_something_else_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(SourceError):
        source_of(file)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(SourceError, match=str(path)):
            source_of(path)


def write(path: Path, tensors: dict[str, torch.Tensor], **changes: object) -> None:
    """A safetensors file written by hand, with the header in the order of ``tensors``."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        raw = bits_of(tensor)[2]
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        } | changes
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_dtype_that_torch_cannot_name_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"weight": torch.zeros(2)}, dtype="F4", shape=[16])
    with pytest.raises(SourceError, match="F4"):
        source_of(path)


def test_a_name_in_two_files_is_refused_by_name(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    write(paths[0], {"a": torch.zeros(1), "both": torch.zeros(1)})
    write(paths[1], {"b": torch.zeros(1), "both": torch.zeros(1)})
    with pytest.raises(SourceError, match=r"both is in two files.*1\.safetensors.*2\.safetensors"):
        source_of(*paths)


def mutations(whole: bytes, count: int) -> Iterator[bytes]:
    """Versions of a file with one to three bytes of its header (or its length) changed."""
    chance = random.Random(3)
    (length,) = struct.unpack("<Q", whole[:8])
    likely = b'0123456789",:[]{}FIBU_\\'
    for _ in range(count):
        header, body = bytearray(whole[8 : 8 + length]), whole[8 + length :]
        for _ in range(chance.randint(1, 3)):
            at, byte = (
                chance.randrange(len(header)),
                chance.choice([chance.choice(likely), chance.randrange(256)]),
            )
            kind = chance.randrange(4)
            if kind == 0:
                header.insert(at, byte)
            elif kind == 1 and len(header) > 1:
                del header[at]
            else:
                header[at] = byte
        told = length if chance.random() < 0.2 else len(header)
        yield struct.pack("<Q", told) + bytes(header) + body


def by_the_library(path: Path) -> dict[str, tuple]:
    with safe_open(path, framework="pt") as handle:
        return {name: bits_of(handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118


def test_a_changed_header_is_refused_or_read_as_the_library_reads_it(file: Path) -> None:
    whole, refused, read = file.read_bytes(), 0, 0
    for changed in mutations(whole, 1500):
        file.write_bytes(changed)
        try:
            found = everything(source_of(file))
        except SourceError:
            refused += 1
        else:
            assert found == by_the_library(file)
            read += 1
    assert refused > 500
    assert read > 20


# --- files that change while they are read ---

MANY = {f"layer.{i:02}": filled((64,), torch.float32, i) for i in range(20)}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    save_file(MANY, path)
    return path


@pytest.mark.parametrize("after", [1, 10, 19])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(large: Path, after: int) -> None:
    source, size = source_of(large), large.stat().st_size
    iterator = source.read()
    for _ in range(after):
        next(iterator)
    os.truncate(large, size - 128)
    with pytest.raises(SourceError, match=r"large\.safetensors"):
        list(iterator)


def test_a_file_that_shrank_after_its_header_was_read_is_an_error(large: Path) -> None:
    source, size = source_of(large), large.stat().st_size
    for missing in range(1, size, 97):
        os.truncate(large, size - missing)
        with pytest.raises(SourceError):
            list(source.read())


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_file_that_is_replaced_while_it_is_read_is_an_error(
    large: Path, tmp_path: Path, after: int
) -> None:
    source = source_of(large)
    iterator = source.read()
    for _ in range(after):
        next(iterator)
    save_file({name: tensor + 1 for name, tensor in MANY.items()}, tmp_path / "next")
    (tmp_path / "next").replace(large)
    assert not source.unchanged()
    with pytest.raises(SourceError, match="changed while it was read"):
        list(iterator)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_at_the_same_path_is_read_by_its_own_header(tmp_path: Path, in_place: bool) -> None:
    """Whatever is remembered of headers: one of the same length, and then the first one again."""
    path, other = tmp_path / "model.safetensors", tmp_path / "new.safetensors"
    steps = [
        {"a": torch.arange(6.0), "b": torch.ones(2, 3)},
        {"a": torch.arange(6.0).flip(0), "b": torch.zeros(3, 2)},
        {"b": torch.arange(6.0), "a": torch.ones(2, 3)},
        {"a": torch.arange(6.0), "b": torch.ones(2, 3)},
    ]
    times, lengths = None, set()
    for tensors in steps:
        save_file(tensors, other)
        lengths.add(other.read_bytes()[:8])
        if in_place and path.exists():
            path.write_bytes(other.read_bytes())
        else:
            other.rename(path)
        times = times or path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert everything(source_of(path)) == {name: bits_of(tensor) for name, tensor in tensors.items()}
    assert len(lengths) == 1


def test_a_file_that_is_rewritten_in_place_is_an_error(large: Path) -> None:
    source, whole = source_of(large), large.read_bytes()
    iterator = source.read()
    next(iterator)
    stamp = large.stat()
    large.write_bytes(whole[:-4] + b"\1\2\3\4")
    os.utime(large, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(SourceError, match="changed while it was read"):
        list(iterator)


def test_a_file_that_goes_away_is_an_error(large: Path) -> None:
    source = source_of(large)
    assert source.unchanged()
    large.unlink()
    assert not source.unchanged()
    with pytest.raises(SourceError, match="could not be read"):
        list(source.read())


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_files_that_are_kept_open_are_read_whatever_becomes_of_their_names(
    large: Path, tmp_path: Path, replaced: bool
) -> None:
    layers = [source_of(large), source_of(large)]
    before, descriptors = everything(layers[0]), len(list(OPEN.iterdir()))
    with held_open(Overlay(HostCopy("an update"), *layers)):
        if replaced:
            save_file({name: tensor + 1 for name, tensor in MANY.items()}, tmp_path / "next")
            (tmp_path / "next").replace(large)
        else:
            large.unlink()
        shown = layers[-1]
        for _ in range(2):
            assert shown.unchanged()
            assert everything(shown) == before
        part = torch.empty(3, dtype=MANY["layer.00"].dtype)
        shown.read_spans("layer.00", [(1, 4)], part)
        assert torch.equal(part, MANY["layer.00"].flatten()[1:4])
    assert len(list(OPEN.iterdir())) == descriptors
    assert not shown.unchanged()


def test_files_that_are_rewritten_in_place_are_not_kept_by_being_open(large: Path) -> None:
    source = source_of(large)
    with held_open(source):
        stamp = large.stat()
        large.write_bytes(large.read_bytes()[:-4] + b"\1\2\3\4")
        os.utime(large, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
        assert not source.unchanged()
        with pytest.raises(SourceError, match="changed while it was read"):
            list(source.read())
    with pytest.raises(SourceError, match="changed"), held_open(source):
        pass


def test_more_files_than_a_process_may_open_are_not_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        save_file({f"t{number}": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    files = sorted(tmp_path.iterdir())
    source = source_of(*files)
    monkeypatch.setattr("resource.getrlimit", lambda _: (11, 11))
    with held_open(source):
        assert list(source.read())
        files[0].unlink()
        assert not source.unchanged(), "left to its name"


# --- folders ---


def open_path(path: Path) -> object:
    """What is wrong with these folders shows before any config or model is looked at."""
    return open_folder(str(path), None, None, torch.nn.Module())


def test_a_single_file_is_a_checkpoint(file: Path) -> None:
    source = open_path(file)
    assert everything(source) == {name: bits_of(t) for name, t in SMALL.items()}


def test_an_index_that_names_files_that_are_not_there_is_refused(file: Path) -> None:
    names = {"a": file.name, "b": "second.safetensors", "c": "third.safetensors"}
    index = file.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(SourceError, match=r"second\.safetensors and 1 more"):
        open_path(file.parent)


BROKEN_INDICES = [
    "",
    "{",
    "[]",
    "{}",
    "3",
    '{"weight_map": 3}',
    '{"weight_map": [1]}',
    '{"weight_map": {"a": []}}',
]


@pytest.mark.parametrize("text", BROKEN_INDICES)
def test_an_index_that_is_none_is_refused(file: Path, text: str) -> None:
    (file.parent / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="is not a safetensors index"):
        open_path(file.parent)


def test_an_index_in_another_encoding_is_refused(file: Path) -> None:
    (file.parent / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "a"}}')
    with pytest.raises(SourceError, match="is not a safetensors index"):
        open_path(file.parent)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nothing", "nothing", "a/b/c"])
def test_a_path_without_anything_is_refused(path: str) -> None:
    with pytest.raises(SourceError, match="There is no folder"):
        open_path(Path(path) if path != "./nothing" else path)


def test_the_last_headers_are_remembered_without_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "_layouts", OrderedDict())
    for number in range(safetensors_files.REMEMBERED + 3):
        save_file({f"weight.{number}": torch.ones(3)}, tmp_path / f"{number}.safetensors")
    first, second = (tmp_path / f"{number}.safetensors" for number in range(2))
    layout = safetensors_files.read_header(str(first)).layout
    assert safetensors_files.read_header(str(second)).layout is not layout
    assert safetensors_files.read_header(str(first)).layout is layout
    for path in tmp_path.iterdir():
        safetensors_files.read_header(str(path))
    held = safetensors_files._layouts
    assert len(held) == safetensors_files.REMEMBERED
    assert all(len(key) <= 32 for key in held), "the text of a header takes as much as what it says"
    monkeypatch.setattr(safetensors_files, "LONGEST_REMEMBERED", 8)
    held.clear()
    safetensors_files.read_header(str(first))
    assert not held
