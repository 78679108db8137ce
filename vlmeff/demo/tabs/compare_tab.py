"""The tab **Compare**: the baseline's answer beside the preset's, their costs, and which patches were kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.compare import Comparison, compare, rows
from vlmeff.demo.engine import Done
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.site import AS_PRESET, QUEUE, Site, make_choice, shown

TAB = "compare"
METHODS = [AS_PRESET, "hiprune", "divprune", "scope", "visionzip", "fourier", "adaptinfer", "random", "downsample"]
NOISE = "Single runs are noisy; vlmeff eval measures many, with intervals. The two runs take turns at going first."


def build(site: Site, model: gr.Dropdown) -> gr.Dropdown:
    """Make the tab's components and events; returns the dropdown of presets, which follows the model."""
    turns = gr.State(0)  # clicks so far: which run goes first
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=300,
                buttons=[], elem_id="compare-picture",
            )  # fmt: skip
            question = gr.Textbox(
                label="Question", lines=2, max_lines=4, max_length=site.limits.max_question_chars,
                placeholder="what shape is in the picture?", elem_id="compare-question",
            )  # fmt: skip
            preset = gr.Dropdown(site.presets(), value="fast", label="Preset", elem_id="compare-preset")
            with gr.Accordion("Method and budget", open=False):
                method = gr.Dropdown(METHODS, value=AS_PRESET, label="Token method")
                share = gr.Slider(2, 100, value=33, step=1, label="Visual tokens kept, % (with a method)")
                longest = gr.Slider(1, site.limits.max_new_tokens, value=64, step=1, label="Longest answer, tokens")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed of the method random")
            with gr.Row():
                run = gr.Button("Run both", variant="primary", elem_id="compare-run")
                stop = gr.Button("Stop", elem_id="compare-stop")
                clear = gr.Button("Clear", elem_id="compare-clear")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""), elem_id="compare-status")
            with gr.Row():
                left = gr.Textbox(label="Baseline", lines=4, max_lines=4, interactive=False, elem_id="compare-baseline")
                right = gr.Textbox(label="Preset", lines=4, max_lines=4, interactive=False, elem_id="compare-answer")
            figures = gr.HTML(_figures(Comparison()), elem_id="compare-figures")
            chart = gr.HTML("", elem_id="compare-chart", min_height=150)
            gr.HTML(look.note(NOISE))
    with gr.Row(), gr.Column():
        said = gr.HTML(look.legend([], "Which patches were kept: run a comparison first."), elem_id="compare-legend")
        slider = gr.ImageSlider(
            label="Left of the handle the picture as the model saw it, right of it what was kept", format="png",
            interactive=False, height=460, buttons=["fullscreen"], elem_id="compare-map",
        )  # fmt: skip
        tiles = gr.Gallery(label="Tiles", visible=False, columns=4, height=260, format="png", interactive=False)
    gr.Examples(
        [[example.path, example.question] for example in EXAMPLES],
        inputs=[picture, question], label="Examples: a picture and a question, one click each", examples_per_page=10,
    )  # fmt: skip

    outputs = [status, left, right, figures, chart, said, slider, tiles, turns]

    @shown
    def start(
        model_name: str, path: str | None, text: str, name: str, how: str, percent: float, tokens: float,
        number: float, count: int, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        asked, seen = site.limits.question(text), site.picture(path)
        flag = site.begin(request.session_hash, TAB)
        choice = make_choice(name, how, percent, seed=int(number or 0))
        news = compare(
            site.engine,
            seen,
            asked,
            choice,
            model=model_name,
            preset_first=bool(count % 2),
            max_new_tokens=int(tokens),
            stop=flag,
        )
        for now in news:
            yield (*_page(now), count)
        yield (*_page(now), count + 1)

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, TAB)
        return look.status("stopped")

    event = run.click(
        start, [model, picture, question, preset, method, share, longest, seed, turns], outputs,
        api_name="compare", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    question.submit(
        start, [model, picture, question, preset, method, share, longest, seed, turns], outputs,
        api_visibility="private", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    stop.click(halt, None, [status], api_name="stop", queue=False, cancels=[event])
    clear.click(
        lambda: (None, "", *_page(Comparison())), None, [picture, question, *outputs[:-1]],
        api_visibility="private", queue=False,
    )  # fmt: skip
    return preset


def _page(now: Comparison) -> tuple[Any, ...]:
    """Values of the outputs. What has not changed is left alone, so that nothing on the page jumps."""
    done = now.preset.done
    return (
        look.status(now.status),
        now.baseline.text,
        now.preset.text,
        _figures(now),
        look.bars([(row.name, row.share) for row in rows(now) if row.share is not None]) if now.finished else gr.skip(),
        *(_map(done) if done is not None and now.finished else _nothing_yet(now)),
    )


def _nothing_yet(now: Comparison) -> tuple[Any, Any, Any]:
    if now.status or now.baseline.text or now.preset.text:
        return gr.skip(), gr.skip(), gr.skip()
    return look.legend([], "Which patches were kept: run a comparison first."), None, gr.Gallery(visible=False)


def _map(done: Done) -> tuple[Any, Any, Any]:
    if not done.maps:
        return (
            look.legend([], "There is no map for this run: its pictures cannot be recovered."),
            None,
            gr.Gallery(visible=False),
        )
    if done.maps[0].resampled:
        kept = done.report.visual_tokens_after
        text = f"No spatial map: a method of the frequency domain. {kept} tokens hold this much detail."
        return look.legend([], text), (done.maps[0].before, done.maps[0].after), gr.Gallery(visible=False)
    whole = max(done.maps, key=lambda one: one.total)
    text = f"{done.report.visual_tokens_after} of {done.report.visual_tokens_before} visual tokens kept"
    if done.report.visual_tokens_processed is not None:
        text = f"{whole.kept} of {whole.total} visual tokens left behind the last pruning layer"
    rest = [(one.after, f"{one.label}: {one.kept} of {one.total}") for one in done.maps if one is not whole]
    return look.legend(whole.legend, text), (whole.before, whole.after), gr.Gallery(value=rest, visible=bool(rest))


def _figures(now: Comparison) -> str:
    return look.table(["", "baseline", "preset"], [(row.name, row.baseline, row.preset) for row in rows(now)])
