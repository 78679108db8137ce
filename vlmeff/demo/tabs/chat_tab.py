"""The tab **Chat**: several turns and several pictures, with a preset from the side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.compare import MIB
from vlmeff.demo.engine import Choice, Done, Note, Turn, assistant_turn, user_turn
from vlmeff.demo.site import QUEUE, Site, shown

TAB = "chat"
BASELINE = "baseline"


def build(site: Site, model: gr.Dropdown) -> gr.Dropdown:
    """Make the tab's components and events; returns the dropdown of presets, which follows the model."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(
                label="Conversation", height=460, allow_tags=False, sanitize_html=True, render_markdown=False,
                buttons=["copy"], elem_id="chat-log",
            )  # fmt: skip
            box = gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", show_label=False, label="Message", submit_btn=True,
                placeholder="Add pictures, ask a question, press Enter.",
                elem_id="chat-box",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=240):
            preset = gr.Dropdown([BASELINE, *site.presets()], value="fast", label="Preset", elem_id="chat-preset")
            longest = gr.Slider(1, site.limits.max_new_tokens, value=64, step=1, label="Longest answer, tokens")
            status = gr.HTML(look.status(""), elem_id="chat-status")
            cost = gr.HTML("", elem_id="chat-cost", min_height=150)
            stop = gr.Button("Stop", elem_id="chat-stop")
            clear = gr.Button("New conversation", elem_id="chat-clear")

    @shown
    def reply(
        model_name: str, message: dict[str, Any], history: list[dict[str, Any]], name: str, tokens: float,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        text = site.limits.question(message.get("text"))
        new = [str(file) for file in message.get("files") or ()]
        turns = [*_turns(site, history), user_turn(text, site.pictures(new))]
        known = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        site.limits.check_count(known)
        flag = site.begin(request.session_hash, TAB)
        said = [*({"role": "user", "content": {"path": path}} for path in new), {"role": "user", "content": text}]
        log = [*history, *said]
        yield log, gr.MultimodalTextbox(value=None, interactive=False), look.status("starting"), gr.skip()
        choice = Choice() if name == BASELINE else Choice(preset=name)
        answer = ""
        for news in site.engine.answer(turns, choice, model=model_name, max_new_tokens=int(tokens), stop=flag):
            if isinstance(news, Note):
                yield gr.skip(), gr.skip(), look.status(news.text), gr.skip()
                continue
            answer = news.text
            shown_log = [*log, {"role": "assistant", "content": answer}]
            figures = _cost(news) if isinstance(news, Done) else gr.skip()
            yield shown_log, gr.skip(), look.status("answering"), figures
        end = "stopped" if flag.asked else ""
        yield gr.skip(), gr.MultimodalTextbox(interactive=True), look.status(end), gr.skip()

    def halt(request: gr.Request) -> tuple[Any, str]:
        site.stop(request.session_hash, TAB)
        return gr.MultimodalTextbox(interactive=True), look.status("stopped")

    event = box.submit(
        reply, [model, box, chat, preset, longest], [chat, box, status, cost],
        api_name="chat", concurrency_id=QUEUE, concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip
    # Where an answer fails the box must not stay locked.
    event.failure(lambda: gr.MultimodalTextbox(interactive=True), None, [box], api_visibility="private", queue=False)
    stop.click(halt, None, [box, status], api_name="stop_chat", queue=False, cancels=[event])
    clear.click(
        lambda: ([], gr.MultimodalTextbox(value=None, interactive=True), look.status(""), ""), None,
        [chat, box, status, cost], api_visibility="private", queue=False, cancels=[event],
    )  # fmt: skip
    return preset


def _turns(site: Site, history: Sequence[dict[str, Any]]) -> list[Turn]:
    """The conversation as the model takes it: pictures join the question that follows them."""
    turns: list[Turn] = []
    pictures: list[str] = []
    for message in history:
        for part in _parts(message["content"]):
            if isinstance(part, dict):
                pictures.append(part["path"])
            elif message["role"] == "user":
                turns.append(user_turn(part, site.pictures(pictures)))
                pictures = []
            else:
                turns.append(assistant_turn(part))
    return turns


def _parts(content: Any) -> list[str | dict[str, str]]:
    """Texts, and {"path": ...} of files, in the forms in which Gradio hands back a message."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, list | tuple):
        return [part for item in content for part in _parts(item)]
    if isinstance(content, dict):
        if content.get("type") == "text":
            return [content["text"]]
        file = content.get("file", content)
        return [{"path": file["path"]}]
    return [{"path": content.path}]  # FileData


def _cost(done: Done) -> str:
    r = done.report
    lines = [
        ("visual tokens", f"{r.visual_tokens_before} to {r.visual_tokens_after}"),
        ("prompt tokens", f"{r.prompt_tokens_before} to {r.prompt_tokens_after}"),
        ("KV cache, MiB", "-" if r.kv_bytes is None else f"{r.kv_bytes / MIB:.3g}"),
        ("first token, ms", "-" if r.prefill_ms is None else f"{r.prefill_ms:.1f}"),
        ("total, ms", "-" if r.total_ms is None else f"{r.total_ms:.1f}"),
    ]
    return look.table(["last answer", ""], lines)
