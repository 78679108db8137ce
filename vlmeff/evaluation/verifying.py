"""``vlmeff eval verify``: run what a zoo entry claims again, and compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmeff import zoo
from vlmeff.errors import ConfigError
from vlmeff.evaluation import benchmarks
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import Results
from vlmeff.evaluation.runner import Progress, Settings, Shard, evaluate

SCALE = {"points": 100.0, "share": 1.0, "score": 1.0}


@dataclass(frozen=True)
class Check:
    """One figure of one expected row: what the zoo says and what was measured, in the row's unit."""

    benchmark: str
    metric: str
    run: str
    expected: float
    measured: float | None
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.measured is not None and abs(self.measured - self.expected) <= self.tolerance


def verify_entry(
    name: str, output: Path, *, progress: Progress | None = None, change: Callable[[Settings], Settings] = lambda s: s
) -> list[Check]:
    """Evaluate the model of a zoo entry unwrapped and with its preset on each expected row; returns the comparison.

    Args:
        name: an entry, such as "tiny-llava/fast".
        output: where the runs are written; what is there already is not run again.
        change: of the settings of each evaluation (device, data_root, ...).
    Raises:
        UnknownNameError: no such entry.  ConfigError: the entry expects nothing.  What ``evaluate`` raises.
    """
    entry = zoo.get(name)
    if not entry.expected:
        raise ConfigError(
            f"eval verify: {name!r} has no expected figures in the model zoo, so nothing can be compared."
        )
    for row in entry.expected:
        benchmarks.get(row.benchmark)  # raises for a name that does not exist, before anything runs
    checks: list[Check] = []
    for benchmark, limit in dict.fromkeys((row.benchmark, row.limit) for row in entry.expected):
        folder = output / f"{benchmark}-{limit or 'all'}"
        settings = change(
            Settings(
                model=entry.model,
                output=folder,
                presets=(entry.preset,),
                benchmarks=(benchmark,),
                controls=(),
                limit=limit,
                perf="accuracy",
            )
        )
        evaluate(settings, shard=Shard(), progress=progress)
        results = build_report(folder)
        for row in entry.expected:
            if (row.benchmark, row.limit) == (benchmark, limit):
                checks += compare(row, results)
    return checks


def compare(row: Any, results: Results) -> list[Check]:
    """The baseline and the preset of one expected row."""
    out = []
    for kind, expected in (("baseline", row.baseline), ("preset", row.value)):
        run = next(r for r in results.runs_of(row.benchmark) if r.kind == kind)
        found = run.metrics.get(row.metric)
        measured = None if found is None or found.value is None else SCALE[row.unit] * found.value
        out.append(Check(row.benchmark, row.metric, run.label, expected, measured, row.tolerance))
    return out
