"""Plots of a training run, written to files only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def plot_training(history: Sequence[dict[str, Any]], path: str | Path, *, title: str = "") -> None:
    """Draw loss (with the validation losses) above the gradient norm, with lines where the rank of Phi changes.

    Args:
        history: rows of the log: "step", "loss", "grad_norm", "rank", and rows with "validation".
        path: a file whose suffix names the format (.png, .svg, .pdf).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in history if "loss" in row]
    checks = [row for row in history if "validation" in row]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state as pyplot has
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["loss"] for row in rows], linewidth=0.8, label="training")
    if checks:
        at = [row["step"] for row in checks]
        top.plot(at, [row["validation"] for row in checks], "o-", markersize=3, label="held out")
        top.plot(at, [row["validation_without_phi"] for row in checks], "x--", markersize=4, label="held out, no Phi")
    bottom.plot(steps, [row["grad_norm"] for row in rows], linewidth=0.8, color="tab:red")
    changes = [now["step"] for before, now in pairwise(rows) if now["rank"] != before["rank"]]
    for axis, label in ((top, "loss (mean squared error)"), (bottom, "gradient norm")):
        axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for step in changes:
            axis.axvline(step, color="gray", linestyle=":", linewidth=0.8)
    top.legend()
    top.set_title(title or "dotted: the rank of Phi changes")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
