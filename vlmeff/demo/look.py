"""How the page looks: theme, style sheet, and the small pieces of HTML that tabs share. Everything is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

BASELINE, PRESET = "#7a8794", "#0b8f6a"

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.vl-head h1 { font-size: 1.5rem; margin: 0; }
.vl-head p, .vl-note { color: var(--body-text-color-subdued); margin: .15rem 0 0; }
.vl-status { min-height: 1.6rem; color: var(--body-text-color-subdued); }
.vl-table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.vl-table th, .vl-table td { padding: .3rem .6rem; border-bottom: 1px solid var(--border-color-primary); }
.vl-table th { text-align: left; font-weight: 600; }
.vl-table td { text-align: right; }
.vl-table thead th { text-align: right; color: var(--body-text-color-subdued); }
.vl-table thead th:first-child { text-align: left; }
.vl-legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; min-height: 1.6rem; }
.vl-legend i { display: inline-block; width: .85rem; height: .85rem; border-radius: .2rem; margin-right: .35rem;
  vertical-align: -.1rem; border: 1px solid var(--border-color-primary); }
.vl-bars { display: grid; grid-template-columns: auto 1fr; gap: .35rem .8rem; align-items: center; }
.vl-bars .name { white-space: nowrap; }
.vl-bars .pair { display: grid; gap: 2px; }
.vl-bars .bar { display: flex; align-items: center; gap: .4rem; font-size: .8rem; }
.vl-bars .bar b { display: block; height: .6rem; border-radius: .15rem; min-width: 2px; }
@media (max-width: 640px) { .vl-table th, .vl-table td { padding: .25rem .3rem; font-size: .9rem; } }
"""


def theme() -> Any:
    import gradio as gr

    return gr.themes.Default(primary_hue="emerald", neutral_hue="slate", font=["system-ui", "sans-serif"])


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """An HTML table; the first cell of a row is its heading."""
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = []
    for name, *values in body:
        row = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<table class="vl-table">{title}<thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def bars(shares: Iterable[tuple[str, float]], *, unit: str = "of the baseline") -> str:
    """Each cost of the preset as a bar below the baseline's full one; longer than that where it costs more."""
    shares = list(shares)
    longest = max([1.0, *(share for _, share in shares)])
    lines = []
    for name, share in shares:
        pair = "".join(
            f'<div class="bar"><b style="width:{80 * value / longest:.1f}%;background:{color}"></b>{value:.0%}</div>'
            for value, color in ((1.0, BASELINE), (share, PRESET))
        )
        label = html.escape(f"{name}: {share:.0%} {unit}")
        lines.append(
            f'<div class="name">{html.escape(name)}</div><div class="pair" role="img" aria-label="{label}">{pair}</div>'
        )
    return f'<div class="vl-bars">{"".join(lines)}</div>' if lines else ""


def legend(entries: Iterable[tuple[str, tuple[int, int, int]]], text: str = "") -> str:
    parts = [f'<span><i style="background:rgb{tuple(color)}"></i>{html.escape(name)}</span>' for name, color in entries]
    return f'<div class="vl-legend"><strong>{html.escape(text)}</strong>{"".join(parts)}</div>'


def status(text: str) -> str:
    return f'<div class="vl-status" role="status" aria-live="polite">{html.escape(text)}</div>'


def note(text: str) -> str:
    return f'<p class="vl-note">{html.escape(text)}</p>'
