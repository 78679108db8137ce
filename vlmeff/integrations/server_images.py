"""Which picture references a server takes from strangers, and what it makes of them.

A reference that passes is decoded here, once, under limits, and travels on as a PNG that we wrote ourselves: whatever
decodes it later never sees a stranger's bytes, address or path.
"""

from __future__ import annotations

import base64
import io
import re
import threading
from dataclasses import dataclass

from vlmeff.errors import DataError
from vlmeff.integrations.server_fetch import check_address, fetch
from vlmeff.pictures import decode_picture

# Lower case, no parameters, no white space, no percent-encoding: one spelling, so that no later reader can see another.
_DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,([A-Za-z0-9+/]+={0,2})")
_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "gif": b"GIF8", "webp": b"RIFF"}
_SHOWN = 60  # characters of a refused reference in the message
# decode_picture changes the process's warning filters for a moment, and one picture at a time bounds the memory.
_ONE_AT_A_TIME = threading.Lock()


class RefusedRequest(DataError):
    """A request that is answered with ``status`` and the message, before any handler of the server sees it."""

    def __init__(self, message: str, *, code: str = "E-SERVE-02", status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """What a picture of a request may be."""

    max_images: int = 8  # in one request; 0 for a model without pictures
    max_image_mb: float = 10.0  # of the file, 10^6 bytes
    max_image_pixels: int = 20_000_000
    media_domains: tuple[str, ...] = ()  # hosts that pictures may be fetched from by https; none by default

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1e6)


def refuse_picture(message: str) -> RefusedRequest:
    return RefusedRequest(message, code="E-SERVE-01")


def check_reference(reference: object, limits: PictureLimits) -> str:
    """``reference`` itself if it is an allowed one; nothing is decoded, opened or asked for over the network.

    Raises:
        RefusedRequest: it is no string, no allowed data URL and no https address of an allowed domain, or too long.
    """
    if not isinstance(reference, str):
        raise refuse_picture(f"a picture's URL must be a string, not {type(reference).__name__}.")
    matched = _DATA_URL.fullmatch(reference)
    if matched is not None:
        size = len(matched[2]) * 3 // 4 - matched[2].count("=")
        if size > limits.max_image_bytes:
            raise refuse_picture(
                f"the picture has {size} bytes, more than {limits.max_image_bytes} (--max-image-mb): make it smaller."
            )
        return reference
    if limits.media_domains and reference.startswith("https://"):
        try:
            check_address(reference, limits.media_domains)
        except ValueError as error:
            raise refuse_picture(f"the picture's address {_shown(reference)} is not allowed: {error}.") from error
        return reference
    remote = f", or https://HOST/... of {', '.join(limits.media_domains)}" if limits.media_domains else ""
    raise refuse_picture(
        f"the picture reference {_shown(reference)} is not allowed. Send the picture itself: "
        f"data:image/png;base64,... (png, jpeg, webp or gif, base64 without line breaks){remote}."
    )


def picture_as_png(reference: str, limits: PictureLimits) -> str:
    """A checked reference as a data URL of a PNG: the first frame, upright, transparency on white, RGB.

    Raises:
        RefusedRequest: the bytes are no picture of the kind they are said to be, are broken, or have too many pixels
            (checked before they are decoded); or the address could not be fetched.
    """
    matched = _DATA_URL.fullmatch(reference)
    if matched is not None:
        try:
            data = base64.b64decode(matched[2], validate=True)
        except ValueError as error:
            raise refuse_picture(f"the picture {_shown(reference)} is no valid base64 ({error}).") from error
        said: str | None = matched[1]
    else:
        try:
            data = fetch(reference, limits.media_domains, max_bytes=limits.max_image_bytes)
        except (OSError, ValueError) as error:
            raise refuse_picture(f"the picture {_shown(reference)} could not be fetched: {error}.") from error
        said = None
    kind = _kind(data)
    if kind is None or said not in (None, kind):
        found = "none of png, jpeg, webp, gif" if kind is None else kind
        raise refuse_picture(f"the picture {_shown(reference)} holds {found}: send it as what it is.")
    with _ONE_AT_A_TIME:
        try:
            picture = decode_picture(io.BytesIO(data), name=_plain(reference), max_pixels=limits.max_image_pixels)
        except DataError as error:
            raise refuse_picture(str(error)) from error
        if 0 in picture.size:
            raise refuse_picture(f"the picture {_shown(reference)} has no pixels.")
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _kind(data: bytes) -> str | None:
    """By signature: Pillow alone would also open formats that we do not take, some through other programs."""
    kind = next((kind for kind, signature in _SIGNATURES.items() if data.startswith(signature)), None)
    return None if kind == "webp" and data[8:12] != b"WEBP" else kind


def _plain(reference: str) -> str:
    return reference if len(reference) <= _SHOWN else reference[:_SHOWN] + "..."


def _shown(reference: str) -> str:
    return repr(_plain(reference))
