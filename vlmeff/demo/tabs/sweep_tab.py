"""The tab **Sweep**: one picture and question at budgets from 100 % to 5 % of the visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.engine import Choice
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.site import QUEUE, Site, shown
from vlmeff.demo.sweep import Point, Sweep, accuracy, sweep
from vlmeff.demo.tabs.parts import on_failure, picture_field

TAB = "sweep"
METHODS = ["hiprune", "divprune", "scope", "visionzip", "fourier", "adaptinfer", "random", "downsample"]
HEAD = ["budget", "visual tokens", "answer", "as at 100 %", "right", "first token, ms", "total, ms", "KV cache, MiB"]
HINT = "Click an example, or drop a picture and ask about it; then run the sweep."
NOISE = "One run at each budget, so the times are noisy; each follows a warm-up run that is not measured."


def build(site: Site, model: gr.Dropdown) -> None:
    """Make the tab's components and events."""
    import pandas as pd

    examples = gr.Column(elem_classes="vl-examples")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = picture_field("sweep-picture")
            question = gr.Textbox(
                label="Question", lines=1, max_lines=4, max_length=site.limits.max_question_chars,
                elem_id="sweep-question",
            )  # fmt: skip
            known = gr.Textbox(label="Right answer, if you know it", max_lines=1, max_length=200, elem_id="sweep-known")
            method = gr.Dropdown(METHODS, value="hiprune", label="Token method", elem_id="sweep-method")
            with gr.Row():
                run = gr.Button("Run the sweep", variant="primary", elem_id="sweep-run", min_width=190)
                stop = gr.Button("Stop", elem_id="sweep-stop", min_width=80)
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(HINT), elem_id="sweep-status")
            plot = gr.LinePlot(
                pd.DataFrame({"visual tokens": [], "total time, ms": []}), x="visual tokens", y="total time, ms",
                y_lim=[0, None], height=360, title="Total time against visual tokens", elem_id="sweep-plot",
                buttons=[],
            )  # fmt: skip
    answers = gr.HTML(_table(Sweep()), elem_id="sweep-table")
    gr.HTML(look.note(NOISE))
    with examples:
        gr.Examples(
            [[one.path, one.question, one.answer] for one in EXAMPLES if one.answer is not None],
            inputs=[picture, question, known], label="Examples with known answers", examples_per_page=10,
            visible_columns=[0, 1],
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
            grown = len(now.points) != drawn or now.ended  # the last piece of news is a client's result
            drawn = len(now.points)
            # A streamed plot that is skipped loses its columns, and fails at the next change of size.
            yield look.status(now.status), _plot(now), _table(now) if grown else gr.skip()

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, TAB)
        return look.status("stopped")

    def check(*fields: Any) -> list[Any]:
        return site.checked(fields, picture=1, question=2)

    event = gr.on(
        [run.click, question.submit, known.submit], start,
        [model, picture, question, known, method], [status, plot, answers], api_name="sweep", concurrency_id=QUEUE,
        concurrency_limit=1, show_progress="minimal", show_progress_on=[status], validator=check,
    )  # fmt: skip
    on_failure(site, TAB, event, status)
    stop.click(halt, None, [status], api_name="stop_sweep", queue=False, cancels=[event])


def _plot(now: Sweep) -> Any:
    import pandas as pd

    points = [(p.visual_tokens, p.total_ms) for p in now.points if not p.failed and p.total_ms is not None]
    return pd.DataFrame(points, columns=["visual tokens", "total time, ms"])


def _table(now: Sweep) -> str:
    """With empty rows for the runs to come, so that nothing below moves; they are no rows of the table's body."""
    right, judged = accuracy(now.points)
    caption = f"{right} of {judged} answers right" if judged else "Answers at each budget"
    room = look.room(now.total - len(now.points))
    return look.table(HEAD, [_cells(point) for point in now.points], caption=caption) + room


def _cells(p: Point) -> list[str]:
    if p.failed:
        return [f"{p.share:.0%}", "-", p.failed, "", "", "", "", ""]
    right = "" if p.correct is None else "yes" if p.correct else "no"
    times = ["-" if value is None else f"{value:.1f}" for value in (p.first_token_ms, p.total_ms)]
    memory = "-" if p.kv_mib is None else f"{p.kv_mib:.3g}"
    answer = p.answer if len(p.answer) <= 120 else f"{p.answer[:117]}..."
    same = "yes" if p.same else "no"
    return [f"{p.share:.0%}", str(p.visual_tokens), answer, same, right, *times, memory]
