"""The tab **Generate**: pictures of tiny-mar and clips of tiny-wan, plain beside accelerated."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vlmeff import zoo
from vlmeff.demo import look
from vlmeff.demo.generators import DIGITS, MODES, PROMPTS, Drawn, draw_digits, make_clip, missing_extra
from vlmeff.demo.site import QUEUE, Site, shown
from vlmeff.demo.tabs.parts import on_failure
from vlmeff.demo.work import Note, Stop, Stopped, run_alone

PICTURES, VIDEOS = "draw", "clip"

MODES_SAY = (
    "coupled: nearly the same pictures; exact: other pictures by nearly the same law; cspd: approximate, leans to the "
    "draft model's."
)


def build(site: Site) -> None:
    """Make the tab's components and events."""
    with gr.Tabs():
        with gr.Tab("Picture"):
            _pictures(site)
        with gr.Tab("Video"):
            _videos(site)


def _pictures(site: Site) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            digit = gr.Dropdown(list(DIGITS), value=3, label="Digit", elem_id="generate-digit")
            mode = gr.Dropdown(
                list(MODES), value="coupled", label="Speculation", info=MODES_SAY, elem_id="generate-mode"
            )
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            run, stop = _buttons("Draw", "generate-draw")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""))
            sheet = gr.Image(label="Samples of every run", show_label=False, format="png", height=420, buttons=[],
                             interactive=False, elem_id="generate-sheet", alt_text="Sheet of drawn digits")  # fmt: skip
            figures = gr.HTML("", elem_id="generate-figures", min_height=160)

    @shown
    def draw(number: int, how: str, start: float, request: gr.Request) -> Iterator[Any]:
        def work(say: Callable[[Note | Drawn], None], stop: Stop) -> None:
            say(draw_digits(int(number), mode=how, seed=int(start or 0), progress=_telling(say, stop)))

        for news in _until_stopped(work, site.begin(request.session_hash, PICTURES)):
            if isinstance(news, Drawn):
                yield look.status(""), news.sheet, _figures(news)
            else:
                yield look.status(news.text), gr.skip(), gr.skip()

    event = run.click(draw, [digit, mode, seed], [status, sheet, figures], api_name="draw", concurrency_id=QUEUE,
              concurrency_limit=1, show_progress="hidden")  # fmt: skip
    _ending(site, PICTURES, event, stop, status)


def _videos(site: Site) -> None:
    missing = missing_extra()
    if missing is not None:
        gr.HTML(look.note(missing), elem_id="generate-missing")
        return
    presets = [row.preset for row in zoo.preset_table("tiny-wan")]
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", max_length=site.limits.max_question_chars,
                                info="It knows coloured shapes that move.", elem_id="generate-prompt")  # fmt: skip
            preset = gr.Dropdown(presets, value="fast", label="Preset")
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            run, stop = _buttons("Make both", "generate-clip")
            gr.Examples([[text] for text in PROMPTS], inputs=[prompt], label="Prompts that it knows")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""))
            with gr.Row():
                plain = gr.Video(label="Unwrapped", height=260, autoplay=True, loop=True, interactive=False, buttons=[])
                fast = gr.Video(label="Preset", height=260, autoplay=True, loop=True, interactive=False, buttons=[])
            sheet = gr.Image(label="Frames of both", show_label=False, format="png", height=260, buttons=[],
                             interactive=False,
                             alt_text="Frames of the unwrapped clip above those of the preset's")  # fmt: skip
            figures = gr.HTML("", min_height=120)

    @shown
    def make(text: str, name: str, start: float, request: gr.Request) -> Iterator[Any]:
        asked = site.limits.question(text)
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies what it shows

            def work(say: Callable[[Note | Drawn], None], stop: Stop) -> None:
                told = _telling(say, stop)
                seed, into = int(start or 0), Path(folder)
                say(make_clip(asked, name, seed=seed, folder=into, progress=told, on_step=stop.check))

            for news in _until_stopped(work, site.begin(request.session_hash, VIDEOS)):
                if isinstance(news, Drawn):
                    yield look.status(""), *map(str, news.clips), news.sheet, _figures(news)
                else:
                    yield look.status(news.text), *[gr.skip()] * 4

    event = run.click(make, [prompt, preset, seed], [status, plain, fast, sheet, figures], api_name="clip",
              concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden")  # fmt: skip
    _ending(site, VIDEOS, event, stop, status)


def _buttons(label: str, elem_id: str) -> tuple[gr.Button, gr.Button]:
    """The one that begins and the one that stops."""
    with gr.Row():
        run = gr.Button(label, variant="primary", elem_id=elem_id, min_width=150)
        return run, gr.Button("Stop", elem_id=f"{elem_id}-stop", min_width=80)


def _telling(say: Callable[[Note | Drawn], None], stop: Stop) -> Callable[[str], None]:
    """A ``progress`` that tells the page, and ends the work when its visitor wants that."""

    def progress(what: str) -> None:
        stop.check()
        say(Note(what))

    return progress


def _until_stopped(work: Callable[..., None], stop: Stop) -> Iterator[Note | Drawn]:
    yield Note("starting")
    try:
        yield from run_alone(work, stop=stop)
    except Stopped:
        yield Note("stopped")


def _ending(site: Site, tab: str, event: Any, stop: gr.Button, status: gr.HTML) -> None:
    """What the stop button does, and what becomes of the status line when a run fails."""

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, tab)
        return look.status("stopped")

    on_failure(site, tab, event, status)
    stop.click(
        halt, None, [status], api_name=f"stop_{tab}", queue=False, cancels=[event], show_progress="hidden"
    )  # fmt: skip


def _figures(drawn: Drawn) -> str:
    return look.table(drawn.head, drawn.rows) + look.note(drawn.note)
