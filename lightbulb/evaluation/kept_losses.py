"""What an ensemble's branches made of a text, on disk: an evaluation that was interrupted goes on branch by branch.

::

    OUT/token-losses/KEY.safetensors    "nats" [contexts, length] float32, of every label of the text

KEY hashes what the numbers depend on. The files stay when the ensemble has been evaluated, so that no branch reads the
text again for another temperature or other weights; those of other branches and texts go.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightbulb.data.config import DataError
from lightbulb.data_prep.step import digest
from lightbulb.folder import explained, sync_folder
from lightbulb.train.tensor_file import TensorFile, TensorFileError, sync_file, write_tensors

FOLDER = "token-losses"
NAME = "nats"


class KeptLosses:
    """Token losses by what they are losses of; the caller holds the folder's lock.

    Args:
        out: folder that the ensemble's result goes to.
    """

    def __init__(self, out: Path):
        self.folder = out / FOLDER
        self._used: set[Path] = set()

    def find(self, key: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
        """Losses that were kept under a key, ``[contexts, length]`` float32; None where there are none.

        Raises:
            DataError: the file is not what was written.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return TensorFile(path).read(NAME, shape)
        except TensorFileError as error:
            raise DataError(f"{error}; remove the file to have the branch read the text again") from None

    def keep(self, key: Mapping[str, Any], losses: Tensor) -> None:
        """Write losses under their key: whole, or not at all.

        Raises:
            FolderError: the folder cannot be written.
        """
        path = self._path(key)
        partial = path.with_suffix(".partial")
        with explained(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(partial, {NAME: losses})
            sync_file(partial)
            os.replace(partial, path)
            sync_folder(self.folder)

    def remove_others(self) -> None:
        """Remove what was neither found nor kept here."""
        with explained(self.folder):
            for path in set(self.folder.iterdir()) - self._used:
                path.unlink()

    def _path(self, key: Mapping[str, Any]) -> Path:
        path = self.folder / f"{digest(dict(key))}.safetensors"
        self._used.add(path)
        return path
