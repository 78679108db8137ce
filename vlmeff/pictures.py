"""Open picture files safely."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmeff.errors import DataError

MAX_PIXELS = 50_000_000
# What Pillow's readers raise on damaged files, besides errors of their own.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, NotImplementedError, struct.error)


def open_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, turned as its EXIF data says, transparency on white.

    Raises:
        DataError: the file is missing, is no picture, is broken or has more than ``max_pixels`` pixels (checked before
            it is decoded).
    """
    if not path.is_file():
        raise DataError(f"picture {str(path)!r} does not exist or is no file.")
    return decode_picture(path, name=str(path), max_pixels=max_pixels)


def decode_picture(
    source: Path | BinaryIO, *, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """``open_picture`` of an open file or bytes in memory; messages call it ``name``. ``formats``: of Pillow's readers
    those that may look at it (some start other programs); None: all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise DataError(
                        f"picture {name!r} has {width} x {height} pixels, more than {max_pixels}: make it smaller."
                    )
                picture.load()
                upright = ImageOps.exif_transpose(picture)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # whose own text names the whole path, or the address of a buffer
        raise DataError(f"picture {name!r} cannot be decoded (no known format); convert it to PNG or JPEG.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
        raise DataError(f"picture {name!r} has more than {most} pixels: make it smaller.") from error
    except _BROKEN as error:
        raise DataError(f"picture {name!r} cannot be decoded ({error}); convert it to PNG or JPEG.") from error
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")
