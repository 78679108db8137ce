"""What visitors of the demo may send, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmeff.errors import DataError
from vlmeff.pictures import decode_picture

MIB = 2**20  # what Gradio calls a megabyte
NO_PICTURE = "There is no picture yet: drop one, paste one or click an example."
NO_QUESTION = "There is no question yet: type one or click an example."


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not, for example, EPS, which starts Ghostscript


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of files are refused twice: by Gradio at the upload (``max_file_size``) and here, because a client may
    also put a picture into its request instead of uploading it."""

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
            DataError: there is none, its file is too large, it is broken or has too many pixels (looked up before it
                is decoded).
        """
        if not path:
            raise DataError(NO_PICTURE)
        file = Path(path)
        if file.is_file() and file.stat().st_size > self.max_file_mb * MIB:
            raise DataError(f"The picture's file is larger than {self.max_file_mb:g} MB: make it smaller.")
        try:
            return decode_picture(file, name=str(file), max_pixels=self.max_pixels, formats=FORMATS)
        except DataError as error:  # its text names a path of the server
            text = str(error).replace(repr(str(path)), "that was sent").replace(str(path), "that was sent")
            raise DataError(text[:1].upper() + text[1:]) from None

    def question(self, text: str | None) -> str:
        text = (text or "").strip()
        if not text:
            raise DataError(NO_QUESTION)
        if len(text) > self.max_question_chars:
            raise DataError(
                f"The question has {len(text)} characters, more than {self.max_question_chars}: shorten it."
            )
        return text
