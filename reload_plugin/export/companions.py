"""Files beside the weights of a transformers model: config, generation config, code, tokenizer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names that Hugging Face's tokenizers and processors save to."""


def write_companions(model: Any, folder: Path) -> None:
    """Write what ``from_pretrained`` needs beside the weights, as ``save_pretrained`` would; the model stays
    as it is.

    Args:
        model: a ``PreTrainedModel``. Its tokenizer is taken from where the model was loaded from.
        folder: the new folder.

    Raises:
        OSError: writing failed.

    """
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    for file in _tokenizer_files(str(getattr(model, "name_or_path", "") or "")):
        shutil.copyfile(file, folder / file.name)


def _tokenizer_files(origin: str) -> list[Path]:
    """Files of the tokenizer in the folder, or the local copy of the repository, that a model came from."""
    if not origin:
        return []
    if Path(origin).is_dir():
        found = [Path(origin, name) for name in TOKENIZER_FILES]
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = [try_to_load_from_cache(origin, name) for name in TOKENIZER_FILES]
        except HFValidationError:  # the name of a file, or none at all
            return []
        found = [Path(path) for path in cached if isinstance(path, str)]
    return [path for path in found if path.is_file()]
