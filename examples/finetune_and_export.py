"""Train a little, push into a running engine, export from the engine, start another one on the export.

The trainer keeps its weights in memory and writes no file: what is exported comes from the engine alone. It
is the trainer's weights bit for bit, and an engine started on it answers as the one that was exported.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import checkpoints
import engine

engine.prepare(plugin=True)

import torch  # noqa: E402 - after the environment is set
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402


def train(model: torch.nn.Module, steps: int) -> float:
    """Teach the model to repeat the token before; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        ids = torch.randint(1, 256, (8, 1), generator=generator).repeat(1, 16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--output", type=Path, help="where to export to (default: a temporary folder)")
    options = parser.parse_args()
    from reload_plugin import export_checkpoint, verify

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        output = options.output or Path(root) / "export"
        base = checkpoints.write("dense", seed=1, folder=Path(root) / "base")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        print(f"trained for {options.steps} steps, loss {train(model, options.steps):.3f}")
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        del weights["lm_head.weight"]  # tied to the embeddings
        with engine.engine(base) as llm:
            before = engine.answer(llm)
            llm.collective_rpc(lambda worker: worker.get_model().load_weights(list(weights.items())))
            served = engine.answer(llm)
            report = export_checkpoint(llm, output)
            assert verify(llm, output).serves
        print(f"exported {report.tensors} tensors, {report.nbytes:,} bytes, to {output}")
        written = {n: t for file in output.glob("*.safetensors") for n, t in load_file(file).items()}
        same_bits = written.keys() == weights.keys() and all(
            torch.equal(tensor.view(torch.int16), weights[name].view(torch.int16))
            for name, tensor in written.items()
        )
        with engine.engine(output) as llm:
            cold = engine.answer(llm)
    print(f"the export is the trainer's weights, bit for bit: {'yes' if same_bits else 'NO'}")
    print(f"an engine started on it answers the same: {'yes' if cold == served else 'NO'}")
    return int(not (same_bits and cold == served and served != before))


if __name__ == "__main__":
    sys.exit(main())
