"""Benchmarks in a folder: ``<root>/<benchmark>/`` with ``<split>.jsonl``, pictures and, best, ``manifest.json``.

A split is read once from end to end, line by line: every row is checked, its place in the file, its id and its group
are remembered, and the file is hashed. Rows are parsed again when they are asked for, so that a split of a
million questions takes no more memory than their ids.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vlmeff.errors import DataError
from vlmeff.evaluation.images import FileImage, inside
from vlmeff.evaluation.samples import Sample
from vlmeff.pictures import MAX_PIXELS

logger = logging.getLogger("vlmeff")

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "vlmeff.data/1"
MAX_CHOICES = 26
REMEDY = "Correct the line, or make the file again."
# Of manifest and row, with the type that each must have; text_only must be true or false.
MANIFEST_KEYS = {
    "schema": str, "benchmark": str, "split": str, "count": int, "sha256": dict, "metric": str, "prompt_suffix": str,
    "max_new_tokens": int, "text_only": bool, "license": str, "source": str, "created": str,
}  # fmt: skip
ROW_KEYS = "doc_id image images question answer answers choices group category split meta".split()
_told: set[str] = set()  # warnings that were given: a folder is opened several times
LAYOUT = """\
  <data-root>/{name}/
    manifest.json    optional: {{"schema": "vlmeff.data/1", "benchmark": "{name}", "split": "{split}", "count": 9000}}
    {split}.jsonl    one a line: {{"doc_id": "1", "image": "images/1.jpg", "question": "...", "answer": "..."}}
    images/..."""


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``; ``content`` is the whole object."""

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a benchmark's folder, None if it has none.

        Raises:
            DataError: it cannot be read or a key has the wrong type (E-DATA-04).
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"E-DATA-04: {folder.name}/{MANIFEST} is no JSON file: {error}. Correct or remove it."
            ) from error
        if not isinstance(content, dict) or content.get("schema") != MANIFEST_SCHEMA:
            raise DataError(
                f'E-DATA-04: {folder.name}/{MANIFEST} must be an object with "schema": "{MANIFEST_SCHEMA}".'
            )
        for key, kind in MANIFEST_KEYS.items():
            # True is an int to Python, not to JSON.
            if key in content and (
                isinstance(content[key], bool) != (kind is bool) or not isinstance(content[key], kind)
            ):
                wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
                raise DataError(
                    f"E-DATA-04: {folder.name}/{MANIFEST}: {key} must be {wanted}, not {content[key]!r}. Correct it."
                )
        _warn_of_unknown(
            f"{folder.name}/{MANIFEST}", folder, dict.fromkeys(content.keys() - MANIFEST_KEYS, 1), MANIFEST_KEYS
        )
        return cls(content)


