"""The digest of what is served: which changes it sees, and that it is the same wherever it should be."""

import pytest
import torch

from reload_plugin import vllm_api
from reload_plugin.device import cpu
from reload_plugin.device.hashing import Hash
from reload_plugin.device.value_hashes import _CHUNK, device_sums
from reload_plugin.digest.digest import digest_of
from reload_plugin.process import native_handles as native
from reload_plugin.process.native_handles import watching_native
from reload_plugin.record.recorder import finish_record, observe, record_constructed


def hashed(tensor: torch.Tensor) -> str:
    total = Hash()
    total.add_tensor(tensor)
    return total.digest().hex()


BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)


@pytest.mark.parametrize(
    "other",
    [
        BASE.reshape(6, 4),
        BASE.t().contiguous().t(),
        BASE.to(torch.float64),
        BASE.view(torch.int32),
        BASE + torch.eye(4, 6) * 1e-6,
        BASE.flip(0),
        BASE[:, :5],
    ],
    ids=["shape", "strides", "dtype", "same bits", "one bit", "order", "part"],
)
def test_hash_sees_bits_order_shape_strides_and_dtype(other: torch.Tensor) -> None:
    assert hashed(other) != hashed(BASE)


LAYOUTS = {
    "pieces": lambda base: base[:, ::2],
    "transposed": lambda base: base.t(),
    "expanded": lambda base: base.expand(3, 4, 6),
    "scalar": lambda base: base[0, 0] > 0,
    "fp8": lambda base: base.to(torch.float8_e4m3fn),
    "conjugate": lambda base: torch.complex(base, base).conj(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_hashed_by_its_values(layout: str) -> None:
    make = LAYOUTS[layout]
    changed = BASE.clone()
    changed[0, 0] = 7
    assert hashed(make(BASE)) == hashed(make(BASE.clone()))
    assert hashed(make(BASE)) != hashed(make(changed))


def test_a_matrix_that_a_kernel_took_transposed_is_hashed_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = hashed(BASE.t())
    monkeypatch.setattr(cpu, "contiguous_parts", None)
    assert hashed(BASE.t()) == expected != hashed(BASE.t().clone(memory_format=torch.contiguous_format))
    with pytest.raises(TypeError):
        hashed(BASE[:, ::2])


def test_a_tensor_without_values_is_hashed_by_what_it_says_of_itself() -> None:
    freed = torch.zeros(1024, 1024)
    freed.untyped_storage().resize_(0)  # as processing does with weights that it has packed
    assert hashed(freed) == hashed(freed)
    for without in (torch.zeros(0, 3), torch.zeros(2, 3, device="meta")):
        assert hashed(without) == hashed(without.clone())
        assert hashed(without) != hashed(without.to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.int64, torch.float8_e5m2])
def test_sums_of_a_device_see_one_word_and_two_that_change_places(dtype: torch.dtype) -> None:
    count = 40 * _CHUNK * 8 // dtype.itemsize + 5  # more than one chunk, and no whole number of words
    tensor = (torch.arange(count) % 120).to(dtype)
    before = device_sums(tensor)
    assert torch.equal(before, device_sums(tensor.clone()))
    changed = tensor.clone()
    changed[-1] = changed[0]
    assert not torch.equal(before, device_sums(changed))
    words = 16  # elements: further apart than any word is wide
    changed = tensor.clone()
    changed[:words], changed[words : 2 * words] = tensor[words : 2 * words], tensor[:words]
    assert not torch.equal(before, device_sums(changed))


def test_sums_of_a_device_do_not_depend_on_where_a_tensor_begins() -> None:
    values = (torch.arange(1 << 12) % 120).to(torch.int8)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int8), values])[1:]
    assert shifted.data_ptr() % 8
    assert torch.equal(device_sums(values), device_sums(shifted))


class Packed(torch.nn.Module):
    """A layer whose processing hands its weight to oneDNN and keeps a handle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32, 32))  # not every processor multiplies bf16

    def process(self) -> None:
        from vllm._custom_ops import create_onednn_mm

        self.handler = create_onednn_mm(self.weight.t(), 32)
        self.weight = torch.nn.Parameter(torch.empty(0))


def packed(value: float, hashes: bool = True, watched: bool = True) -> str | None:
    pytest.importorskip("vllm._custom_ops")
    layer = Packed()
    layer.weight.data[3, 5] = value
    record = record_constructed(layer, None, None)
    loaded, handles = observe(record), {}
    if not vllm_api.native_constructors():
        pytest.skip("this build of vLLM has no native constructors")
    with watching_native(torch.device("cpu" if watched else "meta"), handles, hashes):
        layer.process()
    record = finish_record(layer, record, loaded, None, None, torch.device("cpu"))
    return digest_of(record, handles)


def test_what_a_native_handle_was_made_of_is_in_the_digest() -> None:
    assert packed(2) == packed(2)
    assert packed(2) != packed(3)


def test_a_handle_nobody_hashed_leaves_no_digest() -> None:
    assert packed(2, hashes=False) is None
    assert packed(2, watched=False) is None


def test_what_a_constructor_refuses_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bf16 refuses every weight, and vLLM goes on without a handle."""

    class Library:
        @staticmethod
        def make(_: torch.Tensor) -> int:
            raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(vllm_api, "native_constructors", lambda: [(Library, "make", None)])
    monkeypatch.setattr(native, "_digest_of", lambda _: pytest.fail("hashed in vain"))
    handles: native.Handles = {}
    with watching_native(torch.device("cpu"), handles), pytest.raises(RuntimeError, match="primitive"):
        Library.make(torch.ones(3))
    assert not handles


def test_a_handle_whose_arguments_cannot_be_hashed_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def make(_: torch.Tensor) -> int:
            return 7

    def no_memory(_: object) -> bytes:
        raise MemoryError

    released: list[tuple[str, int]] = []
    monkeypatch.setattr(vllm_api, "native_constructors", lambda: [(Library, "make", None)])
    monkeypatch.setattr(vllm_api, "release_native", lambda *what: released.append(what))
    monkeypatch.setattr(native, "_digest_of", no_memory)
    handles: native.Handles = {}
    with watching_native(torch.device("cpu"), handles), pytest.raises(MemoryError):
        Library.make(torch.ones(3))
    assert released == [("make", 7)]
    assert not handles
