"""Make `.venv` and run an example or a benchmark: `python3 examples/run.py [SCRIPT [ARGUMENT ...]]`.

`--with EXTRA` before the script makes `.venv-EXTRA`, which has that extra of the package too, and runs it
there. The default script is the quickstart. Needs a Python from 3.11 to 3.14 and an index for pip.
"""

import os
import sys

if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit(f"vLLM 0.32 needs a Python from 3.11 to 3.14; this is {sys.version.split()[0]}.")

import environment


def main(arguments: list[str]) -> None:
    """Replace this process by the script, run by the interpreter of `.venv`."""
    extra = arguments[1] if arguments[:1] == ["--with"] and len(arguments) > 1 else None
    script, *rest = arguments[2 if extra else 0 :] or ["quickstart.py"]
    path = environment.ROOT / script
    if not path.exists():
        path = environment.ROOT / "examples" / script
    if not path.exists():
        sys.exit(f"There is no {script} here. Name a file of examples/, or a path: benchmarks/reload.py.")
    try:
        python = environment.ready_with(extra) if extra else environment.ready()
    except environment.SetupError as error:
        sys.exit(f"set-up failed: {error}")
    os.execv(python, [str(python), str(path), *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
