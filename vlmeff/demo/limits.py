"""What visitors of the demo may send, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmeff.errors import DataError
from vlmeff.pictures import open_picture


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of files are Gradio's to refuse (``max_file_size``), at the upload."""

    max_file_mb: float = 10.0
    max_pixels: int = 20_000_000
    max_pictures: int = 8
    max_question_chars: int = 2000
    max_new_tokens: int = 512

    def check_count(self, pictures: int) -> None:
        if pictures > self.max_pictures:
            raise DataError(f"{pictures} pictures are too many; at most {self.max_pictures} fit one conversation.")

    def picture(self, path: str | None) -> Image.Image:
        """An RGB picture, upright, of an animation the first frame.

        Raises:
            DataError: there is none, it is broken or has too many pixels (looked up before it is decoded).
        """
        if not path:
            raise DataError("There is no picture yet: drop one, paste one or click an example.")
        try:
            return open_picture(Path(path), max_pixels=self.max_pixels)
        except DataError as error:  # its text names a path of the server
            text = str(error).replace(repr(str(path)), "that was sent").replace(str(path), "that was sent")
            raise DataError(text) from None

    def question(self, text: str | None) -> str:
        text = (text or "").strip()
        if not text:
            raise DataError("There is no question yet: type one or click an example.")
        if len(text) > self.max_question_chars:
            raise DataError(
                f"The question has {len(text)} characters, more than {self.max_question_chars}: shorten it."
            )
        return text
