"""Where benchmarks come from, besides folders: an installed package, a saved data set, the hub, a generator.

Every source yields *rows*, samples by index with ``doc_ids`` and ``groups`` read in advance (pictures are not), and an
``Origin`` that says what they are: id, revision and SHA-256 as far as they are known.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from vlmeff.errors import DataError, MissingExtraError
from vlmeff.evaluation.folder import LAYOUT
from vlmeff.evaluation.hub_rows import Row
from vlmeff.evaluation.images import FileImage, StoredImage
from vlmeff.evaluation.samples import Sample
from vlmeff.pictures import MAX_PIXELS

Check = Callable[[Sample], object]


@dataclass(frozen=True)
class Origin:
    """What data a run saw; none of it is a path of this machine."""

    source: str
    id: str
    revision: str | None = None
    sha256: str | None = None


class Rows(Protocol):
    """``doc_ids`` and ``groups`` of the rows that were looked at, ``total`` counts all that there are."""

    doc_ids: list[str]
    groups: list[str | None]

    @property
    def total(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def _one_picture(sample: Sample) -> Sequence[str]:  # no lambda: samples of a table are pickled with their ``Hub``
    return ("image",)


@dataclass(frozen=True)
class Hub:
    """A data set of the hub: ``ids`` in the order they are tried (organisations get renamed).

    ``revision`` is a commit, None while none has been verified: then the newest is taken and recorded. ``pictures``
    names the image columns of a sample. ``joined``: configuration whose rows hold the pictures, found by
    ``meta["image_id"]`` in its column ``id``.
    """

    ids: tuple[str, ...]
    split: str
    convert: Callable[[Row, int], Sample]
    config: str | None = None
    revision: str | None = None
    pictures: Callable[[Sample], Sequence[str]] = _one_picture
    joined: str | None = None


@dataclass(frozen=True)
class Package:
    """Data inside an installed package: ``read(split, max_pixels)`` returns the samples and what they are."""

    read: Callable[[str, int], tuple[Sequence[Sample], Origin]]


@dataclass(frozen=True)
class Generated:
    """Documents that are computed: ``make(split)`` returns the same samples for the same ``revision``, always.

    The sequence may compute a sample when it is indexed. ``revision`` names the generator's version and seed.
    """

    make: Callable[[str], Sequence[Sample]]
    id: str
    revision: str

    def read(self, split: str, max_pixels: int) -> tuple[Sequence[Sample], Origin]:
        digest = hashlib.sha256(json.dumps([self.id, split, self.revision]).encode()).hexdigest()
        return self.make(split), Origin("generated", self.id, self.revision, digest)


class SequenceRows:
    """Rows of samples that are there, or are made when indexed."""

    def __init__(self, samples: Sequence[Sample], *, check: Check, stop: int | None = None) -> None:
        self._samples, self.total = samples, len(samples)
        heads = (samples[i] for i in range(self.total if stop is None else min(stop, self.total)))
        self.doc_ids, self.groups = _heads(heads, check)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class TableRows:
    """Rows of a ``datasets.Dataset``; ``images`` is the table that holds the pictures if it is another one.

    The table lies on disk; a row is converted when it is asked for, its pictures are decoded when called.
    """

    def __init__(
        self,
        table: Any,
        hub: Hub,
        *,
        images: Any = None,
        check: Check,
        stop: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        from datasets import Image

        self._hub, self._max_pixels, self.total = hub, max_pixels, len(table)
        pictures = table if images is None else images
        columns = [name for name, feature in pictures.features.items() if isinstance(feature, Image)]
        for column in columns:
            pictures = pictures.cast_column(column, Image(decode=False))
        self._pictures = pictures.select_columns(columns)
        self._text = table.remove_columns(columns) if images is None else table
        self._place = None if images is None else {str(key): i for i, key in enumerate(images["id"])}
        rows = self._text if stop is None else self._text.select(range(min(stop, self.total)))
        self.doc_ids, self.groups = _heads((hub.convert(row, i) for i, row in enumerate(rows)), check)

    def __getitem__(self, index: int) -> Sample:
        sample = self._hub.convert(self._text[index], index)
        place = index if self._place is None else self._place.get(sample.meta["image_id"])
        images = [
            StoredImage(functools.partial(self._bytes, place, name), name, sample.doc_id, self._max_pixels)
            for name in self._hub.pictures(sample)
        ]
        return replace(sample, images=images)

    def _bytes(self, place: int | None, column: str) -> bytes | None:
        # A cell without bytes may name any path of this machine: it is not followed.
        if place is None or column not in self._pictures.column_names:
            return None
        cell = self._pictures.select_columns([column])[place][column]
        return cell["bytes"] if cell else None


def _heads(samples: Iterator[Sample], check: Check) -> tuple[list[str], list[str | None]]:
    doc_ids, groups, seen = [], [], set[str]()
    for sample in samples:
        if sample.doc_id in seen:
            raise DataError(
                f"E-DATA-03: duplicate doc_id {sample.doc_id!r}: runs cannot be joined by it. Get the data again, or "
                "put them into a folder with ids of their own (--data-root)."
            )
        check(sample)
        seen.add(sample.doc_id)
        doc_ids.append(sample.doc_id)
        groups.append(sample.group)
    return doc_ids, groups


def easy_vqa(split: str, max_pixels: int = MAX_PIXELS) -> tuple[Sequence[Sample], Origin]:
    """Questions of the package ``easy-vqa`` in its own order; category color, shape or yesno; group: the picture.

    Raises:
        MissingExtraError: the package is not installed.  DataError: it has no such split (E-DATA-02).
    """
    try:
        import easy_vqa as package
    except ImportError as error:
        raise MissingExtraError("easy_vqa", "eval", "the easy-vqa questions") from error
    if split not in ("train", "test"):
        raise DataError(f"E-DATA-02: easy-vqa has no split {split!r}: take train or test.")
    questions, answers, ids = getattr(package, f"get_{split}_questions")()
    paths = {number: Path(path) for number, path in getattr(package, f"get_{split}_image_paths")().items()}
    roots = {path.parent: path.parent.resolve() for path in paths.values()}
    digest = hashlib.sha256(json.dumps([questions, answers, ids]).encode())
    for _, path in sorted(paths.items()):
        digest.update(path.read_bytes())
    kinds = {"yes": "yesno", "no": "yesno", "circle": "shape", "rectangle": "shape", "triangle": "shape"}
    samples = []
    for number, (question, answer, image) in enumerate(zip(questions, answers, ids, strict=True)):
        doc_id, path = f"easy_vqa/{split}/{number}", paths[image]
        samples.append(
            Sample(
                doc_id=doc_id,
                images=[FileImage(roots[path.parent], path.name, doc_id, max_pixels)],
                question=question,
                answers=[answer],
                group=str(image),
                category=kinds.get(answer, "color"),
            )
        )
    return samples, Origin("package", "easy-vqa", metadata.version("easy-vqa"), digest.hexdigest())


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_at(root: Path, hub: Hub) -> bool:
    """Whether ``root`` holds the data set: saved whole or by configuration, or downloaded as the hub has it."""
    return is_saved(root) or (hub.config is not None and is_saved(root / hub.config)) or any(root.rglob("*.parquet"))


def open_saved(root: Path, hub: Hub, split: str, **options: Any) -> tuple[TableRows, Origin]:
    """The data set in ``root``: written by ``save_to_disk`` there or in ``root/<configuration>``, or downloaded with
    ``hf download --local-dir``.

    ``Origin.sha256`` is that of the tables' descriptions and the names and sizes of their files, not of the pictures.

    Raises:
        MissingExtraError: datasets is not installed.  DataError: the split or the pictures' table is missing
            (E-DATA-02), or a table cannot be read (E-DATA-03).
    """
    datasets = _datasets()
    digest = hashlib.sha256()

    def read(config: str | None) -> Any:
        path = root / config if config is not None and is_saved(root / config) else root
        where = path.relative_to(root.parent)
        try:
            if is_saved(path):
                table = datasets.load_from_disk(str(path))
                table, path = (table, path) if not isinstance(table, dict) else (table[split], path / split)
            else:
                table = datasets.load_dataset(str(path), config, split=split)
        except (KeyError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"E-DATA-02: {where} has no data set with the split {split!r} and the configuration {config!r} "
                f"({error}). Save or download it with these."
            ) from error
        for file in sorted(path.rglob("*.*")):
            if ".cache" not in file.parts and file.is_file():
                digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
                digest.update(file.read_bytes() if file.suffix == ".json" else b"")
        return table

    table = read(hub.config)
    images = read(hub.joined) if hub.joined else None
    rows = _rows(table, hub, images, root.name, options)
    return rows, Origin("hf-disk", hub.ids[0], commit_of(table) or _commit_of_download(root), digest.hexdigest())


def _commit_of_download(root: Path) -> str | None:
    """The commit that ``hf download --local-dir`` notes beside what it wrote."""
    for file in sorted((root / ".cache" / "huggingface" / "download").rglob("*.metadata")):
        if re.fullmatch("[0-9a-f]{40}", first := file.read_text().partition("\n")[0].strip()):
            return first
    return None


def open_hub(name: str, hub: Hub, split: str, *, offline: bool, **options: Any) -> tuple[TableRows, Origin]:
    """The data set from the hub, or, offline, from its local cache.

    No login is asked for: the data sets are public. None needs code of its own, and none would be run.

    Raises:
        MissingExtraError: datasets is not installed.  DataError: it is out of reach (E-DATA-01).
    """
    datasets = _datasets()
    problems = []
    for repository in hub.ids:
        try:
            with _offline(datasets, offline):
                load = functools.partial(datasets.load_dataset, repository, split=split, revision=hub.revision)
                table = load(hub.config)
                images = load(hub.joined) if hub.joined else None
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            problems.append(f"{repository}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        return _rows(table, hub, images, repository, options), Origin("hf", repository, commit_of(table))
    raise out_of_reach(name, hub, split, offline=offline, problems=problems)


def out_of_reach(name: str, hub: Hub | None, split: str, *, offline: bool, problems: Sequence[str] = ()) -> DataError:
    """E-DATA-01: nothing is here and nothing could be fetched; shows the folder's layout and how to download."""
    why = "it is not on this machine, and the hub may not be asked (offline)" if offline else "no source has it"
    lines = [f"E-DATA-01: benchmark {name!r}: {why}."]
    lines += [f"  {problem}" for problem in problems]
    lines += ["Put it into a folder and name that with --data-root:", LAYOUT.format(name=name, split=split)]
    if hub is not None:
        lines += [
            "or fetch it where there is a network:",
            f"  hf download --repo-type dataset {hub.ids[0]} --local-dir <data-root>/{name}",
        ]
    return DataError("\n".join(lines))


def hub_is_off(offline: bool) -> bool:
    """Whether the hub may not be asked: the option, or an environment variable of the hub's own libraries."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return offline or any(os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE") for name in names)


def commit_of(table: Any) -> str | None:
    """The commit that a table of the hub was made from, as its download records name it; None if they do not."""
    for url in table.info.download_checksums or {}:
        if match := re.search(r"@([0-9a-f]{40})(?:/|$)", str(url)):
            return match[1]
    return None


def _rows(table: Any, hub: Hub, images: Any, name: str, options: dict[str, Any]) -> TableRows:
    try:
        return TableRows(table, hub, images=images, **options)
    except (KeyError, TypeError, AttributeError) as error:
        columns = ", ".join(table.column_names)
        raise DataError(
            f"E-DATA-03: {name} lacks a field or holds one of another type: {error}. It has {columns}. Take the "
            "revision that the benchmark was made for, or put the data into a folder (--data-root)."
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "eval", "data sets of the hub") from error
    return datasets


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """``datasets`` asks its cache alone while the block runs; it reads its environment variable at import only."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
