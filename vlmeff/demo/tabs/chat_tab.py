"""The tab **Chat**: several turns and several pictures, with a preset from the side.

The conversation is kept on the server: a client can add to its own, but hand in no past that never was.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.chat import Message, check_length, turns_of
from vlmeff.demo.compare import MIB
from vlmeff.demo.engine import Done
from vlmeff.demo.samples import EXAMPLES, Example
from vlmeff.demo.site import QUEUE, Site, make_choice, shown
from vlmeff.demo.work import Note

TAB = "chat"
STARTERS = [example for example in EXAMPLES if example.file in ("four-shapes.png", "scene-1.png")]
PLACEHOLDER = "Add pictures, ask a question, press Enter."


def build(site: Site, model: gr.Dropdown) -> gr.Dropdown:
    """Make the tab's components and events; returns the dropdown of presets, which follows the model."""
    past = gr.State([])  # of Message
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(
                label="Conversation", height=460, allow_tags=False, sanitize_html=True, render_markdown=False,
                reasoning_tags=[], buttons=[], elem_id="chat-log",
            )  # fmt: skip
            box = gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", show_label=False, label="Message", submit_btn=True,
                placeholder=PLACEHOLDER, max_lines=6, elem_id="chat-box",
            )  # fmt: skip
            with gr.Row():
                stop = gr.Button("Stop", min_width=120, elem_id="chat-stop")
                clear = gr.Button("New chat", min_width=120, elem_id="chat-clear")
        with gr.Column(scale=1, min_width=270):
            preset = gr.Dropdown(
                site.presets(), value=site.favourite(), label="Preset",
                info="Of the next answer; the pictures of earlier turns count too.", elem_id="chat-preset",
            )  # fmt: skip
            longest = gr.Slider(
                1,
                site.limits.max_new_tokens,
                value=min(64, site.limits.max_new_tokens),
                step=1,
                label="Longest answer, tokens",
                elem_id="chat-longest",
            )
            status = gr.HTML(look.status(""), elem_id="chat-status")
            cost = gr.HTML(_cost(None), elem_id="chat-cost")
    gr.Examples([[_message(example)] for example in STARTERS], inputs=[box], label="Examples: click, then press Enter")

    @shown
    def reply(
        model_name: str, message: dict[str, Any], messages: list[Message], name: str, tokens: float,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        text = site.limits.question(message.get("text"))
        files = tuple(str(file) for file in message.get("files") or ())
        before, messages = messages, [*messages, Message("user", text, files)]
        check_length(messages, site.limits)
        turns = turns_of(messages, site.picture)
        flag = site.begin(request.session_hash, TAB)
        locked = gr.MultimodalTextbox(value=None, interactive=False)
        yield messages, _log(messages), locked, look.status("starting"), gr.skip()
        last: tuple[Any, ...] = messages, _log(messages), gr.skip()
        choice = make_choice(name, None, None)
        try:
            for news in site.engine.answer(turns, choice, model=model_name, max_new_tokens=int(tokens), stop=flag):
                if isinstance(news, Note):
                    yield gr.skip(), gr.skip(), gr.skip(), look.status(news.text), gr.skip()
                    continue
                # An answer that was stopped before its first word leaves no empty bubble.
                so_far = [*messages, Message("assistant", news.text)] if news.text or not flag.asked else messages
                figures = _cost(news) if isinstance(news, Done) else gr.skip()
                last = so_far, _log(so_far), figures
                yield so_far, _log(so_far), gr.skip(), look.status("answering"), figures
        except Exception:  # a question that failed is no part of the conversation: it is in the box again
            again = gr.MultimodalTextbox(value={"text": text, "files": list(files)}, interactive=True)
            yield before, _log(before), again, look.status(""), gr.skip()
            raise
        # Whole, because a caller of the API gets only what was said last.
        so_far, log, figures = last
        yield so_far, log, gr.MultimodalTextbox(interactive=True), look.status("stopped" if flag.asked else ""), figures

    def halt(request: gr.Request) -> tuple[Any, str]:
        site.stop(request.session_hash, TAB)
        return gr.MultimodalTextbox(interactive=True), look.status("stopped")

    def forget(request: gr.Request) -> tuple[Any, ...]:
        site.stop(request.session_hash, TAB)
        return [], [], gr.MultimodalTextbox(value=None, interactive=True), look.status(""), _cost(None)

    def unlock(request: gr.Request) -> tuple[Any, str]:
        return gr.MultimodalTextbox(interactive=True), look.status(site.after(request.session_hash, TAB))

    event = box.submit(
        reply, [model, box, past, preset, longest], [past, chat, box, status, cost],
        api_name="chat", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    # Where an answer fails the box must not stay locked.
    event.failure(unlock, None, [box, status], api_visibility="private", queue=False, show_progress="hidden")
    stop.click(
        halt, None, [box, status], api_name="stop_chat", queue=False, cancels=[event], show_progress="hidden"
    )  # fmt: skip
    # The button of the log itself and ours do the same.
    gr.on(
        [clear.click, chat.clear], forget, None, [past, chat, box, status, cost],
        api_name="new_chat", queue=False, cancels=[event], show_progress="hidden",
    )  # fmt: skip
    return preset


def _message(example: Example) -> dict[str, Any]:
    return {"text": example.question, "files": [example.path]}


def _log(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as Gradio shows it: pictures and texts as messages of their own.

    Texts are escaped: Gradio 6.31 shows HTML in a message as HTML even without Markdown, pictures from elsewhere among
    it. (So no copy buttons: they would copy the escapes.)
    """
    log: list[dict[str, Any]] = []
    for message in messages:
        for path in message.pictures:
            log.append({"role": message.role, "content": {"path": path, "alt_text": "a picture that was sent"}})
        log.append({"role": message.role, "content": html.escape(message.text)})
    return log


def _cost(done: Done | None) -> str:
    """The figures of an answer; dashes where there is none, so that the table is there from the start."""
    lines = [("visual tokens", "-"), ("prompt tokens", "-"), ("KV cache, MiB", "-"), ("first token, ms", "-")]
    lines += [("total time, ms", "-"), ("tokens per second", "-"), ("new tokens", "-")]
    if done is not None and done.report.total_ms is not None:
        r = done.report
        values = [
            _change(r.visual_tokens_before, r.visual_tokens_after),
            _change(r.prompt_tokens_before, r.prompt_tokens_after),
            _figure(None if r.kv_bytes is None else r.kv_bytes / MIB, "{:.3g}"),
            _figure(r.prefill_ms, "{:.1f}"),
            _figure(r.total_ms, "{:.1f}"),
            _figure(done.tokens_per_second, "{:.1f}"),
            _figure(r.new_tokens, "{:.0f}"),
        ]
        lines = [(name, value) for (name, _), value in zip(lines, values, strict=True)]
    return look.table(["last answer", ""], lines)


def _change(before: int, after: int) -> str:
    return str(after) if after == before else f"{after} of {before}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
