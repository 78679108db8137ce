"""Accuracy against tokens and against time: ``frontier.csv`` and ``frontier.png`` (matplotlib, extra ``eval``)."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmeff.errors import MissingExtraError
from vlmeff.evaluation.results_schema import Results

COLUMNS = (
    "benchmark label kind retained_percent ci95_low ci95_high token_ratio ttft_speedup "
    "on_token_frontier on_time_frontier"
).split()


@dataclass(frozen=True)
class Point:
    """A run in the plot. ``retained``: accuracy in % of the baseline's; None where something was not measured."""

    label: str
    kind: str
    retained: float | None
    interval: tuple[float, float] | None
    token_ratio: float | None
    speedup: float | None


def points(results: Results) -> list[Point]:
    """The baseline at ratio 1, speed-up 1, 100 %, and every preset and control, averaged over the benchmarks."""
    runs = [Point(r.label, r.kind, r.mean, r.ci95, r.token_ratio, r.ttft_speedup) for r in results.retained]
    return [Point("baseline", "baseline", 100.0, None, 1.0, 1.0), *runs] if runs else []


def pareto(where: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (gain, accuracy) pairs than which no other is at least as good in both and better in one."""
    return [i for i, (x, y) in enumerate(where) if not any(a >= x and b >= y and (a > x or b > y) for a, b in where)]


def frontier(all_points: Sequence[Point], axis: str) -> list[Point]:
    """The Pareto-optimal points by ``axis`` ("token_ratio": less is better, "speedup": more is), along it."""
    sign = -1.0 if axis == "token_ratio" else 1.0
    placed = [p for p in all_points if p.retained is not None and getattr(p, axis) is not None]
    best = [placed[i] for i in pareto([(sign * getattr(p, axis), p.retained or 0.0) for p in placed])]
    return sorted(best, key=lambda p: getattr(p, axis))


def frontier_csv(results: Results) -> str:
    """The figures of the plot (benchmark "mean"), then those of each benchmark, as CSV with a header."""
    every = points(results)
    tokens, time = frontier(every, "token_ratio"), frontier(every, "speedup")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for p in every:
        low, high = p.interval or (None, None)
        row = ["mean", _cell(p.label), p.kind, p.retained, low, high, p.token_ratio, p.speedup]
        writer.writerow([*row, int(p in tokens), int(p in time)])
    for c in results.comparisons:
        speedup = c.speedup.ttft if c.speedup else None
        low, high = c.retained_ci95 or (None, None)
        row = [_cell(c.benchmark), _cell(c.label), c.kind, c.retained, low, high, c.token_ratio, speedup]
        writer.writerow([*row, "", ""])
    return out.getvalue()


def frontier_png(results: Results, path: str | os.PathLike[str]) -> bool:
    """Draw retained accuracy against the speed-up of the TTFT (where measured) and against visual tokens.

    Presets are filled, controls hollow, Pareto-optimal points joined; without any comparison nothing is drawn (False).
    """
    every = points(results)
    axes = [axis for axis in ("speedup", "token_ratio") if any(getattr(p, axis) is not None for p in every[1:])]
    axes = [axis for axis in axes if any(p.retained is not None and getattr(p, axis) is not None for p in every[1:])]
    if not axes:
        Path(path).unlink(missing_ok=True)  # one of an earlier report would contradict the other files
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval", "plots") from error
    figure = Figure(figsize=(6.4 * len(axes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    for axis, ax in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        _draw(ax, every, axis)
    names = ", ".join(results.retained[0].benchmarks)
    partial = " (partial run)" if results.partial else ""
    figure.suptitle(_plain(f"{results.model.get('id', 'model')}: mean over {names}{partial}"), fontsize=10)
    part = Path(path).with_name(f".{Path(path).name}.part")
    figure.savefig(part, dpi=150, format="png", metadata={"Software": "vlmeff"})
    os.replace(part, path)
    return True


def _draw(ax: Any, every: Sequence[Point], axis: str) -> None:
    placed = [p for p in every if p.retained is not None and getattr(p, axis) is not None]
    best = frontier(every, axis)
    if len(best) > 1:
        xy = [(getattr(p, axis), p.retained) for p in best]
        ax.plot([x for x, _ in xy], [y for _, y in xy], color="0.6", linewidth=1, zorder=1, label="Pareto-optimal")
    styles = {"baseline": ("black", "black", "D"), "preset": ("C0", "C0", "o"), "control": ("C1", "none", "s")}
    for kind, (edge, face, marker) in styles.items():
        of_kind = [p for p in placed if p.kind == kind]
        if not of_kind:
            continue
        xs, ys = [getattr(p, axis) for p in of_kind], [p.retained or 0.0 for p in of_kind]
        spans = [p.interval or (y, y) for p, y in zip(of_kind, ys, strict=True)]
        errors = [[max(0.0, y - low) for y, (low, _) in zip(ys, spans, strict=True)],
                  [max(0.0, high - y) for y, (_, high) in zip(ys, spans, strict=True)]]  # fmt: skip
        ax.errorbar(
            xs, ys, yerr=errors, fmt=marker, color=edge, markerfacecolor=face, markersize=7, capsize=3, label=kind
        )
    ax.set_ylabel("retained accuracy, % of the baseline")
    ax.margins(x=0.15, y=0.12)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="best")
    if axis == "speedup":
        ax.set_xlabel("speed-up of the time to first token (median per document)")
    else:
        ax.set_xlabel("visual tokens seen by the language model / baseline")
        ax.invert_xaxis()  # better is to the right in both panels
    _name(ax, [(getattr(p, axis), p.retained or 0.0, _plain(p.label)) for p in placed])


def _name(ax: Any, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write the names beside their points, inwards from the nearer edge, none on top of another."""
    size, line, reach = 8, 11.0, 110.0  # points of type: of the letters, of a line, width within which names can meet
    # Margins and the direction of the axes are set, but the layout is not drawn yet: positions follow from the limits.
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    width, height = 72 * 6.4 * 0.85, 72 * 4.8 * 0.8
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(labels, key=lambda label: -label[1]):
        at, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0) * height
        right = at > 0.6
        place = up
        while any(abs(at * width - other) < reach and abs(place - level) < line for other, level in taken):
            place -= 1.0
        taken.append((at * width, place))
        ax.annotate(
            name,
            (x, y),
            xytext=(-8 if right else 8, place - up),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=size,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
            # A label that had to give way points at what it names.
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if place < up - size else None,
        )


def _cell(value: str) -> str:
    """A label that a spreadsheet does not take for a formula."""
    return "'" + value if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib would read mathematics