class FolderRows:
    """The rows of one split, checked; ``rows[i]`` is a ``Sample``. Its pictures are decoded only when called.

    ``doc_ids`` and ``groups`` (None: the row names none) are in the order of the file; ``sha256`` is that of the file.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        max_pixels: int = MAX_PIXELS,
        text_only: bool = False,
        check: Callable[[Sample], object] = lambda sample: None,
    ) -> None:
        """``check`` raises where a row is not what the benchmark needs.

        Raises:
            DataError: the split is not there (E-DATA-02), a row is broken (E-DATA-03), leaves the folder (E-DATA-05).
        """
        self.folder, self.split, self.max_pixels, self.text_only = folder.resolve(), split, max_pixels, text_only
        self.path = self.folder / f"{split}.jsonl"
        if not self.path.is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) if folder.is_dir() else ""
            raise DataError(
                f"E-DATA-02: {folder.name}/{split}.jsonl does not exist; the folder holds: {found or 'nothing'}. "
                "Name another split, or add the file."
            )
        self.doc_ids: list[str] = []
        self.groups: list[str | None] = []
        self._offsets, self._lines = array("Q"), array("Q")
        unknown = Counter[str]()
        digest, offset, seen = hashlib.sha256(), 0, dict[str, int]()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    row = self._parsed(line, number)
                    sample = self._sample(row, number)
                    unknown.update(row.keys() - set(ROW_KEYS))
                    if sample.doc_id in seen:
                        self._broken(number, f"doc_id {sample.doc_id!r} is that of line {seen[sample.doc_id]} already")
                    check(sample)
                    seen[sample.doc_id] = number
                    self.doc_ids.append(sample.doc_id)
                    self.groups.append(sample.group)
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self.sha256 = digest.hexdigest()
        _warn_of_unknown(f"{folder.name}/{split}.jsonl", self.folder, unknown, ROW_KEYS)

    @property
    def total(self) -> int:
        return len(self.doc_ids)

    def __getitem__(self, index: int) -> Sample:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._sample(self._parsed(file.readline(), self._lines[index]), self._lines[index])

    def verify(self, manifest: Manifest) -> None:
        """Raises:
        DataError: count or hash differ from what the manifest says of this split (E-DATA-04)."""
        content, name = manifest.content, f"{self.folder.name}/{self.split}.jsonl"
        count = content.get("count")
        if count is not None and content.get("split", self.split) == self.split and count != self.total:
            raise DataError(f"E-DATA-04: {name} has {self.total} rows, its manifest says {count}: get the data again.")
        expected = content.get("sha256", {}).get(f"{self.split}.jsonl")
        if expected is not None and str(expected).lower() != self.sha256:
            raise DataError(
                f"E-DATA-04: {name} has the SHA-256 {self.sha256}, its manifest says {expected}: get the data again, "
                "or correct the manifest if the change was meant."
            )

    def _broken(self, number: int, reason: str) -> NoReturn:
        raise DataError(f"E-DATA-03: {self.folder.name}/{self.split}.jsonl, line {number}: {reason}. {REMEDY}")

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"E-DATA-03: {self.folder.name}/{self.split}.jsonl, line {number}: not JSON in UTF-8: {error}. {REMEDY}"
            ) from error

    def _sample(self, row: Any, number: int) -> Sample:
        try:
            return row_to_sample(
                row, self.folder, where=f"line {number}", max_pixels=self.max_pixels, text_only=self.text_only
            )
        except _Broken as error:
            raise DataError(
                f"E-DATA-03: {self.folder.name}/{self.split}.jsonl, line {number}: {error}. {REMEDY}"
            ) from error


def _warn_of_unknown(name: str, folder: Path, unknown: Mapping[str, int], known: Iterable[str]) -> None:
    """One warning for all keys that nothing here reads: a misspelt one would otherwise be missed in silence."""
    if not unknown:
        return
    words = []
    for key, times in sorted(unknown.items()):
        near = difflib.get_close_matches(key, known, n=1)
        words.append(f"{key!r}{f' in {times} rows' if times > 1 else ''}{f' (is {near[0]!r} meant?)' if near else ''}")
    text = f"{name} has unknown keys, which are ignored: {', '.join(words)}. Known: {', '.join(known)}."
    if f"{folder} {text}" not in _told:
        _told.add(f"{folder} {text}")
        logger.warning(text)


class _Broken(Exception):
    """What is wrong with a row, without where."""


def row_to_sample(row: Any, folder: Path, *, where: str, max_pixels: int, text_only: bool) -> Sample:
    """A row of schema ``vlmeff.sample/1`` as a ``Sample``."""
    if not isinstance(row, dict):
        raise _Broken(f"an object is needed, not {type(row).__name__}")
    doc_id = _text(row, "doc_id", required=True)
    if not doc_id:
        raise _Broken("doc_id is empty")
    if "image" in row and "images" in row:
        raise _Broken("image and images are both there; give one")
    paths = [_text(row, "image", required=True)] if "image" in row else _texts(row, "images", required=True)
    if not paths and not text_only:
        raise _Broken("images is empty, and the benchmark is not one of text alone")
    for path in paths:
        inside(folder, path, where=where)
    if ("answer" in row) == ("answers" in row):
        raise _Broken("one of answer and answers is needed")
    answers = [_text(row, "answer", required=True)] if "answer" in row else _texts(row, "answers", required=True)
    if not answers:
        raise _Broken("answers is empty")
    choices = _texts(row, "choices") if row.get("choices") is not None else None
    if choices is not None and len(choices) > MAX_CHOICES:
        raise _Broken(f"choices has {len(choices)} options, more than there are letters")
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise _Broken(f"meta must be an object, not {type(meta).__name__}")
    return Sample(
        doc_id=doc_id,
        images=[FileImage(folder, path, doc_id, max_pixels) for path in paths],
        question=_text(row, "question", required=True),
        answers=answers,
        choices=choices or None,
        group=_text(row, "group") or None,
        category=_category(row.get("category")),
        split=_text(row, "split") or None,
        meta=meta or {},
    )


def category_path(levels: Mapping[str, str]) -> str:
    """One name of several levels, coarse first: {"area": "science", "subject": "biology"} -> "science/biology"."""
    return "/".join(level.replace("/", "-") for level in levels.values() if level)


def _category(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, dict) and all(isinstance(level, str) for level in value.values()):
        return category_path(value) or None
    raise _Broken("category must be a string or an object of strings")


def _text(row: dict[str, Any], key: str, *, required: bool = False) -> str:
    value = row.get(key)
    if value is None and not required:
        return ""
    if key not in row:
        raise _Broken(f"the key {key} is missing")
    return _checked(value, key)


def _texts(row: dict[str, Any], key: str, *, required: bool = False) -> list[str]:
    if required and key not in row:
        raise _Broken(f"the key {key} is missing" if key != "images" else "the key image or images is missing")
    value = row[key]
    if not isinstance(value, list):
        raise _Broken(f"{key} must be a list of strings, not {type(value).__name__}")
    return [_checked(item, key) for item in value]


def _checked(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Broken(f"{key} must be a string, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate could not be written to any result file
        raise _Broken(f"{key} holds text that is not Unicode") from error
    return value
