"""Turn a TSV file of VLMEvalKit (pictures as base64) into a folder that ``folder.py`` reads.

Columns understood: index, question, answer and image, which is base64, a list of base64 texts or the index of the row
that holds the picture; and A, B, C, ... (options), hint, category, l2-category, split, id, question_id, image_path.
"""

from __future__ import annotations

import base64
import binascii
import csv
import datetime
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmeff.errors import BadImageError, ConfigError, DataError, UnknownNameError
from vlmeff.evaluation.folder import MANIFEST, MANIFEST_SCHEMA, category_path
from vlmeff.evaluation.hub_rows import missing, parsed_list
from vlmeff.evaluation.images import StoredImage
from vlmeff.evaluation.metrics import FOLDER_METRICS
from vlmeff.pictures import MAX_PIXELS

REFERENCE_LENGTH = 64  # a shorter text in the column image is the index of another row, as VLMEvalKit has it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GUESS = "guess"
SUFFIXES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class Imported:
    """What was written: the folder, its split file, how many questions and how many different pictures.

    ``metric``: of the manifest; None for a registered benchmark, which has its own. ``guessed``: from the answers.
    """

    folder: Path
    split: str
    questions: int
    images: int
    metric: str | None = None
    guessed: bool = False

    def __str__(self) -> str:
        """A line or two for people."""
        what = f"{self.folder / self.split}.jsonl: {self.questions} questions, {self.images} different pictures"
        if self.metric is None:
            return what
        if not self.guessed:
            return f"{what}, scored by {self.metric!r}"
        others = ", ".join(name for name in FOLDER_METRICS if name != self.metric)
        return f"{what}\nscored by {self.metric!r}, guessed from the answers; {MANIFEST} can name another: {others}"


