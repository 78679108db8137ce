"""The tab **Compare**: the baseline's answer beside the preset's, their costs, and which patches were kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.compare import CONTROLS, Comparison, compare, rows, verdict
from vlmeff.demo.engine import Done
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.saving import save_comparison
from vlmeff.demo.site import AS_PRESET, QUEUE, Kept, Site, make_choice, shown
from vlmeff.demo.tabs.parts import on_failure, picture_field
from vlmeff.errors import ConfigError

TAB = "compare"
METHODS = [AS_PRESET, "hiprune", "divprune", "scope", "visionzip", "fourier", "adaptinfer", "random", "downsample"]
NO_CONTROL = "none"
CONTROL_NAMES = {"random": "tokens at random places", "downsample": "an even lattice of tokens"}
NOISE = (
    "Before its first measured run each setting makes a warm-up run that is not measured. The baseline and the preset "
    "take turns at going first. Single runs are noisy; vlmeff eval measures many, with intervals."
)
SAVING = (
    "Saving writes the picture, the question, the answers and the figures to a folder of the machine that serves this "
    "page."
)
HINT = "Click an example, or drop a picture and ask about it; then run both."
NO_MAP = "Which patches were kept: run a comparison first."


def build(site: Site, model: gr.Dropdown) -> gr.Dropdown:
    """Make the tab's components and events; returns the dropdown of presets, which follows the model."""
    turns = gr.State(0)  # clicks so far: which run goes first
    examples = gr.Column(elem_classes="vl-examples")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = picture_field("compare-picture")
            question = gr.Textbox(
                label="Question", lines=1, max_lines=4, max_length=site.limits.max_question_chars,
                placeholder="what shape is in the picture?", elem_id="compare-question",
            )  # fmt: skip
            preset = gr.Dropdown(site.presets(), value=site.favourite(), label="Preset", elem_id="compare-preset")
            with gr.Row():
                run = gr.Button("Run both", variant="primary", elem_id="compare-run", min_width=120)
                stop = gr.Button("Stop", elem_id="compare-stop", min_width=80)
                clear = gr.Button("Clear", elem_id="compare-clear", min_width=80)
            with gr.Accordion("Method, budget and control", open=False):
                method = gr.Dropdown(METHODS, value=AS_PRESET, label="Token method", elem_id="compare-method")
                share = gr.Slider(2, 100, value=33, step=1, label="Visual tokens kept, % (with a method)")
                control = gr.Dropdown(
                    [(NO_CONTROL, NO_CONTROL), *((CONTROL_NAMES[name], name) for name in CONTROLS)], value=NO_CONTROL,
                    label="Control run: the same number of tokens by",
                    info="A method that does not beat it is worth nothing.", elem_id="compare-control",
                )  # fmt: skip
                longest = gr.Slider(
                    1, site.limits.max_new_tokens, value=min(64, site.limits.max_new_tokens), step=1,
                    label="Longest answer, tokens", elem_id="compare-longest",
                )  # fmt: skip
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed of random places")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(HINT), elem_id="compare-status")
            with gr.Row():
                left = _answer("Baseline", "compare-baseline")
                right = _answer("Preset", "compare-answer")
                third = _answer("Control", "compare-third", visible=False)
            slider = gr.ImageSlider(
                label="What the model saw and what was kept", format="png",
                interactive=False, height=360, max_height=360, buttons=["fullscreen"], elem_id="compare-map",
            )  # fmt: skip
            said = gr.HTML(look.legend([], NO_MAP), elem_id="compare-legend")
            tiles = gr.Gallery(label="Tiles", visible=False, columns=4, height=260, format="png", interactive=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            figures = gr.HTML(_figures(Comparison()), elem_id="compare-figures")
        with gr.Column(scale=1, min_width=320):
            judged = gr.HTML(look.verdict(""), elem_id="compare-verdict")
            chart = gr.HTML(_chart(Comparison()), elem_id="compare-chart")
    gr.HTML(look.note(NOISE))
    if site.log_dir is not None:
        _saving(site)
    with examples:
        gr.Examples(
            [[example.path, example.question] for example in EXAMPLES],
            inputs=[picture, question], label="Examples: a picture and a question, one click each",
            examples_per_page=10,
        )  # fmt: skip

    outputs = [status, left, right, third, figures, judged, chart, said, slider, tiles]

    @shown
    def start(
        model_name: str, path: str | None, text: str, name: str, how: str, percent: float, other: str, tokens: float,
        number: float, count: int, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        asked, seen = site.limits.question(text), site.picture(path)
        flag = site.begin(request.session_hash, TAB)
        site.kept(request.session_hash)  # what is shown from now on is another one
        choice = make_choice(name, how, percent, seed=int(number or 0))
        news = compare(
            site.engine,
            seen,
            asked,
            choice,
            model=model_name,
            preset_first=bool(count % 2),
            control=None if other == NO_CONTROL else other,
            seed=int(number or 0),
            max_new_tokens=int(tokens),
            stop=flag,
        )
        page: tuple[Any, ...] = ()
        now = Comparison()
        for now in news:
            before, page = page, _page(now)
            yield (*_changed(before, page), count)
        if now.finished:
            site.keep(request.session_hash, Kept(now, seen, asked, model_name))
        # All texts once more, because the last piece of news is a client's result.
        yield (*[gr.skip() if isinstance(part, tuple) else part for part in page], count + 1)

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, TAB)
        return look.status("stopped")

    def wipe(request: gr.Request) -> tuple[Any, ...]:
        site.stop(request.session_hash, TAB)
        site.kept(request.session_hash)
        return None, "", *map(_value, _page(Comparison()))

    def check(*fields: Any) -> list[Any]:
        return site.checked(fields, picture=1, question=2)

    event = gr.on(
        [run.click, question.submit], start,
        [model, picture, question, preset, method, share, control, longest, seed, turns], [*outputs, turns],
        api_name="compare", concurrency_id=QUEUE, concurrency_limit=1, show_progress="minimal",
        show_progress_on=[status], validator=check,
    )  # fmt: skip
    on_failure(site, TAB, event, status)
    control.change(
        lambda name: gr.Textbox(visible=name != NO_CONTROL), [control], [third], api_visibility="private", queue=False
    )
    stop.click(halt, None, [status], api_name="stop", queue=False, cancels=[event])
    clear.click(wipe, None, [picture, question, *outputs], api_visibility="private", queue=False, cancels=[event])
    return preset


def _answer(label: str, elem_id: str, *, visible: bool = True) -> gr.Textbox:
    return gr.Textbox(
        label=label, lines=5, max_lines=5, interactive=False, min_width=190, elem_id=elem_id, visible=visible
    )


def _saving(site: Site) -> None:
    """Only where the page was started with a folder for it."""
    with gr.Row(equal_height=False):
        button = gr.Button("Save this comparison", elem_id="compare-save", scale=0, min_width=280)
        with gr.Column(min_width=280):
            said = gr.HTML(look.note(SAVING), elem_id="compare-saved")

    @shown
    def save(request: gr.Request) -> str:
        kept = site.kept(request.session_hash)
        if kept is None or site.log_dir is None:
            return look.note("There is no finished comparison that is not saved yet: run one first.")
        try:
            folder = save_comparison(site.log_dir, kept.comparison, kept.picture, kept.question, kept.model)
        except ConfigError as error:
            site.keep(request.session_hash, kept)
            return look.note(str(error))
        return look.note(f"Saved as {folder.name} in the folder for comparisons of this machine.")

    button.click(save, None, [said], api_name="save", queue=False)


# -- what the outputs show. A part is a value, or (what tells it apart, how to make the value) where making it is dear.


def _page(now: Comparison) -> tuple[Any, ...]:
    """Parts for the outputs, in their order."""
    done = now.preset.done
    if done is None:
        waiting = "" if now.order and now.status else NO_MAP
        spread: tuple[Any, Any, Any] = (look.legend([], waiting), None, gr.Gallery(visible=False))
        mapped: list[tuple[tuple[Any, ...], Any]] = [(("none", waiting, i), lambda i=i: spread[i]) for i in range(3)]
    else:
        plain = now.choice is not None and now.choice.plain
        mapped = [((id(done), i), lambda i=i: _map(done, plain=plain)[i]) for i in range(3)]
    return (
        look.status(now.status),
        now.baseline.text,
        now.preset.text,
        now.control.text or now.control.failed,
        _figures(now),
        look.verdict(verdict(now)),
        _chart(now),
        *mapped,
    )


def _value(part: Any) -> Any:
    return part[1]() if isinstance(part, tuple) else part


def _changed(before: tuple[Any, ...], page: tuple[Any, ...]) -> list[Any]:
    """What has not changed is left alone: pictures are not sent again, and nothing on the page jumps."""
    keys = [part[0] if isinstance(part, tuple) else part for part in page]
    old = [part[0] if isinstance(part, tuple) else part for part in before] or [None] * len(page)
    return [gr.skip() if a == b else _value(part) for a, b, part in zip(old, keys, page, strict=True)]


def _map(done: Done, *, plain: bool) -> tuple[Any, Any, Any]:
    none = gr.Gallery(visible=False)
    if not done.maps:
        if plain:
            return look.legend([], "The baseline keeps every visual token."), None, none
        why = "There is no map: the run was stopped." if done.stopped else "There is no map for this model's pictures."
        return look.legend([], why), None, none
    if done.maps[0].resampled:
        kept = done.report.visual_tokens_after
        text = f"No spatial map: a method of the frequency domain. {kept} tokens hold this much detail."
        return look.legend([], text), (done.maps[0].before, done.maps[0].after), none
    whole = max(done.maps, key=lambda one: one.total)
    text = f"{done.report.visual_tokens_after} of {done.report.visual_tokens_before} visual tokens kept"
    if done.report.visual_tokens_processed is not None:
        text = f"{whole.kept} of {whole.total} visual tokens left behind the last pruning layer"
    rest = [(one.after, f"{one.label}: {one.kept} of {one.total}") for one in done.maps if one is not whole]
    return look.legend(whole.legend, text), (whole.before, whole.after), gr.Gallery(value=rest, visible=bool(rest))


def _figures(now: Comparison) -> str:
    return look.table(["", *map(now.label, now.runs)], [(row.name, *row.values) for row in rows(now)])


def _chart(now: Comparison) -> str:
    return look.bars([(row.name, row.share) for row in rows(now) if row.is_cost], run=now.label("preset"))
