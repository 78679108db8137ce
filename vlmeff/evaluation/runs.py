"""Finished runs on disk: which there are, their rows, and what one run scored and cost. No torch."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from vlmeff.errors import ConfigError, DataError, UnknownNameError
from vlmeff.evaluation import statistics
from vlmeff.evaluation.metrics import Metric, metrics
from vlmeff.evaluation.results_schema import Cost, Latency, MetricValue, Quantiles, Run
from vlmeff.evaluation.samples import SampleRow
from vlmeff.zoo_yaml import ABSOLUTE_PATH, SECRET

RUN_SCHEMA = "vlmeff.run/1"
# Metrics in points of their own: printed as they are, images resampled within categories, margin in % of the baseline.
POINTS = frozenset({"mme"})
KINDS = ("baseline", "preset", "control")
REQUIRED = "model environment parameters benchmark data partial fingerprint created metric".split()


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A finished run on disk: its folder and its ``run.json``. ``suffix`` tells runs of one label apart."""

    path: Path
    info: dict[str, Any]
    suffix: str = ""

    @property
    def label(self) -> str:
        """What tables call the run: baseline, the preset, or the control with the preset whose budget it has."""
        preset, control = self.info.get("preset"), self.info.get("control")
        if self.info["kind"] == "control":
            name = f"{control} ({preset})" if preset else str(control)
        else:
            name = "baseline" if self.info["kind"] == "baseline" else str(preset or "custom")
        return name + self.suffix

    @property
    def identity(self) -> str:
        """Runs with the same identity are the same run at different times; the newest counts."""
        parameters = {} if self.info["kind"] == "baseline" else self.info["parameters"]
        key = [self.info["benchmark"], self.info["kind"], self.label, parameters, self.info["model"], self.documents]
        return json.dumps(key, sort_keys=True)

    @property
    def data(self) -> list[Any]:
        """What two runs must have in common to be compared."""
        data = self.info["data"]
        return [data.get("id"), data.get("revision"), data.get("sha256"), self.info.get("prompt")]

    @property
    def documents(self) -> Any:
        """How many documents the run is about: another limit is another run."""
        return self.info["data"].get("n_docs")

    def rows(self) -> list[SampleRow]:
        """Every line of ``samples.jsonl``; raises E-DATA-03 for one that cannot be read."""
        rows, path = [], self.path / "samples.jsonl"
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(SampleRow.from_json(json.loads(line)))
                except (ValueError, TypeError, AttributeError) as error:
                    raise DataError(
                        f"E-DATA-03: {path}, line {number} is not a sample row ({error}). Run the evaluation again; it "
                        "goes on where the rank files end."
                    ) from error
        return rows


@dataclass(frozen=True, eq=False)
class Loaded:
    """A run in memory. ``bootstrap`` is that of its headline figure; ``is_mean``: that is a mean over documents."""

    folder: RunFolder
    rows: list[SampleRow]
    run: Run
    is_mean: bool
    bootstrap: statistics.Bootstrap


def find_runs(
    root: Path, fingerprints: Collection[str] = (), *, every_document: bool = False
) -> tuple[list[RunFolder], list[str]]:
    """Finished runs under ``root`` in the order of the tables, the newest of each; and notes on what is left out.

    A benchmark's runs of another number of documents (another limit) than the newest one are left out, for they cannot
    be compared, unless ``every_document``. ``fingerprints``: of the runs that the report is about; their model
    and documents count, not the newest.
    """
    newest: dict[str, RunFolder] = {}
    notes = []
    for path in sorted(root.rglob("run.json")):
        if any(".bak-" in part for part in path.relative_to(root).parts):
            continue
        name = path.parent.relative_to(root).as_posix()
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            if info["schema"] != RUN_SCHEMA or info["kind"] not in KINDS:
                raise ValueError(f"its schema is {info['schema']!r} (not {RUN_SCHEMA!r}), its kind {info['kind']!r}")
            if missing := [key for key in REQUIRED if key not in info]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            found = RunFolder(path.parent, info)
            identity = found.identity
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"E-DATA-03: {path} is not a run of vlmeff eval: {error}. Move it away.") from error
        if not (path.parent / "done.json").exists() or not (path.parent / "samples.jsonl").exists():
            notes.append(f"{name} is not finished and is left out.")
            continue
        known = newest.get(identity)
        if known is not None:
            older = min(known, found, key=lambda f: f.info["created"])
            notes.append(f"{older.path.relative_to(root).as_posix()} is left out: there is a newer run of the same.")
        if known is None or found.info["created"] >= known.info["created"]:
            newest[identity] = found
    if not newest:
        raise DataError(f"E-DATA-02: there is no finished run under {root}. Run vlmeff eval --output {root} first.")
    newest = _comparable(newest, fingerprints, notes, every_document=every_document)
    models = {json.dumps(f.info["model"], sort_keys=True): f for f in newest.values()}
    if len(models) > 1:
        names = sorted({f.path.relative_to(root).parts[0] for f in models.values()})
        raise ConfigError(
            f"folder={str(root)!r} holds runs of {len(models)} models or variants ({', '.join(names)}): a report "
            "is about one. Report on the folder of a model, and use another --output for another dtype or revision."
        )
    labels = Counter((f.info["benchmark"], f.label) for f in newest.values())
    told_apart = [
        replace(f, suffix=f" [{f.info['fingerprint'][:4]}]") if labels[f.info["benchmark"], f.label] > 1 else f
        for f in newest.values()
    ]
    return sorted(told_apart, key=_place), notes


