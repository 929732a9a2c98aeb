"""Merge a LoRA adapter into a model whose weights are on disk, save it, push it into a running engine.

The base model is opened with its weights offloaded to disk. For the length of a block they are real tensors
in their modules, so that a merge is an edit in place; afterwards they are on disk again, merged. The save is
that of a model in memory merged in the same way, bit for bit, and so are the engine's answers.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import checkpoints
import engine

engine.prepare(plugin=True)

import torch  # noqa: E402 - after the environment is set
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

TARGETS = ("q_proj", "v_proj", "down_proj")
IN_MEMORY = ("model.embed_tokens", "model.rotary_emb", "lm_head")
ON_DISK = {**dict.fromkeys(IN_MEMORY, "cpu"), "model.layers": "disk", "model.norm": "disk"}


def write_adapter(model: torch.nn.Module, file: Path, rank: int) -> None:
    """Write a random adapter in PEFT's names: of each target `lora_A` [rank, in], `lora_B` [out, rank]."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            key = f"base_model.model.{name}"
            rows, columns = module.weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, file)


def merge(model: torch.nn.Module, adapter: dict[str, torch.Tensor], alpha: float) -> int:
    """Add `alpha / rank · B · A` to each target's weight, in place; returns how many there were."""
    merged = 0
    for name, module in model.named_modules():
        down = adapter.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            up = adapter[f"base_model.model.{name}.lora_B.weight"]
            with torch.no_grad():
                module.weight += (alpha / len(down) * (up @ down)).to(module.weight.dtype)
            merged += 1
    return merged


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=4, help="of the adapter")
    parser.add_argument("--output", type=Path, help="where to save to (default: a temporary folder)")
    options = parser.parse_args()
    from reload_plugin import materialized, save_offloaded, verify

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        output, file = options.output or Path(root) / "merged", Path(root) / "adapter.safetensors"
        base = checkpoints.write("dense", seed=1, folder=Path(root) / "base")
        in_memory = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        write_adapter(in_memory, file, options.rank)
        adapter = load_file(file)

        offloaded = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, device_map=ON_DISK, offload_folder=str(Path(root) / "offload")
        )
        on_disk = sum(weight.is_meta for weight in offloaded.parameters())
        with materialized(offloaded):
            merged = merge(offloaded, adapter, alpha=2.0)
        assert on_disk == sum(weight.is_meta for weight in offloaded.parameters())
        report = save_offloaded(offloaded, output, max_shard_size="50KB")
        print(
            f"{on_disk} weights on disk, {merged} of them merged; saved {report.nbytes:,} bytes to {output}"
        )

        merge(in_memory, adapter, alpha=2.0)
        in_memory.save_pretrained(Path(root) / "expected")
        saved, expected = weights_in(output), weights_in(Path(root) / "expected")
        same_bits = saved.keys() == expected.keys() and all(
            torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16))
            for name, tensor in saved.items()
        )
        with engine.engine(base) as llm:
            before = engine.answer(llm)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(output)})
            pushed = engine.answer(llm)
            assert verify(llm, output).serves
        with engine.engine(Path(root) / "expected") as llm:
            cold = engine.answer(llm)
    print(f"the save is the merge done in memory, bit for bit: {'yes' if same_bits else 'NO'}")
    print(f"the engine answers as one started on that merge: {'yes' if pushed == cold else 'NO'}")
    return int(not (same_bits and pushed == cold and pushed != before))


if __name__ == "__main__":
    sys.exit(main())
