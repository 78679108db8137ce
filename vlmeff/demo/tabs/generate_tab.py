"""The tab **Generate**: pictures of tiny-mar and clips of tiny-wan, plain beside accelerated."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vlmeff import zoo
from vlmeff.demo import look
from vlmeff.demo.generators import DIGITS, MODES, PROMPTS, Drawn, draw_digits, make_clip, missing_extra
from vlmeff.demo.site import QUEUE, Site, shown

MODES_SAY = (
    "coupled: nearly the same pictures; exact: other pictures by nearly the same law; cspd: approximate, leans to the "
    "draft model's."
)


def build(site: Site) -> None:
    """Make the tab's components and events."""
    with gr.Tabs():
        with gr.Tab("Picture"):
            _pictures()
        with gr.Tab("Video"):
            _videos(site)


def _pictures() -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            digit = gr.Dropdown(list(DIGITS), value=3, label="Digit", elem_id="generate-digit")
            mode = gr.Dropdown(
                list(MODES), value="coupled", label="Speculation", info=MODES_SAY, elem_id="generate-mode"
            )
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            run = gr.Button("Draw", variant="primary", elem_id="generate-draw")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""))
            sheet = gr.Image(label="Samples of every run", show_label=False, format="png", height=420, buttons=[],
                             interactive=False, elem_id="generate-sheet", alt_text="Sheet of drawn digits")  # fmt: skip
            figures = gr.HTML("", elem_id="generate-figures", min_height=160)

    @shown
    def draw(number: int, how: str, start: float) -> Iterator[Any]:
        yield look.status("drawing"), gr.skip(), gr.skip()
        drawn = draw_digits(int(number), mode=how, seed=int(start or 0))
        yield look.status(""), drawn.sheet, _figures(drawn)

    event = run.click(draw, [digit, mode, seed], [status, sheet, figures], api_name="draw", concurrency_id=QUEUE,
              concurrency_limit=1, show_progress="hidden")  # fmt: skip
    event.failure(
        lambda: look.status(""), None, [status], api_visibility="private", queue=False, show_progress="hidden"
    )


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
            run = gr.Button("Make both clips", variant="primary", elem_id="generate-clip")
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
    def make(text: str, name: str, start: float) -> Iterator[Any]:
        asked = site.limits.question(text)
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies what it shows
            for news in make_clip(asked, name, seed=int(start or 0), folder=Path(folder)):
                if isinstance(news, str):
                    yield look.status(news), *[gr.skip()] * 4
                else:
                    clips = [str(clip) for clip in news.clips]
                    yield look.status(""), *clips, news.sheet, _figures(news)

    event = run.click(make, [prompt, preset, seed], [status, plain, fast, sheet, figures], api_name="clip",
              concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden")  # fmt: skip
    event.failure(
        lambda: look.status(""), None, [status], api_visibility="private", queue=False, show_progress="hidden"
    )


def _figures(drawn: Drawn) -> str:
    return look.table(drawn.head, drawn.rows) + look.note(drawn.note)
