"""Benchmarks by name: what is asked, how it is scored, where the data come from, and how much of them is loaded."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

from vlmeff.errors import ConfigError, DataError, UnknownNameError, VlmeffError
from vlmeff.evaluation import prompts, sources
from vlmeff.evaluation.folder import MANIFEST, FolderRows, Manifest
from vlmeff.evaluation.metrics import FOLDER_METRICS, Metric, metrics
from vlmeff.evaluation.metrics.base import gold_letter, gold_yes
from vlmeff.evaluation.samples import Sample
from vlmeff.evaluation.sources import Generated, Hub, Origin, Package, Rows
from vlmeff.pictures import MAX_PIXELS

SOURCES = ("folder", "package", "generated", "hf-disk", "hf")

# Modules that call ``register`` when imported; imported when a name is first asked for.
_MODULES = ["vlmeff.evaluation.published", "vlmeff.evaluation.generated"]
_registered: dict[str, Benchmark] = {}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. ``metric_name`` is a name of the registry of metrics.

    ``folders``: names of folders below the data root that hold it, its own first. ``complete`` checks one group of a
    benchmark that is scored by groups (MME, MMBench): ``limit`` then counts groups, else documents. ``check`` raises
    where a document lacks what template or metric need. ``caption_notes`` go below every table of the benchmark.
    """

    name: str
    template: prompts.Template
    metric_name: str
    max_new_tokens: int
    answer_kind: str
    split: str
    sources: tuple[Package | Generated | Hub, ...] = ()
    folders: tuple[str, ...] = ()
    group_key: str | None = None
    complete: Callable[[str, Sequence[Sample]], None] | None = None
    check: Callable[[Sample], object] = field(default=lambda sample: None)
    stop: tuple[str, ...] = ()
    expected_count: int | None = None
    text_only: bool = False
    caption_notes: tuple[str, ...] = ()
    license_note: str = ""
    citation: str = ""

    @property
    def metric(self) -> Metric:
        return metrics.get(self.metric_name)()

    def prompt(self, sample: Sample) -> str:
        """The question with what is put around it, without chat template."""
        return self.template.build(sample)

    def load(
        self,
        *,
        data_root: Path | str | None = None,
        split: str | None = None,
        source: str | None = None,
        offline: bool = False,
        limit: int | float | None = None,
        max_image_pixels: int = MAX_PIXELS,
    ) -> LoadedBenchmark:
        """Find the data and check them; pictures are decoded later, one by one.

        Sources are tried in the order folder, package or generated, saved data set (``hf-disk``), hub (``hf``);
        ``source`` fixes one. A folder that is there wins even if it is broken. ``limit``: so many documents (groups,
        where the benchmark is scored by groups) from the start, or that share of them, rounded up.

        Raises:
            ConfigError: ``limit`` (E-USE-02).  UnknownNameError: ``source`` (E-USE-01).  MissingExtraError: a package
            is not installed.  DataError: E-DATA-01 to 05 and 07.
        """
        check_limit(limit)
        if source is not None and source not in SOURCES:
            raise UnknownNameError("data source", source, SOURCES, code="E-USE-01")
        stop = limit if isinstance(limit, int) and self.complete is None else None
        root = None if data_root is None else Path(data_root)
        rows, origin, split = self._open(root, split, source, offline, stop, max_image_pixels)
        indices = self._selected(rows, limit)
        if not len(indices):
            raise DataError(f"E-DATA-02: {self.name}: the {split} split holds no documents; check the data.")
        notes = list(self.caption_notes)
        if self.expected_count not in (None, rows.total):
            notes.append(
                f"{rows.total} documents are there, the published {self.split} split has {self.expected_count}"
            )
        return LoadedBenchmark(self, rows, indices, origin, split, tuple(notes))

    def _open(
        self, root: Path | None, split: str | None, source: str | None, offline: bool, stop: int | None, pixels: int
    ) -> tuple[Rows, Origin, str]:
        names = self.folders or (self.name,)
        folders = [root / name for name in names if (root / name).is_dir()] if root else []
        hub = next((s for s in self.sources if isinstance(s, Hub)), None)
        own = [f for f in folders if (f / MANIFEST).is_file() or any(f.glob("*.jsonl"))]
        others = folders if source == "hf-disk" else [f for f in folders if f not in own]
        saved = next((f for f in others if hub and sources.saved_at(f, hub)), None)
        folders = own or [f for f in folders if f != saved]
        options: dict[str, Any] = {"check": self.check, "stop": stop}
        if source in (None, "folder") and folders:
            return self._open_folder(folders[0], split, pixels)
        split = split or self.split
        for made in (s for s in self.sources if not isinstance(s, Hub)):
            if source in (None, "generated" if isinstance(made, Generated) else "package"):
                samples, origin = made.read(split, pixels)
                return sources.SequenceRows(samples, **options), origin, split
        options["max_pixels"] = pixels
        if hub and saved and source in (None, "hf-disk"):
            return *sources.open_saved(saved, hub, split, **options), split
        offline = sources.hub_is_off(offline)
        if hub and source in (None, "hf"):
            return *sources.open_hub(self.name, hub, split, offline=offline, **options), split
        asked = [f"only the source {source!r} was to be asked"] if source else []
        raise sources.out_of_reach(self.name, hub, split, offline=offline, problems=asked)

    def _open_folder(self, folder: Path, split: str | None, pixels: int) -> tuple[FolderRows, Origin, str]:
        manifest = Manifest.read(folder) or Manifest()
        content = manifest.content
        known = (*self.folders, self.name)
        if content.get("benchmark", self.name) not in known:
            raise DataError(
                f"E-DATA-04: {folder.name}/{MANIFEST} is of the benchmark {content['benchmark']!r}, not {self.name!r}: "
                "move the folder to that name, or correct the manifest."
            )
        split = plain_name(split or content.get("split") or self.split, "split")
        rows = FolderRows(folder, split, max_pixels=pixels, text_only=self.text_only, check=self.check)
        rows.verify(manifest)
        identity = content.get("source") or f"{folder.name}/{split}.jsonl"
        return rows, Origin("folder", identity, sha256=rows.sha256), split

    def _selected(self, rows: Rows, limit: int | float | None) -> Sequence[int]:
        """Indices of the documents that ``limit`` leaves, in the order of the data."""
        if self.complete is None:
            return range(share_of(limit, rows.total))
        members: dict[str, list[int]] = defaultdict(list)
        for index, (doc_id, group) in enumerate(zip(rows.doc_ids, rows.groups, strict=True)):
            if group is None:
                raise DataError(
                    f"E-DATA-03: document {doc_id!r} has no group, and {self.name} is scored by groups: give every row "
                    "its group (the picture, or the base question)."
                )
            members[group].append(index)
        for group, indices in members.items():
            self.complete(group, [rows[i] for i in indices])
        kept = list(members)[: share_of(limit, len(members))]
        return sorted(i for group in kept for i in members[group])


