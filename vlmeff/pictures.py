"""Open picture files safely."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmeff.errors import DataError

MAX_PIXELS = 50_000_000


def open_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, turned as its EXIF data says, transparency on white.

    Raises:
        DataError: the file is missing, is no picture, is broken or has more than ``max_pixels`` pixels (checked before
            it is decoded).
    """
    if not path.is_file():
        raise DataError(f"picture {str(path)!r} does not exist or is no file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise DataError(
                        f"picture {str(path)!r} has {width} x {height} pixels, more than {max_pixels}: make it smaller."
                    )
                picture.load()
                upright = ImageOps.exif_transpose(picture)
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as error:
        raise DataError(f"picture {str(path)!r} cannot be decoded ({error}); convert it to PNG or JPEG.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"picture {str(path)!r} is too large to decode: {error}") from error
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")
