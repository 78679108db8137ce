"""The tab **Video**: a question about a short video, as it is and with a preset, and what was kept of each frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.compare import Comparison, rows
from vlmeff.demo.limits import MIB
from vlmeff.demo.samples import Example
from vlmeff.demo.site import QUEUE, Site, make_choice, shown
from vlmeff.demo.tabs.parts import on_failure
from vlmeff.demo.video import LOOKED_AT, MOST_FRAMES, MOST_SECONDS, Clip, ask_video, choose_frames, kept, read_clip
from vlmeff.demo.work import Note, Stop, Stopped, run_alone
from vlmeff.errors import DataError

TAB = "video"
MODEL = "tiny-qwen"  # of the shipped ones the one that takes videos
EXAMPLES = [
    Example("moving-shapes.mp4", "what color is the circle?"),
    Example("moving-shapes.mp4", "is there a green triangle?"),
]
NOTE = (
    "The model tiny-qwen (choose it above; the examples do) takes videos but was never trained on any: what it says "
    "about them is often wrong. "
    "The costs and the map of kept tokens are real."
)
SENT = "No frames have been sent yet."
MAP = "What was kept of each frame: ask a question first."


def build(site: Site, model: gr.Dropdown) -> gr.Dropdown:
    """Make the tab's components and events; returns the dropdown of presets, which follows the model."""
    limits = f"A video may have at most {MOST_SECONDS:.0f} seconds and {site.limits.max_file_mb:g} MB."
    gr.HTML(look.note(f"{NOTE} {limits}"))
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            video = gr.Video(
                sources=["upload"], height=280,
                label="Video",
                buttons=[], elem_id="video-file",
            )  # fmt: skip
            question = gr.Textbox(
                label="Question", lines=2, max_lines=4, max_length=site.limits.max_question_chars,
                placeholder=EXAMPLES[0].question, elem_id="video-question",
            )  # fmt: skip
            preset = gr.Dropdown(site.presets(), value=site.favourite(), label="Preset", elem_id="video-preset")
            about = gr.Checkbox(
                False, label="Choose the clips that the question is about", elem_id="video-choose",
                info=f"tiny-clip, which knows coloured shapes, chooses among {LOOKED_AT} frames. "
                f"Otherwise {MOST_FRAMES} frames are taken evenly.",
            )  # fmt: skip
            with gr.Row():
                run = gr.Button("Ask both", variant="primary", min_width=100, elem_id="video-run")
                stop = gr.Button("Stop", min_width=100, elem_id="video-stop")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(look.status(""), elem_id="video-status")
            with gr.Row():
                left = gr.Textbox(label="Baseline", lines=3, max_lines=3, interactive=False, elem_id="video-baseline")
                right = gr.Textbox(label="Preset", lines=3, max_lines=3, interactive=False, elem_id="video-answer")
            figures = gr.HTML(_figures(Comparison()), elem_id="video-figures")
    with gr.Column(elem_classes="vl-examples"):
        # A click chooses the model as well: not every one takes videos.
        shipped = [[MODEL, example.path, example.question] for example in EXAMPLES]
        chosen = MODEL in site.models
        gr.Examples(
            shipped if chosen else [row[1:] for row in shipped],
            inputs=[model, video, question] if chosen else [video, question],
            label="Examples: a video and a question, one click each", visible_columns=[1, 2] if chosen else None,
        )  # fmt: skip
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            said = gr.HTML(look.legend([], SENT), elem_id="video-said")
            frames = gr.Gallery(
                label="Frames that were sent", show_label=False, columns=4, format="png", object_fit="contain",
                buttons=[], interactive=False, elem_id="video-frames",
            )  # fmt: skip
        with gr.Column(min_width=320):
            key = gr.HTML(look.legend([], MAP), elem_id="video-legend")
            strip = gr.Gallery(
                label="Visual tokens kept, by time", show_label=False, columns=4, format="png",
                object_fit="contain", buttons=[], interactive=False, elem_id="video-map",
            )  # fmt: skip

    @shown
    def start(
        model_name: str, path: str | None, text: str, name: str, choosing: bool, request: gr.Request
    ) -> Iterator[Any]:
        asked, file = site.limits.question(text), _uploaded(site, path)
        flag = site.begin(request.session_hash, TAB)
        choice = make_choice(name, None, None)
        now = Comparison(choice=choice)
        yield look.status("reading the video"), "", "", _figures(now), *[gr.skip()] * 4

        def work(say: Callable[[Any], None], stop: Stop) -> None:
            clip = read_clip(file, most_frames=LOOKED_AT if choosing else MOST_FRAMES, stop=stop)
            stop.check()
            say(choose_frames(clip, asked) if choosing else clip)

        try:
            for news in run_alone(work, stop=flag):
                if isinstance(news, Note):
                    yield look.status(news.text), *[gr.skip()] * 7
                else:
                    clip = news
        except Stopped:
            yield look.status("stopped"), *[gr.skip()] * 7
            return
        sent = [(frame, f"{time:.1f} s") for frame, time in zip(clip.frames, clip.seconds, strict=True)]
        how = "chosen for the question" if choosing else "taken evenly"
        text = f"{len(sent)} frames of {clip.duration:.1f} seconds, {how}"
        yield *[gr.skip()] * 4, look.legend([], text), sent, look.legend([], MAP), []
        for now in ask_video(
            site.engine, clip, asked, choice, model=model_name,
            max_new_tokens=min(64, site.limits.max_new_tokens), stop=flag,
        ):  # fmt: skip
            yield look.status(now.status), now.baseline.text, now.preset.text, _figures(now), *[gr.skip()] * 4
        # Whole, because a caller of the API gets only what was said last.
        answers = look.status(now.status), now.baseline.text, now.preset.text, _figures(now)
        yield *answers, look.legend([], text), sent, *_kept(clip, now)

    def halt(request: gr.Request) -> str:
        site.stop(request.session_hash, TAB)
        return look.status("stopped")

    event = gr.on(
        [run.click, question.submit], start, [model, video, question, preset, about],
        [status, left, right, figures, said, frames, key, strip],
        api_name="video", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    on_failure(site, TAB, event, status)
    stop.click(halt, None, [status], api_name="stop_video", queue=False, cancels=[event], show_progress="hidden")
    return preset


def _uploaded(site: Site, path: str | None) -> Path:
    """A video that was uploaded here; a path that a client made up is as good as none."""
    from gradio.utils import get_upload_folder

    if not path:
        raise DataError("There is no video yet: drop one or click an example.")
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise DataError("That video was not uploaded here: drop it on the page.")
    if Path(path).is_file() and Path(path).stat().st_size > site.limits.max_file_mb * MIB:
        raise DataError(f"The video's file is larger than {site.limits.max_file_mb:g} MB: make it shorter or smaller.")
    return Path(path)


def _kept(clip: Clip, now: Comparison) -> tuple[str, list[tuple[Any, str]]]:
    """The legend and the strip of the preset's run."""
    done = now.preset.measured
    if done is None:
        return look.legend([], MAP), []
    text = f"{done.report.visual_tokens_after} of {done.report.visual_tokens_before} visual tokens kept"
    pictures = kept(done)
    shared = -(-len(clip.frames) // max(1, len(pictures)))
    if not pictures:
        return look.legend([], f"{text}; there is no map of which for this preset."), []
    return look.legend(
        done.maps[0].legend, text + (f"; {shared} frames share each picture" if shared > 1 else "")
    ), pictures


def _figures(now: Comparison) -> str:
    return look.table(["", *map(now.label, now.runs)], [(row.name, *row.values) for row in rows(now)])
