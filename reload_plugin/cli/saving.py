"""Opens a folder with transformers, all weights on disk, and saves it anew."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from ..export.offloaded import save_offloaded
from ..report import ExportReport
from .show import CommandError, waiting


def save(
    src: Path,
    dst: Path,
    max_shard_size: str,
    own_format: bool,
    scratch: Path | None,
    trust_remote_code: bool,
) -> ExportReport:
    """Save the model of ``src`` at ``dst``.

    Args:
        src: folder with a config and weights.
        dst: folder to write; see ``save_offloaded``.
        max_shard_size: largest file.
        own_format: write names and shapes of transformers' modules.
        scratch: where weights go that transformers converts while it opens them; None for beside ``dst``.
        trust_remote_code: run code that lies in ``src``.

    Raises:
        CommandError: transformers is missing, or cannot open ``src``.
        ExportError: it cannot be saved.

    """
    if not src.is_dir():
        raise CommandError(f"There is no folder {src}.", "Give the folder of a model.")
    beside = scratch or next(folder for folder in dst.absolute().parents if folder.exists())
    if not beside.is_dir():
        raise CommandError(f"There is no folder {beside}.", "Make it, or give another with --scratch.")
    try:
        place = tempfile.TemporaryDirectory(dir=beside, prefix=".reload-plugin-offloaded-")
    except OSError as error:
        raise CommandError(
            f"{beside} cannot be written ({error}).", "Give a folder with --scratch."
        ) from error
    with place as folder:
        with waiting(f"opening {src.name}"):
            model = _opened(src, Path(folder), trust_remote_code)
        return save_offloaded(model, dst, max_shard_size=max_shard_size, save_original_format=not own_format)


def _opened(src: Path, scratch: Path, trust_remote_code: bool) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CommandError(
            f"transformers cannot be imported ({error}).", "Install transformers and accelerate."
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"device_map": {"": "disk"}, "offload_folder": str(scratch), "dtype": "auto"}
    code = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(src, **code)
            names = [name for name in config.architectures or () if hasattr(transformers, name)]
            model = getattr(transformers, names[0] if names else "AutoModel")
            return model.from_pretrained(src, **options, **({} if names else code))
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CommandError(
                f"transformers cannot open {src}: {error}.", "Give a folder with config.json and weights."
            ) from error
