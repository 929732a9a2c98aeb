"""Is what an engine exports the checkpoint that it serves? Byte for byte, or refused.

An engine is started on checkpoint A, reloaded to B by a road, and exported:

- `folder`: B as a folder that stays there;
- `iterator`: B as (name, tensor) pairs, so that nobody has its bytes but the engine;
- `gone`: the same, with the folders of A and B deleted;
- `kept`: the same, with `keep_load_format="host"`.

Every tensor of an export has to be B's, bit for bit, or the export is refused with an error that names every
tensor that is lost. An engine started on the export answers as the one that was exported. Then one element of
each tensor of B is changed in turn, and `verify` has to find it, and nothing else.

    python -m tests.exports llama mixtral  # run cases here and print what differs
    python -m tests.exports --table        # all of them, as a Markdown table
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import oracle  # before torch: it sets the environment that engines read

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip

from reload_plugin import ExportError, ExportReport, VerifyReport, export_checkpoint, verify
from reload_plugin.transaction.reload import reload_weights
from tests.checkpoints import Tensors, read_tensors
from tests.zoo import CASES, LLAMA, Case, case_named

PADDED = Case("padded_vocabulary", LLAMA | {"vocab_size": 250})
"""vLLM pads the vocabulary to 256 rows."""

NAMED = (
    *("llama", "llama_tied", "qwen2", "phi3", "mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "mamba2"),
    *("w8a8_dynamic", "w4a16", "online_linear"),
)
"""Those that are promised by name."""

ROADS = ("folder", "iterator", "gone", "kept")

Found = tuple[str, dict[str, str]]
"""How an export went, in a word or two, and every tensor that is not right -> why."""


def case_of(name: str) -> Case:
    return PADDED if name == PADDED.name else case_named(name)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _as_served(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """transformers 5.24 writes routers in float32, of which vLLM serves bfloat16."""
    rounded = name.endswith("mlp.gate.weight") and tensor.dtype == torch.float32
    return tensor.bfloat16().float() if rounded else tensor


def differing(got: Tensors, want: Tensors) -> dict[str, str]:
    """Every tensor that is not the same, bit for bit, under the same name."""
    found = dict.fromkeys(want.keys() - got.keys(), "missing")
    found |= dict.fromkeys(got.keys() - want.keys(), "not in the checkpoint")
    for name in got.keys() & want.keys():
        a, b = got[name], want[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found[name] = f"{a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}"
        elif not any(torch.equal(bits(a), bits(right)) for right in (b, _as_served(name, b))):
            found[name] = "other values"
    return found


def load(model: torch.nn.Module, road: str, folders: dict[str, Path], weights: Tensors) -> None:
    """Checkpoint B, by a road."""
    if road == "folder":
        reload_weights(model, weights_path=str(folders["B"]))
        return
    keep = {"keep_load_format": "host"} if road == "kept" else {}
    reload_weights(model, iter(weights.items()), **keep)
    if road in ("gone", "kept"):
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def exported(model: torch.nn.Module, place: Path, want: Tensors, **how: object) -> Found:
    """Export, and compare with what it has to be; a tensor that the model does not use may be left out."""
    try:
        report = export_checkpoint(model, place, **how)
    except ExportError as error:
        assert not place.exists(), "a refused export left something behind"
        return f"refused: {len(error.tensors)} of {len(want)} tensors", dict(error.tensors)
    found = differing(
        read_tensors(place), {name: t for name, t in want.items() if name not in report.omitted}
    )
    return described(report), found


def described(report: ExportReport) -> str:
    return ", ".join(f"{count} {tier}" for tier, count in sorted(Counter(report.tiers.values()).items()))


def with_an_element_changed(folder: Path, weights: Tensors, name: str) -> tuple[int, ...]:
    """Make the folder hold these weights but for one element of one tensor. Returns its index."""
    changed = dict(weights)
    changed[name] = changed[name].clone()
    flat = changed[name].view(-1)
    place = flat.numel() * 2 // 3
    if changed[name].is_floating_point():
        flat[place] = -flat[place] if flat[place] else 1
    else:
        flat[place] ^= 1
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in changed.items()}, folder / "model.safetensors")
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), weights[name].shape))


def judged(report: VerifyReport, name: str, index: tuple[int, ...]) -> str:
    """How `verify` found the one changed element: `element`, `name`, or `layer`, where it says of some
    tensors that it cannot tell which of them differ. Anything else is wrong.
    """
    if name in report.ignored:
        return "not served" if report.serves else f"{report.different}"
    if report.serves or report.layers:
        return f"serves {report.serves}, layers {sorted(report.layers)}"
    if not report.different and name in report.not_verifiable:
        return "layer"
    if report.different.keys() != {name} or report.not_verifiable:
        return f"different {sorted(report.different)}, not verifiable {sorted(report.not_verifiable)}"
    one = report.different[name]
    if one.elements is None:
        return "name"
    return "element" if (one.elements, one.first) == (1, index) else f"{one.elements} at {one.first}"


def verified(model: torch.nn.Module, copy: Path, weights: Tensors, names: list[str]) -> Found:
    """Verify the weights, then with one element of each of some tensors changed.

    Returns how many were found in which way, and tensor -> what `verify` said wrongly.
    """
    report = verify(model, copy)
    wrong = {} if report.serves else {"unchanged": f"{report.different} {report.not_verifiable}"}
    ways: Counter[str] = Counter()
    for name in names:
        index = with_an_element_changed(copy, weights, name)
        text = judged(verify(model, copy), name, index)
        if text in ("element", "name", "layer", "not served"):
            ways[text] += 1
        else:
            wrong[name] = text
    return "found: " + ", ".join(f"{count} {way}" for way, count in ways.most_common()), wrong


def one_of_each_kind(weights: Tensors) -> list[str]:
    """One tensor for each last two parts of a name."""
    kinds = {".".join(name.split(".")[-2:]): name for name in sorted(weights)}
    return sorted(kinds.values())


def run(
    case: Case, root: Path, roads: tuple[str, ...] = ROADS, every: bool = True
) -> Iterator[tuple[str, Found]]:
    """Each road, and `verify`, in a model without an engine around it."""
    folders = oracle.write(case, root)
    weights = read_tensors(folders["B"])
    copy = root / case.name / "copy"
    shutil.copytree(folders["B"], copy)
    with oracle.built(case, folders["A"]) as model:
        for road in roads:
            load(model, road, folders, weights)
            yield road, exported(model, root / case.name / f"out-{road}", weights)
        names = sorted(weights) if every else one_of_each_kind(weights)
        yield "verify", verified(model, copy, weights, names)


def cold_start(case: Case, root: Path) -> str:
    """An engine that was reloaded to B is exported and another one started on that. What differs from B's."""
    folders = oracle.write(case, root)
    place = root / case.name / "out-engine"
    weights = read_tensors(folders["B"])
    with oracle.running(case, folders["A"]) as llm:
        oracle.reload_from_stream(llm, folders["B"])
        served = oracle.answer(llm, case.pooling)
        try:
            export_checkpoint(llm, place)
        except ExportError:
            oracle.reload_from_folder(llm, folders["B"])
            export_checkpoint(llm, place)
    found = differing(read_tensors(place), weights)
    with oracle.running(case, place, load_format="auto") as llm:
        different = oracle.differing_answers(oracle.answer(llm, case.pooling), served)
    return "; ".join([*different, *(f"{name}: {why}" for name, why in found.items())])


