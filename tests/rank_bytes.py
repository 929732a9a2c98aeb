"""Bytes of a checkpoint's files that each of two ranks reads, by its report and by the kernel's count.

    python -m tests.rank_bytes FOLDER [CASE ...]     # prints a Markdown table

The models are small but as wide as real ones, since columns are read run by run where these are long. Every
rank has to serve the same as an engine that was started on the checkpoint.
"""

import os
import sys
from pathlib import Path

from tests import two_ranks, zoo
from tests.zoo import Case

WIDE = zoo.LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}
EXPERTS = zoo.MIXTRAL | {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
CASES = {
    "tensor 2, dense": (Case("wide", WIDE), 0.55),
    "pipeline 2, dense": (Case("wide_stages", WIDE, engine_kwargs={"pipeline_parallel_size": 2}), 0.6),
    "expert 2, mixtral": (Case("wide_experts", EXPERTS, engine_kwargs={"enable_expert_parallel": True}), 0.6),
}
"""What is run -> the model, and the part of the files that a rank may read."""


def read_by(worker: object, folder: str) -> tuple[int, int, int, float]:
    """Reload on one rank: bytes of the tensors, bytes read by its report, by the kernel, and seconds."""
    import reload_plugin

    def kernels_count() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = kernels_count()
    report = reload_plugin.reload_weights(worker.get_model(), weights_path=folder)
    return report.nbytes, report.bytes_read, kernels_count() - before, report.seconds["total"]


def check(name: str, root: Path) -> list[str]:
    """Reload B twice, the second time with what the first one taught; a row for each rank."""
    case, most = CASES[name]
    answers = "enable_expert_parallel" not in case.engine_kwargs
    rows = []
    with two_ranks.engine_of(case, root, answers) as engine:
        for letter in "BAB":
            found = engine.llm.collective_rpc(read_by, args=(engine.folders[letter],))
            engine.assert_is(letter)
        for rank, (nbytes, read, kernel, seconds) in enumerate(found):
            rows.append(
                f"| {name} | {rank} | {nbytes:,} | {read:,} | {read / nbytes:.3f} | {kernel / nbytes:.3f} "
                f"| {most} | {seconds:.2f} |"
            )
            print(rows[-1], flush=True)
            assert read <= most * nbytes, rows[-1]
            assert kernel <= most * nbytes, rows[-1]
    return rows


def main() -> None:
    """See the module's docstring."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    print("| parallelism, model | rank | bytes of the tensors | read | part | by rchar | at most | seconds |")
    print("|---" * 8 + "|")
    for name in sys.argv[2:] or CASES:
        check(name, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
