"""State dicts in files of torch.save, one or many, as one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import SourceError
from ...plan.source import tensor_info
from ..file_source import FileSource
from ..io.locations import location_of
from ..pickle.state_dicts import weights_in
from ..pickle.values import StoredTensor
from .torch_files import TorchFile, read_torch_file


class TorchSource(FileSource):
    """The state dicts in ``files``, with optimizer states and the names of wrapping modules left out.

    Raises:
        SourceError: a file is damaged, its pickle names what it may not, there is no state dict or more than
            one, or two files hold one name.

    """

    def __init__(self, files: Sequence[str], description: str, within: str | None = None) -> None:
        super().__init__(description, "torch")
        for file in files:
            opened = read_torch_file(file)
            self.stamps[file] = opened.stamp
            for name, tensor in weights_in(opened.tree, StoredTensor, file, within).items():
                if name in self._locations:
                    other = self._locations[name].files[0]
                    raise SourceError(
                        f"{name} is in two files of one checkpoint, {other} and {file}. Give the file that "
                        "counts, or save the weights in one."
                    )
                self._add(name, tensor, opened)

    def _add(self, name: str, tensor: StoredTensor, opened: TorchFile) -> None:
        try:
            part, info = opened.part(tensor), tensor_info(name, tensor.shape, tensor.dtype)
        except ValueError as error:
            raise SourceError(
                f"{name} in {opened.file} is not whole: {error}. Write or copy the file again."
            ) from error
        self._locations[name] = location_of(info, part)