def cell(found: Found) -> str:
    text, wrong = found
    if text.startswith("refused"):
        reasons = Counter(why.split(",")[0].split(" model.")[0][:60] for why in wrong.values())
        return f"{text} ({reasons.most_common(1)[0][0]})"
    if wrong:
        return f"**wrong**: {wrong}"
    return text if text.startswith("found") else f"exact: {text}"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.exports")
    parser.add_argument("cases", nargs="*", default=[*NAMED, PADDED.name])
    parser.add_argument("--table", action="store_true", help="as a Markdown table")
    parser.add_argument("--all", action="store_true", help="every case of the oracle")
    options = parser.parse_args(arguments)
    names = [case.name for case in CASES] if options.all else options.cases
    if options.table:
        print(f"| case | {' | '.join(ROADS)} | verify | cold start |\n|{'---|' * (len(ROADS) + 3)}")
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            found = dict(run(case_of(name), Path(temporary)))
        with tempfile.TemporaryDirectory() as temporary:
            cold = cold_start(case_of(name), Path(temporary)) or "equal"
        if options.table:
            print(f"| {name} | {' | '.join(map(cell, found.values()))} | {cold} |", flush=True)
            continue
        for road, (text, wrong) in found.items():
            print(f"{name}, {road}: {text}", *(f"\n    {tensor}: {why}" for tensor, why in wrong.items()))
        print(f"{name}, cold start: {cold}", flush=True)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
