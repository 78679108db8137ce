"""The tab **Sweep**: one picture and question at budgets from 100 % to 5 % of the visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.engine import Choice
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.site import QUEUE, Site, shown
from vlmeff.demo.sweep import Point, Sweep, sweep

TAB = "sweep"
METHODS = ["hiprune", "divprune", "scope", "visionzip", "fourier", "adaptinfer", "random", "downsample"]
HEAD = ["budget", "visual tokens", "answer", "right", "first token, ms", "total, ms", "KV cache, MiB"]
NOTHING = "Nothing has run yet."


def build(site: Site, model: gr.Dropdown) -> None:
    """Make the tab's components and events."""
    import pandas as pd

    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=260,
                buttons=[], elem_id="sweep-picture",
            )  # fmt: skip
            question = gr.Textbox(
                label="Question", lines=2, max_lines=4, max_length=site.limits.max_question_chars,
                elem_id="sweep-question",
            )  # fmt: skip
            known = gr.Textbox(label="Right answer, if you know it", max_lines=1, max_length=200, elem_id="sweep-known")
            method = gr.Dropdown(METHODS, value="hiprune", label="Token method", elem_id="sweep-method")
            with gr.Row():
                run = gr.Button("Run the sweep", variant="primary", elem_id="sweep-run")
                stop = gr.Button("Stop", elem_id="sweep-stop")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""), elem_id="sweep-status")
            plot = gr.LinePlot(
                pd.DataFrame({"visual tokens": [], "total time, ms": []}), x="visual tokens", y="total time, ms",
                height=240, title="Total time against visual tokens", elem_id="sweep-plot", buttons=[],
            )  # fmt: skip
            answers = gr.HTML(look.table(HEAD, []), elem_id="sweep-table", min_height=300)
    gr.Examples(
        [[one.path, one.question, one.answer] for one in EXAMPLES if one.answer is not None],
        inputs=[picture, question, known], label="Examples with known answers", examples_per_page=10,
    )  # fmt: skip

    @shown
    def start(
        model_name: str, path: str | None, text: str, answer: str, name: str, request: gr.Request
    ) -> Iterator[Any]:
        asked, seen = site.limits.question(text), site.picture(path)
        flag = site.begin(request.session_hash, TAB)
        longest = min(32, site.limits.max_new_tokens)
        runs = sweep(
            site.engine, seen, asked, Choice(tokens=name), model=model_name, known=(answer or "").strip() or None,
            max_new_tokens=longest, stop=flag,
        )  # fmt: skip
        drawn = -1
        for now in runs:
            grown = len(now.points) != drawn
            drawn = len(now.points)
            yield look.status(now.status), _plot(now) if grown else gr.skip(), _table(now) if grown else gr.skip()

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, TAB)
        return look.status("stopped")

    event = run.click(
        start, [model, picture, question, known, method], [status, plot, answers],
        api_name="sweep", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    stop.click(halt, None, [status], api_name="stop_sweep", queue=False, cancels=[event])


def _plot(now: Sweep) -> Any:
    import pandas as pd

    points = [(p.visual_tokens, p.total_ms) for p in now.points if not p.failed and p.total_ms is not None]
    return pd.DataFrame(points, columns=["visual tokens", "total time, ms"])


def _table(now: Sweep) -> str:
    right = [p.correct for p in now.points if p.correct is not None]
    caption = f"{sum(right)} of {len(right)} answers right" if right else ""
    return look.table(HEAD, [_cells(point) for point in now.points], caption=caption)


def _cells(p: Point) -> list[str]:
    if p.failed:
        return [f"{p.share:.0%}", "-", p.failed, "", "", "", ""]
    right = "" if p.correct is None else "yes" if p.correct else "no"
    times = ["-" if value is None else f"{value:.1f}" for value in (p.first_token_ms, p.total_ms)]
    memory = "-" if p.kv_mib is None else f"{p.kv_mib:.3g}"
    answer = p.answer if len(p.answer) <= 120 else f"{p.answer[:117]}..."
    return [f"{p.share:.0%}", str(p.visual_tokens), answer, right, *times, memory]
