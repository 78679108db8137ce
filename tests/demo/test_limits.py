"""What visitors may send."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from vlmeff.demo.limits import Limits
from vlmeff.errors import DataError


def png_of(width: int, height: int) -> bytes:
    """A PNG file that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(folder: Path, content: bytes, name: str = "picture.png") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_a_picture_is_refused_for_its_declared_pixels_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(DataError, match="5000 x 5000 pixels, more than 20000000"):
        Limits().picture(saved(tmp_path, png_of(5000, 5000)))
    with pytest.raises(DataError, match="more than 20000000 pixels"):
        Limits().picture(saved(tmp_path, png_of(50_000, 20_000)))


def test_one_pixel_more_than_allowed_is_too_many(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 10)).save(path)
    assert Limits(max_pixels=200).picture(str(path)).size == (20, 10)
    with pytest.raises(DataError, match="20 x 10"):
        Limits(max_pixels=199).picture(str(path))


def test_a_file_over_the_limit_is_not_opened(tmp_path: Path) -> None:
    path = saved(tmp_path, bytes(1050))
    with pytest.raises(DataError, match=r"larger than 0\.001 MB"):
        Limits(max_file_mb=0.001).picture(path)


def test_errors_about_a_picture_name_no_path_of_the_server(tmp_path: Path) -> None:
    broken = saved(tmp_path, b"no picture at all")
    cut = saved(tmp_path, png_of(30, 30), "cut.png")
    for path in (broken, cut, str(tmp_path / "missing.png")):
        with pytest.raises(DataError) as caught:
            Limits().picture(path)
        assert str(tmp_path) not in str(caught.value)


def test_a_picture_is_upright_rgb_and_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    turned = Image.new("RGB", (30, 10), "red")
    exif = turned.getexif()
    exif[274] = 6  # the camera was turned
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert Limits().picture(str(tmp_path / "turned.jpg")).size == (10, 30)

    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "yellow")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert Limits().picture(str(tmp_path / "moving.gif")).getpixel((0, 0)) == (0, 0, 255)

    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    clear = Limits().picture(str(tmp_path / "clear.png"))
    assert (clear.mode, clear.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("path", [None, ""])
def test_no_picture_is_said_in_plain_words(path: str | None) -> None:
    with pytest.raises(DataError, match="There is no picture yet"):
        Limits().picture(path)


def test_a_question_is_stripped_and_has_a_length() -> None:
    limits = Limits(max_question_chars=5)
    assert limits.question("  what?  ") == "what?"
    with pytest.raises(DataError, match="6 characters, more than 5"):
        limits.question("what??")
    for nothing in (None, "", " \n "):
        with pytest.raises(DataError, match="There is no question yet"):
            limits.question(nothing)


def test_the_number_of_pictures_is_limited() -> None:
    Limits(max_pictures=2).check_count(2)
    with pytest.raises(DataError, match="3 pictures are too many; at most 2"):
        Limits(max_pictures=2).check_count(3)


def test_a_format_whose_reader_starts_other_programs_is_no_picture(tmp_path: Path) -> None:
    file = tmp_path / "drawing.png"
    Image.new("RGB", (4, 4)).save(file, format="EPS")
    with pytest.raises(DataError, match="no known format"):
        Limits().picture(str(file))
