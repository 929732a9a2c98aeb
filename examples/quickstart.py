"""Reload a running engine from A to B and compare it with an engine that was started on B.

Three kinds of tiny random model, three processes: a cold start on B (the truth), vLLM's own reload, and this
package's. Both reloads are done from a folder and from an iterator, as a trainer would push its weights.
"""

import argparse
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import checkpoints
import engine
from rich.console import Console
from rich.table import Table


def ask_cold(folders: dict[str, dict[str, str]]) -> dict:
    """Answers of engines started on A and on B: kind -> side -> answer."""
    answers = {}
    for kind, folder in folders.items():
        answers[kind] = {}
        for side in "AB":
            with engine.engine(folder[side]) as llm:
                answers[kind][side] = engine.answer(llm)
    return answers


def ask_warm(folders: dict[str, dict[str, str]]) -> dict:
    """Answers of engines started on A and reloaded with B, from its folder and from an iterator."""
    answers = {}
    for kind, folder in folders.items():
        with engine.engine(folder["A"]) as llm:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder["B"]})
            from_folder = engine.answer(llm)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder["A"]})
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream(folder["B"])})
            answers[kind] = {"folder": from_folder, "iterator": engine.answer(llm)}
    return answers


def stream(folder: str):
    """The checkpoint in `folder` as (name, tensor), one tensor in memory at a time."""
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                yield name, file.get_tensor(name)


def work(warm: bool, folders: dict[str, dict[str, str]]) -> dict:
    """What a process that `in_child` started does."""
    return ask_warm(folders) if warm else ask_cold(folders)


def compare(kinds: list[str], console: Console) -> bool:
    """Print the answers of all engines; True if each reload by this package equals the cold start."""
    with tempfile.TemporaryDirectory() as root, console.status("writing checkpoints A and B") as status:
        folders = {
            kind: {
                side: str(checkpoints.write(kind, seed, Path(root) / f"{kind}-{side}"))
                for side, seed in (("A", 1), ("B", 2))
            }
            for kind in kinds
        }
        status.update("cold starts on A and B")
        cold = engine.in_child(__file__, {"warm": False, "folders": folders}, plugin=False)
        status.update("vLLM's own reload from A to B")
        theirs = engine.in_child(__file__, {"warm": True, "folders": folders}, plugin=False)
        status.update("this package's reload from A to B")
        ours = engine.in_child(__file__, {"warm": True, "folders": folders}, plugin=True)
    console.print(table(cold, theirs, ours))
    return all(ours[kind][source] == cold[kind]["B"] for kind in kinds for source in ("folder", "iterator"))


def table(cold: dict, theirs: dict, ours: dict) -> Table:
    """A table with one row for each engine, grouped by the kind of model."""
    result = Table(title="What the engine answers after a reload from A to B", title_justify="left")
    for column in ("model", "engine", "tokens", "logprob sum", "equals cold start on B"):
        result.add_column(column, no_wrap=column != "model")
    for kind, truth in cold.items():
        rows = {
            "cold start on A": truth["A"],
            "cold start on B": truth["B"],
            "vLLM's reload, folder": theirs[kind]["folder"],
            "vLLM's reload, iterator": theirs[kind]["iterator"],
            "reload_plugin, folder": ours[kind]["folder"],
            "reload_plugin, iterator": ours[kind]["iterator"],
        }
        for label, said in rows.items():
            result.add_row(
                checkpoints.KINDS[kind] if label == "cold start on A" else "",
                label,
                " ".join(map(str, said["tokens"][0])),
                f"{logprob_sum(said):.9f}",
                "" if label.startswith("cold") else verdict(said, truth["B"]),
            )
        result.add_section()
    return result


def logprob_sum(said: dict) -> float:
    """The sum of all logprobs of an answer, for display; `verdict` compares each of them."""
    return sum(logprob for prompt in said["logprobs"] for step in prompt for _, logprob in step)


def verdict(said: dict, truth: dict) -> str:
    """Whether every token and every logprob is equal, bit for bit."""
    if said == truth:
        return "[green]yes, bit for bit[/green]"
    what = "tokens" if said["tokens"] != truth["tokens"] else "logprobs"
    return f"[red]no: {what} differ[/red]"


def main() -> int:
    """Read the command line and compare; the exit status is 0 if every reload equals the cold start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(checkpoints.KINDS)}; all if none"
    )
    kinds = parser.parse_args().kinds or list(checkpoints.KINDS)
    if unknown := set(kinds) - set(checkpoints.KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not any(found.name == "reload_plugin" for found in entry_points(group="vllm.general_plugins")):
        sys.exit("reload_plugin is not installed here, so there is nothing to compare: pip install -e .")
    engine.prepare()
    console = Console(width=None if sys.stdout.isatty() else 120)
    same = compare(kinds, console)
    console.print(
        "reload_plugin: every reload equals the cold start, bit for bit."
        if same
        else "[red]reload_plugin: a reload differs from the cold start.[/red]"
    )
    return 0 if same else 1


if __name__ == "__main__":
    if not engine.as_child(work):
        sys.exit(main())
