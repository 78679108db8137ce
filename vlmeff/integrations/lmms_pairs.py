"""Two runs of lmms-eval compared document by document, from the samples that it logs. No torch, no lmms-eval.

lmms-eval logs no picture id, so every document is a group of its own here: where several questions share a picture,
the intervals are narrower than those of ``vlmeff eval``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmeff.errors import DataError
from vlmeff.evaluation import statistics
from vlmeff.evaluation.samples import SampleRow

# What lmms-eval writes about a document besides its metrics.
ABOUT = frozenset("doc_id doc doc_hash target arguments input input_media resps filtered_resps token_counts".split())
# lmms-eval 0.7.3 hashes a document that it has dropped already, which gives the same hash for all; prompt and target
# are compared too.
SAME = ("doc_hash", "input", "target")


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One metric of one task: ``delta`` = candidate - baseline of the mean over ``n`` documents, in the metric's unit.

    ``metric``: where several have the same score for every document, the first. ``p``: exact McNemar test, None for
    scores other than 0 and 1; ``p_holm``: adjusted over all rows of the report.
    """

    task: str
    candidate: str
    metric: str
    n: int
    baseline: float
    value: float
    delta: float
    ci95: tuple[float, float] | None
    verdict: str
    p: float | None
    agreement: float
    p_holm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_samples(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a sample file by ``doc_id``.

    Raises:
        DataError: a line is not JSON, or lacks an id, or a document is there twice.
    """
    out: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            name = str(row["doc_id"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"E-DATA-03: {file.name} line {number} is not a sample of lmms-eval.") from error
        if name in out:
            raise DataError(f"E-STAT-01: {file.name} has the document {name!r} twice. Run lmms-eval again.")
        out[name] = row
    return out


def compare(
    task: str,
    candidate_name: str,
    baseline: dict[str, dict[str, Any]],
    candidate: dict[str, dict[str, Any]],
    *,
    margin: float = 1.0,
    seed: int = 0,
) -> list[Paired]:
    """A row for each metric that has a number for every document; [] where there is none.

    Args:
        margin: in points (hundredths of the metric's unit).
    Raises:
        DataError: E-STAT-01, the runs have different documents, prompts or targets.
    """
    for name in sorted(baseline.keys() & candidate.keys()):
        for key in SAME:
            if baseline[name].get(key) != candidate[name].get(key):
                raise DataError(
                    f"E-STAT-01: task {task!r}: document {name!r} has another {key} in {candidate_name} than in the "
                    "baseline. Run both on the same data with the same lmms-eval."
                )
    out: list[Paired] = []
    seen: list[tuple[list[float], list[float]]] = []
    for metric in _metrics(baseline):
        pairs = statistics.join(_rows(baseline, metric), _rows(candidate, metric))
        before = [row.scores[metric] for row in pairs.baseline]
        after = [row.scores[metric] for row in pairs.candidate]
        if (before, after) in seen:  # POPE logs one score under the names of its five figures
            continue
        seen.append((before, after))
        change = np.array(after) - np.array(before)
        drawn = statistics.bootstrap_mean(change, None, rng=np.random.default_rng(seed))
        binary = set(before) | set(after) <= {0.0, 1.0}
        p = statistics.mcnemar(int((change > 0).sum()), int((change < 0).sum())) if binary else None
        out.append(
            Paired(
                task=task,
                candidate=candidate_name,
                metric=metric,
                n=len(change),
                baseline=float(np.mean(before)),
                value=float(np.mean(after)),
                delta=drawn.value,
                ci95=drawn.interval,
                verdict=statistics.verdict(drawn.interval, margin / 100),
                p=p,
                agreement=statistics.agreement(pairs),
            )
        )
    return out


def adjust(rows: Sequence[Paired]) -> list[Paired]:
    """Holm's adjustment over all rows that have a test."""
    tests = [i for i, row in enumerate(rows) if row.p is not None]
    adjusted = dict(zip(tests, statistics.holm([rows[i].p or 0.0 for i in tests]), strict=True))
    return [dataclasses.replace(row, p_holm=adjusted.get(i)) for i, row in enumerate(rows)]


def score_of(value: Any) -> float | None:
    """The number that lmms-eval logged for one document: itself, or under "score"; None for anything else."""
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _metrics(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Names under which every document that has them has a number (MME logs each document under one of two)."""
    names = dict.fromkeys(name for row in rows.values() for name in row if name not in ABOUT)
    return [name for name in names if all(score_of(row[name]) is not None for row in rows.values() if name in row)]


def _rows(samples: dict[str, dict[str, Any]], metric: str) -> list[SampleRow]:
    out = []
    for name, sample in samples.items():
        score = score_of(sample.get(metric))
        if score is not None:
            text = sample.get("filtered_resps")
            out.append(SampleRow(doc_id=name, prediction=json.dumps(text, sort_keys=True), scores={metric: score}))
    return out