class LoadedBenchmark(Sequence[Sample]):
    """Documents of a benchmark in the order of the data; ``loaded[i]`` parses one, nothing but ids is held in memory.

    ``n_groups``: how many groups that intervals are resampled by. ``partial``: a limit left documents out.
    ``data``: what the documents are, {source, id, revision, sha256}. ``notes``: what a table has to say of them.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        rows: Rows,
        indices: Sequence[int],
        origin: Origin,
        split: str,
        notes: tuple[str, ...],
    ) -> None:
        self.benchmark, self.split, self.notes, self.data = benchmark, split, notes, asdict(origin)
        self._rows, self._indices = rows, indices
        self.partial = len(indices) < rows.total
        self.n_docs = len(indices)
        self.doc_ids = [rows.doc_ids[i] for i in indices]
        groups = (rows.groups[i] for i in indices)
        # A document without a group is one of its own; a tuple cannot be taken for a group's name.
        self.n_groups = len({(d, None) if g is None else g for d, g in zip(self.doc_ids, groups, strict=True)})

    def __len__(self) -> int:
        return self.n_docs

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self._rows[i] for i in self._indices[index]]
        return self._rows[self._indices[index]]


def get(name: str, data_root: Path | str | None = None) -> Benchmark:
    """The benchmark of this name: a registered one, or a folder of the user's below ``data_root``.

    Raises:
        UnknownNameError: neither (E-USE-01).  DataError: the folder's manifest is broken, or names no metric or an
        unknown one (E-DATA-04, 08).
    """
    _import_all()
    if name in _registered:
        return _registered[name]
    folder = None if data_root is None else Path(data_root) / plain_name(name, "benchmark")
    if folder is not None and folder.is_dir():
        return _of_user(name, folder)
    raise UnknownNameError("benchmark", name, names(data_root), code="E-USE-01")


def names(data_root: Path | str | None = None) -> list[str]:
    """Registered benchmarks, and folders with a manifest below ``data_root``."""
    _import_all()
    root = None if data_root is None else Path(data_root)
    own = {path.parent.name for path in root.glob(f"*/{MANIFEST}")} if root else set()
    return sorted(set(_registered) | own)


def every(data_root: Path | str | None = None) -> tuple[list[Benchmark], dict[str, VlmeffError]]:
    """All benchmarks that ``names`` lists, and what is wrong with the folders below ``data_root`` that are broken."""
    found, broken = [], {}
    for name in names(data_root):
        try:
            found.append(get(name, data_root))
        except VlmeffError as error:
            broken[name] = error
    return found, broken


def register(benchmark: Benchmark) -> Benchmark:
    """Add a benchmark under its name; a name that is taken raises."""
    if benchmark.name in _registered:
        raise ValueError(f"benchmark {benchmark.name!r} is registered already")
    _registered[benchmark.name] = benchmark
    return benchmark


def parse_limit(text: str) -> int | float:
    """``--limit`` as typed: digits are a number of groups, anything else a share.

    Raises:
        ConfigError: it is neither (E-USE-02).
    """
    try:
        limit = int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError as error:
        raise ConfigError(
            f"E-USE-02: limit={text!r} is no number: use a number of groups (100) or a share of them (0.1)."
        ) from error
    check_limit(limit)
    return limit


def check_limit(limit: int | float | None) -> None:
    """Raises:
    ConfigError: ``limit`` is neither None, nor an int of 1 or more, nor a float between 0 and 1 (E-USE-02)."""
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1):
        return
    if isinstance(limit, float) and 0 < limit < 1:
        return
    raise ConfigError(
        f"E-USE-02: limit={limit!r} is neither a number of groups (an integer from 1) nor a share of them (a float "
        "between 0 and 1, without both ends); leave it out for all."
    )


def share_of(limit: int | float | None, total: int) -> int:
    """How many of ``total`` a limit leaves. A float is taken as the decimal that is printed: 0.1 of 30 is 3, not 4."""
    if limit is None:
        return total
    return min(total, limit if isinstance(limit, int) else math.ceil(Fraction(repr(float(limit))) * total))


def plain_name(name: str, what: str) -> str:
    """Raises:
    ConfigError: the name is no plain name of a file or folder (E-USE-01)."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise ConfigError(f"E-USE-01: {what}={name!r} must be a plain name, without '/', '\\' or ':'.")
    return name


