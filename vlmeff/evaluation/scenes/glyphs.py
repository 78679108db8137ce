"""A 5 x 7 bitmap font of our own for digits and capital letters: the same pixels on every machine, no font files."""

from __future__ import annotations

from PIL import Image

ROWS, COLUMNS, GAP = 7, 5, 1

# Each row of a glyph is five bits, the leftmost pixel highest.
_FONT = {
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 04 04 04 04 0E",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
    "A": "0E 11 11 1F 11 11 11",
    "B": "1E 11 11 1E 11 11 1E",
    "C": "0E 11 10 10 10 11 0E",
    "D": "1E 11 11 11 11 11 1E",
    "E": "1F 10 10 1E 10 10 1F",
    "F": "1F 10 10 1E 10 10 10",
    "G": "0E 11 10 17 11 11 0E",
    "H": "11 11 11 1F 11 11 11",
    "I": "0E 04 04 04 04 04 0E",
    "J": "07 02 02 02 02 12 0C",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "M": "11 1B 15 15 11 11 11",
    "N": "11 19 15 13 11 11 11",
    "O": "0E 11 11 11 11 11 0E",
    "P": "1E 11 11 1E 10 10 10",
    "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "W": "11 11 11 15 15 1B 11",
    "X": "11 11 0A 04 0A 11 11",
    "Y": "11 11 0A 04 04 04 04",
}
GLYPHS = {char: tuple(int(row, 16) for row in rows.split()) for char, rows in _FONT.items()}


def columns(text: str) -> int:
    """Width of ``text`` in font pixels."""
    return len(text) * (COLUMNS + GAP) - GAP


def text_mask(text: str, pixel: int) -> Image.Image:
    """``text`` in capitals as an "L" picture, 255 on the letters; one font pixel is ``pixel`` pixels wide."""
    mask = Image.new("L", (columns(text), ROWS))
    for number, char in enumerate(text.upper()):
        for y, row in enumerate(GLYPHS[char]):
            for x in range(COLUMNS):
                if row >> (COLUMNS - 1 - x) & 1:
                    mask.putpixel((number * (COLUMNS + GAP) + x, y), 255)
    return mask.resize((mask.width * pixel, mask.height * pixel), Image.Resampling.NEAREST)
