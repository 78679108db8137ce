"""From the sample files of finished runs to ``results.json`` and everything that is made from it. No model, no torch.

One benchmark is in memory at a time, and of it the baseline, the presets and one control.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

import vlmeff
from vlmeff.errors import ConfigError, MissingExtraError
from vlmeff.evaluation import page, plots, statistics, tables
from vlmeff.evaluation.comparing import (
    adjust,
    adjust_controls,
    compare,
    compare_with_control,
    controls_of,
    join,
    summarise,
)
from vlmeff.evaluation.results_schema import SCHEMA, Comparison, ControlComparison, Results, Run
from vlmeff.evaluation.runs import Loaded, find_runs, load, metric_of, presentable

logger = logging.getLogger("vlmeff")

# What results.json says of the machine: nothing that names a host, a user or a place on it.
ENVIRONMENT = (
    "python torch transformers vlmeff numpy cuda driver device device_name n_devices threads cpu ram_bytes os git"
).split()
CUT_OFF_WARNING = 0.01  # above this share of cut-off answers the parser may have seen half a sentence


def build_report(
    folder: str | os.PathLike[str],
    *,
    margin: float = 1.0,
    seed: int = 0,
    pictures: page.Pictures | None = None,
    allow_partial_join: bool = False,
    fingerprints: Collection[str] = (),
) -> Results:
    """Read every finished run under ``folder``; write results.json, results.md, frontier.csv/.png, regressions.html.

    The same sample files give the same results.json on any machine.

    Args:
        folder: output directory of an evaluation (or the folder of one model in it).
        margin: accepted loss in points; for MME, whose scale differs, in percent of the baseline's score.
        seed: of every bootstrap.
        pictures: gives the picture (PIL) of a doc_id, or one such callable per benchmark; None: a text in its place.
        allow_partial_join: compare runs on the documents that they share instead of raising E-STAT-01.
        fingerprints: of the runs that the report is about, where ``folder`` holds others as well (``find_runs``).
    Raises:
        ConfigError: E-USE-02, or ``folder`` holds several models.
        DataError: nothing finished is there (E-DATA-02), a broken line (E-DATA-03), an unknown metric (E-DATA-08), runs
            that cannot be compared (E-STAT-01).
    """
    statistics.verdict(None, margin)  # a margin that cannot be is refused before anything is read
    if seed < 0:
        raise ConfigError(f"E-USE-02: seed={seed} cannot seed a generator. Use an integer >= 0.")
    root = Path(folder)
    folders, notes = find_runs(root, fingerprints, every_document=allow_partial_join)
    runs: list[Run] = []
    comparisons: list[Comparison] = []
    beside: list[ControlComparison] = []
    retained: dict[tuple[str, str], np.ndarray] = {}
    sections: list[page.Section] = []
    for benchmark in sorted({f.info["benchmark"] for f in folders}):
        baseline: Loaded | None = None
        presets: list[Loaded] = []
        of_benchmark: list[ControlComparison] = []
        for found in (f for f in folders if f.info["benchmark"] == benchmark):
            loaded = load(found, root, seed)
            runs.append(loaded.run)
            notes += _remarks(loaded.run)
            if loaded.run.kind == "baseline":
                baseline = loaded
            elif baseline is not None and loaded.run.metrics[loaded.run.metric].n:
                pairs = join(baseline, loaded, allow_partial=allow_partial_join)
                comparison, drawn = compare(baseline, loaded, pairs, margin=margin, seed=seed)
                comparisons.append(comparison)
                retained[benchmark, comparison.label] = drawn
                if pairs.unmatched:
                    notes.append(f"{benchmark}, {comparison.label}: {pairs.unmatched} documents are in one run only.")
                if loaded.run.kind == "preset":
                    sections.append(page.collect(loaded.run, pairs, metric_of(found).per_document, pictures))
            if loaded.run.kind == "preset":
                presets.append(loaded)
            for preset in presets if loaded.run.kind == "control" else []:  # a control comes after all presets
                both = all(side.run.metrics[side.run.metric].n for side in (preset, loaded))
                if both and controls_of(preset, [loaded]):
                    pairs = join(loaded, preset, allow_partial=allow_partial_join)
                    of_benchmark.append(compare_with_control(loaded, preset, pairs, seed=seed))
        order = [preset.run.id for preset in presets]
        beside += sorted(of_benchmark, key=lambda c: order.index(c.preset))
    if len({json.dumps(f.info["environment"], sort_keys=True) for f in folders}) > 1:
        notes.append("The runs come from different environments; speed-ups between those are left out.")
    first = folders[0].info
    results = Results(
        schema=SCHEMA,
        vlmeff=vlmeff.__version__,
        created=max(f.info["created"] for f in folders),
        partial=any(run.partial for run in runs),
        margin=margin,
        seed=seed,
        environment={k: v for k, v in presentable(first["environment"]).items() if k in ENVIRONMENT},
        model=presentable(first["model"]),
        runs=runs,
        comparisons=adjust(comparisons),
        against_controls=adjust_controls(beside),
        retained=summarise(comparisons, retained),
        notes=notes,
    )
    text = json.dumps(results.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(root / "results.json", text + "\n")
    write_atomically(root / "results.md", tables.markdown(results))
    write_atomically(root / "frontier.csv", plots.frontier_csv(results))
    write_atomically(root / "regressions.html", page.html_page(results, sections))
    try:
        plots.frontier_png(results, root / "frontier.png")
    except MissingExtraError as error:  # the figures are worth having without the picture of them
        logger.warning("frontier.png is left out: %s", error)
    return results


def _remarks(run: Run) -> list[str]:
    where, out = f"{run.benchmark}, {run.label}", []
    if not run.metrics[run.metric].n:
        out.append(f"{where}: there is no document that {run.metric} is about.")
    if run.errors:
        out.append(f"{where}: errors {run.errors}; these documents count as wrong.")
    if run.hit_max > CUT_OFF_WARNING:
        out.append(f"{where}: {run.hit_max:.1%} of the answers were cut off at max_new_tokens; raise it.")
    return out


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that a reader finds the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
