"""The example of one trainer and two engines, as a user runs it, over gloo and through a folder.

    python -m tests.many_engines

Takes some minutes. Prints what the example prints, and `right` at the end if every line says what it should.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "many_engines.py"
CHECKS = {(): 10, ("--folder",): 5}
"""Arguments -> lines that say yes."""


def main() -> None:
    """See the module's docstring."""
    for arguments, wanted in CHECKS.items():
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            env=os.environ,
            cwd="/",  # wherever a user stands
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, flush=True)
        said = [line.rpartition(": ")[2] for line in done.stdout.splitlines()]
        assert done.returncode == 0, f"exit code {done.returncode}"
        assert said.count("yes") == wanted, f"{said.count('yes')} lines say yes, and not {wanted}"
        assert "NO" not in said
    print("right")


if __name__ == "__main__":
    main()