def enough_references(sample: Sample) -> None:
    """Raises:
    DataError: the consensus of fewer than four references cannot reach 1 (E-DATA-03)."""
    if len(sample.answers) < metrics.get("vqa").min_references:  # type: ignore[attr-defined]
        raise DataError(
            f"E-DATA-03: document {sample.doc_id!r} has {len(sample.answers)} reference answers: a consensus needs at "
            "least 4. Use the metric 'exact'."
        )


_FOLDER_CHECKS: dict[str, Callable[[Sample], object]] = {
    "vqa": enough_references,
    "vqa_evalai": enough_references,
    "choice": gold_letter,
    "yesno": gold_yes,
}


def _of_user(name: str, folder: Path) -> Benchmark:
    """A benchmark from what its manifest says: ``metric`` (required), ``split``, ``prompt_suffix``,
    ``max_new_tokens`` and ``text_only``."""
    manifest = Manifest.read(folder)
    content = manifest.content if manifest else {}
    metric = content.get("metric")
    if metric not in FOLDER_METRICS:
        near = UnknownNameError("metric", metric, FOLDER_METRICS) if metric else "no metric is named."
        raise DataError(f'E-DATA-08: {name}/{MANIFEST}: {near} Set "metric" to one of {", ".join(FOLDER_METRICS)}.')
    files = sorted(path.stem for path in folder.glob("*.jsonl"))
    return Benchmark(
        name=name,
        template=prompts.folder(content.get("prompt_suffix", prompts.PHRASE)),
        metric_name=metric,
        max_new_tokens=content.get("max_new_tokens", 32),
        answer_kind=metric,
        split=content.get("split") or (files[0] if len(files) == 1 else "test"),
        check=_FOLDER_CHECKS.get(metric, lambda sample: None),
        text_only=content.get("text_only", False),
        license_note=content.get("license", ""),
    )


def _import_all() -> None:
    for module in _MODULES:
        importlib.import_module(module)