def import_tsv(
    file: Path | str,
    benchmark: str,
    out: Path | str,
    *,
    split: str | None = None,
    metric: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Imported:
    """Write ``out/<benchmark>/`` with pictures, ``<split>.jsonl`` and manifest; ``out`` is then a data root.

    ``split``: name of the file, by default that of the registered benchmark, else "test". Pictures are decoded once to
    be sure of them, and stored as they came, each one once.

    ``metric``: what a benchmark of your own is scored by, for its manifest; guessed where None: ``choice`` if every
    question has options, ``yesno`` if every answer is yes or no, else ``exact``.

    Raises:
        ConfigError: the folder exists already, or a registered benchmark was to get another metric.  DataError: the
            metric is unknown (E-DATA-08), the file is missing (E-DATA-02), a row is broken
            (E-DATA-03), a picture cannot be decoded (E-DATA-06).
    """
    from vlmeff.evaluation import benchmarks  # here, since benchmarks load folders

    if metric is not None and metric not in FOLDER_METRICS:
        raise DataError(f"E-DATA-08: {UnknownNameError('metric', metric, FOLDER_METRICS)}")

    source, folder = Path(file), Path(out) / benchmarks.plain_name(benchmark, "benchmark")
    known = benchmarks.get(benchmark) if benchmark in benchmarks.names() else None
    if known and metric is not None:
        raise ConfigError(f"metric={metric!r}: {benchmark} is scored by {known.metric_name!r}; leave the metric out.")
    split = benchmarks.plain_name(split or (known.split if known else "test"), "split")
    if not source.is_file():
        raise DataError(f"E-DATA-02: {source.name!r} does not exist or is no file: name the TSV.")
    if folder.exists():
        raise ConfigError(f"out={str(out)!r} holds {benchmark!r} already; remove it or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder appears whole or not at all: it is filled under another name.
    part = Path(tempfile.mkdtemp(prefix=f".{benchmark}.", dir=folder.parent))
    try:
        with _any_field_size():
            asked = metric or (None if known else GUESS)
            pictures, count, metric = _fill(part, source, benchmark, split, max_pixels, asked)
        part.chmod(0o755)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Imported(folder, split, count, pictures, metric, guessed=asked == GUESS)


def _fill(
    folder: Path, source: Path, benchmark: str, split: str, max_pixels: int, metric: str | None
) -> tuple[int, int, str | None]:
    """(different pictures, questions, metric) of the folder that it makes; ``metric`` ``GUESS``: by the answers."""
    (folder / "images").mkdir()
    pictures = _write_pictures(source, folder, max_pixels)
    digest, count, used = hashlib.sha256(), 0, set[str]()
    fits = {"choice": True, "yesno": True}
    with (folder / f"{split}.jsonl").open("wb") as writer:
        for line, row in _rows(source):
            if benchmark == "mmmu_val" and row.get("split", split) != split:
                continue  # VLMEvalKit keeps MMMU's dev and validation in one file
            question = _question(row, line, benchmark, pictures)
            text = json.dumps(question, ensure_ascii=False).encode() + b"\n"
            digest.update(text)
            writer.write(text)
            used.update(question["images"])
            count += 1
            fits["choice"] &= "choices" in question
            fits["yesno"] &= [a.strip().lower() in ("yes", "no") for a in question["answers"]] == [True]
    if metric == GUESS:
        metric = next((name for name, fit in fits.items() if fit and count), "exact")
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "benchmark": benchmark,
        "split": split,
        "count": count,
        "sha256": {f"{split}.jsonl": digest.hexdigest()},
        **({} if metric is None else {"metric": metric}),
        "source": source.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return len(used), count, metric


@contextmanager
def _any_field_size() -> Iterator[None]:
    """csv takes fields of any length while the block runs; its limit belongs to the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by lower-case column, options by letter) of every row."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, dialect="excel-tab")
            names = [name if name in LETTERS else name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = names
            for needed in ("index", "image", "question", "answer"):
                if needed not in names:
                    raise DataError(
                        f"E-DATA-03: {source.name} has no column {needed!r}; it has {', '.join(names)}: is it a TSV of "
                        "VLMEvalKit?"
                    )
            for row in reader:
                yield reader.line_num, {key: cell for key, cell in row.items() if isinstance(cell, str) and key}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"E-DATA-03: {source.name} is no TSV file in UTF-8: {error}. Get it again.") from error


def _write_pictures(source: Path, folder: Path, max_pixels: int) -> dict[str, list[str]]:
    """Index of a row -> names of its pictures; references to other rows followed."""
    names: dict[str, list[str]] = {}
    references: dict[str, tuple[str, int]] = {}
    for line, row in _rows(source):
        index, cell = row.get("index", "").strip(), row.get("image", "").strip()
        if not index or index in names or index in references:
            raise DataError(f"E-DATA-03: line {line}: index {index!r} is empty or occurs twice: number the rows.")
        if 0 < len(cell) <= REFERENCE_LENGTH:
            references[index] = cell, line
        else:
            texts = (parsed_list(cell) or [cell]) if cell else []
            names[index] = [_write_picture(text, index, folder, max_pixels) for text in texts]
    for index, (target, line) in references.items():
        if target not in names:
            raise DataError(
                f"E-DATA-03: line {line}: image {target!r} is the index of no row with a picture: get the file again."
            )
        names[index] = names[target]
    return names


def _write_picture(text: str, index: str, folder: Path, max_pixels: int) -> str:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(
            f"E-DATA-06: row with index {index!r}: the picture is no base64: {error}. Get the file again."
        ) from error
    suffix = next((suffix for magic, suffix in SUFFIXES if data.startswith(magic)), "img")
    name = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
    path = folder / name
    if not path.exists():
        StoredImage(lambda: data, name, index, max_pixels)()
        path.write_bytes(data)
    return name


def _question(row: dict[str, str], line: int, benchmark: str, pictures: dict[str, list[str]]) -> dict[str, Any]:
    index = row["index"].strip()
    question, answer = row.get("question", ""), row.get("answer", "")
    if not question or missing(answer):
        raise DataError(
            f"E-DATA-03: line {line}: question or answer is empty; a split without answers has no score: take another."
        )
    choices: list[str] = []
    for letter in LETTERS:
        if missing(row.get(letter)):
            break
        choices.append(row[letter])
    out: dict[str, Any] = {"doc_id": index, "images": pictures[index], "question": question}
    answers = parsed_list(answer) if not choices else None
    if benchmark in ("pope", "mme"):
        answers = [answer.strip().lower()]
    out["answers"] = answers or [answer]
    if choices:
        out["choices"] = choices
    category, coarse = (row.get(key, "") for key in ("category", "l2-category"))
    if benchmark == "chartqa":
        category = next((kind for kind in ("human", "augmented") if kind in row.get("split", "")), "")
    if not missing(coarse):
        category = category_path({"l2": coarse, "category": category})
    meta: dict[str, Any] = {key: row[key] for key in ("hint", "question_id", "id") if not missing(row.get(key))}
    if benchmark == "mmbench_en_dev" and index.isdecimal():
        out["group"], meta = str(int(index) % 1_000_000), meta | {"index": int(index)}
    elif pictures[index]:
        # MME may show the same picture in two categories; each is a pair of its own.
        prefix = f"{category}/" if benchmark == "mme" else ""
        out["group"] = prefix + pictures[index][0].removeprefix("images/").partition(".")[0]
    if benchmark == "pope":
        out["split"], category = category, ""
    for key, cell in (("category", category), ("meta", meta)):
        if cell and not missing(cell):
            out[key] = cell
    return {key: cell for key, cell in out.items() if cell != ""}
