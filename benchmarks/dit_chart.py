"""The chart of ``dit_quality.py``: latent error over the bytes of the transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {
    "8 bit": "#1f6fb4",
    "4 bit": "#d1495b",
    "svdq": "#2a9d5c",
    "cache": "#7b5ea7",
    "trained": "#e08e1b",
    "dropped": "#6c757d",
}
NAMES = {
    "8 bit": "8-bit weights",
    "4 bit": "4- and 3-bit weights",
    "svdq": "4-bit weights, low-rank branch",
    "cache": "8-bit weights, first-block cache",
    "trained": "trained at 4 and 3 bits",
    "dropped": "blocks dropped",
}
LINE = 0.028  # height of a label, as a share of the axes'


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the chart (.png). Labels stand right of their points and are moved apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: row for name, row in result["settings"].items() if row["group"] in COLORS}
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(11.5, 8), dpi=120)
    for group, color in COLORS.items():
        points = [row for row in rows.values() if row["group"] == group]
        x = [row["transformer_bytes"] / 2**20 for row in points]
        axes.scatter(x, [row["latent_error"] for row in points], color=color, s=36, label=NAMES[group], zorder=3)
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    full = result["settings"]["unwrapped"]["transformer_bytes"] / 2**20
    axes.axvline(full, color="#888888", linewidth=1, linestyle=":")
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, full) + 0.30 * (max(high, full) - low))
    axes.annotate("unwrapped", (full, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=8)
    axes.set_xlabel("MiB of the transformer (unquantized parts in float32)")
    axes.set_ylabel("relative error of the final latents, mean over clips")
    clips = result["settings"]["unwrapped"]["clips"]
    axes.set_title(f"tiny-wan, {clips} clips from the same noise as the full-precision pipeline", fontsize=11)
    axes.legend(loc="lower right", fontsize=8)
    _label(axes, rows)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _label(axes: Any, rows: dict[str, Any]) -> None:
    """Names beside the points: from below up, each at least a line above the one before it in its neighbourhood."""
    to_share = axes.transData + axes.transAxes.inverted()
    places = []
    for name, row in rows.items():
        x, y = to_share.transform((row["transformer_bytes"] / 2**20, row["latent_error"]))
        places.append((float(y), float(x), name, row["group"]))
    done: list[tuple[float, float]] = []
    for y, x, name, group in sorted(places):
        at = y
        for other_x, other_y in sorted(done, key=lambda place: place[1]):
            if abs(other_x - x) < 0.22 and abs(other_y - at) < LINE:
                at = other_y + LINE
        done.append((x, at))
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.02, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=COLORS[group],
            arrowprops={
                "arrowstyle": "-",
                "color": COLORS[group],
                "linewidth": 0.4,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