def _place(folder: RunFolder) -> tuple[int, str, str]:
    """In tables: baseline, presets as they were started, controls by name, whatever the second in which they began."""
    kind = folder.info["kind"]
    return KINDS.index(kind), "" if kind == "control" else folder.info["created"], folder.label


def _comparable(
    found: dict[str, RunFolder], fingerprints: Collection[str], notes: list[str], *, every_document: bool
) -> dict[str, RunFolder]:
    """The runs of one model variant and, in each benchmark, of the same documents."""
    about = [f for f in found.values() if f.info["fingerprint"] in fingerprints]
    if about:
        found = {k: f for k, f in found.items() if f.info["model"] == about[0].info["model"]}
    chosen: dict[str, RunFolder] = {}
    for folder in sorted(found.values(), key=lambda f: (f in about, f.info["created"])):
        chosen[folder.info["benchmark"]] = folder
    out = {}
    for key, folder in found.items():
        reference = chosen[folder.info["benchmark"]]
        if every_document or None in (folder.documents, reference.documents) or folder.documents == reference.documents:
            out[key] = folder
        else:
            notes.append(
                f"{folder.info['benchmark']}, {folder.label} is left out: it is of {folder.documents} documents, the "
                f"report of {reference.documents}."
            )
    return out


def presentable(value: Any) -> Any:
    """``value`` as JSON that may be published: no NaN, of an absolute path only its last part, nothing secret."""
    if isinstance(value, dict):
        return {str(k): presentable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [presentable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str):
        return value
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive:  # the whole of it, blanks included
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return SECRET.sub("(removed)", re.sub(r"\S+", lambda word: _last_part(word[0]), value))


def _last_part(word: str) -> str:
    return re.split(r"[\\/]", word.rstrip("\\/"))[-1] if ABSOLUTE_PATH.search(word) else word


def metric_of(folder: RunFolder) -> Metric:
    """The metric that scored the run; raises E-DATA-08."""
    try:
        return metrics.get(folder.info["metric"])()
    except UnknownNameError as error:
        raise DataError(f"E-DATA-08: {error}") from error


def document_score(row: SampleRow, key: str) -> float | None:
    """The score pairs are compared by; None: the figure is not about this document. One that failed counts as wrong."""
    if row.error is not None:
        return 0.0 if key in row.scores or not row.scores else None
    value = row.scores.get(key)
    return None if value is None else float(value)


def seed_of(seed: int, benchmark: str) -> list[int]:
    """Benchmarks draw independently of each other, runs of one benchmark draw alike."""
    return [seed, zlib.crc32(benchmark.encode())]


def _is_mean(rows: Sequence[SampleRow], metric: Metric) -> bool:
    """Whether the headline is the mean of the per-document score, on all rows and on two parts of them."""
    in_order = sorted({statistics.group_of(row) for row in rows})
    half = set(in_order[: len(in_order) // 2])
    parts = [
        list(rows),
        [r for r in rows if statistics.group_of(r) in half],
        [r for r in rows if statistics.group_of(r) not in half],
    ]
    for part in parts:
        scores = [s for s in (document_score(row, metric.per_document) for row in part) if s is not None]
        if scores and not math.isclose(metric.aggregate(part)[metric.headline], np.mean(scores), abs_tol=1e-9):
            return False
    return True


def mean_of_known(values: Iterable[float | int | None]) -> float | None:
    """The mean of what is known; None where nothing is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def load(folder: RunFolder, root: Path, seed: int) -> Loaded:
    """Read a run and say what it scored and cost; paths become relative to ``root``."""
    info, rows, metric = folder.info, folder.rows(), metric_of(folder)
    if not rows:
        raise DataError(f"E-DATA-02: {folder.path / 'samples.jsonl'} is empty. Run the evaluation again.")
    figures = {metric.headline: math.nan, **metric.aggregate(rows)}  # a figure without documents is left out there
    scores = [(document_score(row, metric.per_document), statistics.group_of(row)) for row in rows]
    scored = [(s, g) for s, g in scores if s is not None]
    is_mean = info["metric"] not in POINTS and _is_mean(rows, metric)
    if not scored:
        bootstrap = statistics.Bootstrap(math.nan, None, np.empty(0))
    elif is_mean:
        rng = np.random.default_rng(seed_of(seed, info["benchmark"]))
        bootstrap = statistics.bootstrap_mean(np.array([s for s, _ in scored]), [g for _, g in scored], rng=rng)
    else:
        bootstrap = resample(rows, metric, info, seed)
    values = {
        name: MetricValue(
            value=presentable(float(value)),
            ci95=bootstrap.interval if name == metric.headline else None,
            n=len(scored) if name == metric.headline else len(rows),
        )
        for name, value in figures.items()
    }
    tokens_in, kept = sum(r.visual_tokens_in for r in rows), sum(r.visual_tokens_kept for r in rows)
    n = len(rows)
    run = Run(
        id=f"{folder.path.parent.name}/{folder.path.name}",
        label=folder.label,
        kind=info["kind"],
        preset=info.get("preset"),
        control=info.get("control"),
        parameters=presentable(info["parameters"]),
        benchmark=info["benchmark"],
        data=presentable(info["data"]),
        partial=info["partial"],
        metric=metric.headline,
        scale=1.0 if info["metric"] in POINTS else 100.0,
        metrics=values,
        cost=Cost(
            visual_tokens_in=tokens_in / n,
            visual_tokens_kept=kept / n,
            visual_tokens_layer_mean=mean_of_known(r.visual_tokens_layer_mean for r in rows),
            kept_ratio=kept / tokens_in if tokens_in else None,
            prompt_tokens=sum(r.prompt_tokens for r in rows) / n,
            prefill_tokens=sum(r.prefill_tokens for r in rows) / n,
            output_tokens=sum(r.output_tokens for r in rows) / n,
            kv_bytes_prefill=mean_of_known(r.kv_bytes_prefill for r in rows),
            kv_bytes_end=mean_of_known(r.kv_bytes_end for r in rows),
            prefill_gflops=mean_of_known(r.prefill_gflops for r in rows),
        ),
        latency=_latency(rows, info),
        unparsed=sum(r.unparsed for r in rows) / n,
        errors=sum(r.error is not None for r in rows),
        hit_max=sum(r.hit_max for r in rows) / n,
        caption_notes=[str(note) for note in presentable(info.get("caption_notes") or [])],
        fingerprint=info["fingerprint"],
        created=info["created"],
        samples=(folder.path / "samples.jsonl").relative_to(root).as_posix(),
    )
    return Loaded(folder, rows, run, is_mean, bootstrap)


def resample(rows: Sequence[SampleRow], metric: Metric, info: dict[str, Any], seed: int) -> statistics.Bootstrap:
    """The headline figure and its bootstrap, through the metric's own aggregate."""
    return statistics.bootstrap_aggregate(
        rows,
        metric.aggregate,
        metric.headline,
        seed=seed_of(seed, info["benchmark"]),
        within_categories=info["metric"] in POINTS,
    )


def decode_ms(row: SampleRow) -> float | None:
    """Milliseconds for each token after the first."""
    if row.ttft_ms is None or row.e2e_ms is None or row.output_tokens < 2:
        return None
    return (row.e2e_ms - row.ttft_ms) / (row.output_tokens - 1)


def may_be_timed(info: dict[str, Any]) -> bool:
    """Whether the times of a run mean anything: not those of answers that came from a cache."""
    return not (info.get("perf") or {}).get("response_cache")


def _quantiles(values: Iterable[float | None]) -> Quantiles | None:
    known = [v for v in values if v is not None]
    return Quantiles(p50=float(np.median(known)), p95=float(np.percentile(known, 95))) if known else None


def _latency(rows: Sequence[SampleRow], info: dict[str, Any]) -> Latency | None:
    timed = [r for r in rows if r.error is None and r.timing_valid and (r.ttft_ms is not None or r.e2e_ms is not None)]
    if not timed or not may_be_timed(info):
        return None
    decode, preprocess = _quantiles(map(decode_ms, timed)), _quantiles(r.preprocess_ms for r in timed)
    return Latency(
        valid=True,
        n=len(timed),
        ttft_ms=_quantiles(r.ttft_ms for r in timed),
        e2e_ms=_quantiles(r.e2e_ms for r in timed),
        decode_ms_per_token=decode.p50 if decode else None,
        preprocess_ms=preprocess.p50 if preprocess else None,
        peak_mem_bytes=max((r.peak_mem_bytes for r in timed if r.peak_mem_bytes is not None), default=None),
    )
