"""Pictures of documents: small callables that decode when called, so that a benchmark need not be held in memory.

They can be pickled (a document may travel to another process), decode with the protections of ``vlmeff.pictures`` and
name the document in their errors, never a path outside the data folder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL.Image import Image

from vlmeff.errors import BadImageError, DataError
from vlmeff.pictures import MAX_PIXELS, decode_picture


@dataclass(frozen=True)
class FileImage:
    """A picture at ``relative`` below the folder ``root`` (resolved)."""

    root: Path
    relative: str
    doc_id: str
    max_pixels: int = MAX_PIXELS

    def __call__(self) -> Image:
        """Raises:
        DataError: the file has left the folder (E-DATA-05).  BadImageError: it is no usable picture (E-DATA-06)."""
        path = inside(self.root, self.relative, where=f"document {self.doc_id!r}")
        if not path.is_file():
            raise BadImageError(f"E-DATA-06: document {self.doc_id!r}: picture {self.relative!r} does not exist.")
        try:
            with path.open("rb") as file:
                return decode_picture(file, name=self.relative, max_pixels=self.max_pixels)
        except (DataError, OSError) as error:
            raise _bad(self.doc_id, error) from error


@dataclass(frozen=True)
class StoredImage:
    """A picture whose file is in memory, or in a table: ``read`` returns its bytes, None if there are none."""

    read: Callable[[], bytes | None]
    name: str
    doc_id: str
    max_pixels: int = MAX_PIXELS

    def __call__(self) -> Image:
        """Raises:
        BadImageError: there is no usable picture (E-DATA-06)."""
        data = self.read()
        if not data:
            raise BadImageError(f"E-DATA-06: document {self.doc_id!r}: picture {self.name!r} is empty or missing.")
        try:
            return decode_picture(io.BytesIO(data), name=self.name, max_pixels=self.max_pixels)
        except DataError as error:
            raise _bad(self.doc_id, error) from error


def _bad(doc_id: str, error: Exception) -> BadImageError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return BadImageError(f"E-DATA-06: document {doc_id!r}: {reason}")


def inside(root: Path, relative: str, *, where: str) -> Path:
    """The file that ``relative`` names below ``root`` (resolved), symbolic links followed; it need not exist.

    Raises:
        DataError: the path is absolute, has back slashes or a drive, or leads out of ``root`` (E-DATA-05).
    """
    posix = PurePosixPath(relative)
    if not relative or posix.is_absolute() or "\\" in relative or PureWindowsPath(relative).drive or "\0" in relative:
        raise DataError(
            f"E-DATA-05: {where}: image path {relative!r} must be relative to the benchmark's folder, with '/'."
        )
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(root):
        raise DataError(f"E-DATA-05: {where}: image path {relative!r} leads out of the benchmark's folder.")
    return path
