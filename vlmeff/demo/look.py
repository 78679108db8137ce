"""How the page looks: theme, style sheet, and the small pieces of HTML that tabs share. Everything is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

BASELINE, PRESET = "#7a8794", "#0b8f6a"

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#head { align-items: center; }
.vl-head h1 { font-size: 1.5rem; margin: 0; }
.vl-head p, .vl-note { color: var(--body-text-color-subdued); margin: .15rem 0 0; }
.vl-status { min-height: 1.6rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.vl-verdict { min-height: 3.2rem; overflow-wrap: anywhere; }
.vl-block { margin: 0 0 1.4rem; overflow-x: auto; }
.vl-table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.vl-table, .vl-table thead, .vl-table tbody, .vl-table tr { border: 0 !important; }
.vl-table th, .vl-table td { padding: .3rem .6rem !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; vertical-align: top; }
/* A shadow at the side where a table goes on. */
.vl-scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--body-background-fill) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--body-background-fill) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, rgb(0 0 0 / .25), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, rgb(0 0 0 / .25), transparent) right / .8rem 100% no-repeat scroll; }
.vl-table th { text-align: left; font-weight: 600; }
.vl-table td { text-align: right; }
.vl-table thead th { text-align: right; color: var(--body-text-color-subdued); }
.vl-table thead th:first-child { text-align: left; }
.vl-table caption { text-align: left; padding: .3rem .6rem; color: var(--body-text-color-subdued); }
.vl-text td, .vl-text thead th { text-align: left; }
.vl-text td { overflow-wrap: anywhere; min-width: 7rem; }
.vl-text th[scope=row] { white-space: nowrap; }
/* the answers: */
#sweep-table td:nth-child(3), #sweep-table thead th:nth-child(3) { text-align: left; min-width: 11rem; }
.vl-legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; min-height: 1.6rem; }
.vl-legend i { display: inline-block; width: .85rem; height: .85rem; border-radius: .2rem; margin-right: .35rem;
  vertical-align: -.1rem; border: 1px solid var(--border-color-primary); }
.vl-bars { display: grid; grid-template-columns: auto 1fr; gap: .45rem .8rem; align-items: center; }
.vl-bars .name { min-width: 0; }
.vl-bars .pair { display: grid; gap: 2px; min-height: calc(2rem + 2px); }
.vl-bars .bar { display: flex; align-items: center; gap: .4rem; font-size: .8rem; line-height: 1rem; height: 1rem; }
.vl-bars .bar b { display: block; height: .6rem; border-radius: .15rem; min-width: 2px; }
.vl-examples table, .vl-examples tbody { display: block; }
.vl-examples thead { display: none; }
.vl-examples tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: .4rem; }
.vl-examples tr { display: flex; align-items: center; gap: .5rem; border-radius: .4rem; padding: .25rem .4rem;
  border: 1px solid var(--border-color-primary) !important; background: var(--background-fill-secondary) !important; }
.vl-examples td { border: 0 !important; padding: 0 !important; text-align: left !important; min-width: 0; }
.vl-examples td:first-child { flex: 0 0 3rem; }
.vl-examples .container, .vl-examples img { width: 3rem !important; height: 3rem !important; max-width: 3rem;
  border-width: 0; object-fit: cover; }
.vl-examples .table-wrap { border: 0 !important; overflow: visible; }
/* Told by its icon, because its name depends on the visitor's language: it would send the picture to huggingface.co. */
#chat-log button:has(path[d^="M23,20a5,5"]) { display: none; }
@media (max-width: 640px) {
  .tabs { max-width: calc(100vw - 4rem); }
  #head { flex-direction: column; align-items: stretch; }
  .vl-table th, .vl-table td { padding: .25rem .3rem !important; font-size: .9rem; }
  .vl-text th[scope=row] { white-space: normal; }
  /* Room for what will be longer, so that nothing moves when it comes. */
  .vl-status { min-height: 3.2rem; }
  .vl-verdict { min-height: 4.8rem; }
  #compare-figures .vl-table { table-layout: fixed; }
  #compare-figures thead th { height: 3.4rem; vertical-align: bottom; overflow-wrap: anywhere; }
  #compare-figures thead th:first-child { width: 44%; }
  #compare-legend .vl-legend { min-height: 5.4rem; align-content: start; }
  #compare-chart .vl-legend { min-height: 3.6rem; align-content: start; }
  .vl-examples tbody { grid-auto-flow: column; grid-template-columns: none; grid-auto-columns: 11.5rem;
    overflow-x: auto; padding-bottom: .4rem; contain: inline-size; }
}
"""


def theme() -> Any:
    import gradio as gr

    return gr.themes.Default(primary_hue="emerald", neutral_hue="slate", font=["system-ui", "sans-serif"])


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, caption: str = "", text: bool = False) -> str:
    """An HTML table; the first cell of a row is its heading. ``text``: the cells are words, not figures."""
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = []
    for name, *values in body:
        row = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    kind = "vl-table vl-text" if text else "vl-table"
    head_and_body = f"{title}<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="vl-scroll"><table class="{kind}">{head_and_body}</table></div>'


def bars(shares: Iterable[tuple[str, float | None]], *, run: str = "preset") -> str:
    """Each cost of a run as a bar below the baseline's full one; longer than that where it costs more.

    A share that is not known yet has its place, so that nothing moves when it comes.
    """
    shares = list(shares)
    longest = max([1.0, *(share for _, share in shares if share is not None)])
    lines = []
    for name, share in shares:
        both = ((1.0, BASELINE), (share, PRESET)) if share is not None else ()
        pair = "".join(
            f'<div class="bar"><b style="width:{80 * value / longest:.1f}%;background:{color}"></b>{value:.0%}</div>'
            for value, color in both
        )
        label = html.escape(f"{name}: not measured yet" if share is None else f"{name}: {share:.0%} of the baseline")
        lines.append(
            f'<div class="name">{html.escape(name)}</div><div class="pair" role="img" aria-label="{label}">{pair}</div>'
        )
    key = legend([("baseline", _rgb(BASELINE)), (run, _rgb(PRESET))], "Share of the baseline")
    return f'{key}<div class="vl-bars">{"".join(lines)}</div>'


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def legend(entries: Iterable[tuple[str, tuple[int, int, int]]], text: str = "") -> str:
    parts = [f'<span><i style="background:rgb{tuple(color)}"></i>{html.escape(name)}</span>' for name, color in entries]
    return f'<div class="vl-legend"><strong>{html.escape(text)}</strong>{"".join(parts)}</div>'


def room(lines: int) -> str:
    """Empty space of as many lines of a table as are still to come."""
    return f'<div style="height:{2.1 * lines:.1f}rem"></div>' if lines > 0 else ""


def status(text: str) -> str:
    return f'<div class="vl-status" role="status" aria-live="polite">{html.escape(text)}</div>'


def verdict(text: str) -> str:
    return f'<div class="vl-verdict"><strong>{html.escape(text)}</strong></div>'


def note(text: str) -> str:
    return f'<p class="vl-note">{html.escape(text)}</p>'
