"""Ask a question about a picture, wrapped beside unwrapped: what ``vlmeff ask`` does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from vlmeff import zoo
from vlmeff.config import TokensArgument, check_methods
from vlmeff.drawing import Overlay, draw_call
from vlmeff.errors import UnsupportedModelError
from vlmeff.loading import load
from vlmeff.reporting import Report, measure, report
from vlmeff.vlm.wrapped import STATE
from vlmeff.wrapping import unwrap, wrap


@dataclass(frozen=True)
class Run:
    """One answer and what it cost."""

    label: str
    answer: str
    report: Report


@dataclass(frozen=True, eq=False)
class Answers:
    """The runs of one question, the unwrapped model first where it was asked for."""

    question: str
    runs: list[Run]
    draw: Callable[[], list[Overlay]]

    @property
    def speedup(self) -> dict[str, float]:
        """Unwrapped over wrapped time: "prefill", and "total" where both answers have the same number of tokens."""
        if len(self.runs) < 2:
            return {}
        base, run = self.runs[0].report, self.runs[-1].report
        out = {}
        if base.prefill_ms and run.prefill_ms:
            out["prefill"] = base.prefill_ms / run.prefill_ms
        if base.total_ms and run.total_ms and base.new_tokens == run.new_tokens:
            out["total"] = base.total_ms / run.total_ms
        return out

    def overlay(self) -> Overlay:
        """What became of the picture's tokens in the wrapped run.

        Raises:
            UnsupportedModelError: the picture cannot be recovered from the model's inputs.
        """
        return self.draw()[0]

    def to_dict(self) -> dict[str, Any]:
        runs = [{"label": r.label, "answer": r.answer, "report": r.report.to_dict()} for r in self.runs]
        return {"question": self.question, "runs": runs, "speedup": self.speedup}


def ask_picture(
    picture: Image.Image,
    question: str,
    *,
    model: str,
    preset: str,
    tokens: TokensArgument | None = None,
    kv: str | None = None,
    overrides: dict[str, Any] | None = None,
    compare: bool = True,
    max_new_tokens: int = 64,
    warmup: int = 1,
    device: str | None = None,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda step: None,
) -> Answers:
    """Load a model and answer ``question`` greedily, unwrapped (with ``compare``) and with ``preset``.

    Each measured run follows ``warmup`` unmeasured ones, so that neither pays for what is set up once.
    """
    # A misspelt preset, method or budget is refused before the model is loaded.
    check_methods(zoo.resolve(model, preset).steps, tokens, overrides or {}, kv)
    progress(f"loading {model}")
    vlm, processor = load(model, device=device, dtype=dtype)
    if not hasattr(processor, "image_processor"):
        raise UnsupportedModelError(f"ask: {type(vlm).__name__} takes no pictures.")
    # Everything that can be refused is refused before the first run.
    wrap(vlm, preset, tokens=tokens, kv=kv, **(overrides or {}))
    inputs = prepare(processor, picture, question).to(vlm.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)

    def answer() -> str:
        ids: Tensor = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    runs = []
    if compare:
        unwrap(vlm)
        for _ in range(warmup):
            progress("warming up the unwrapped model")
            answer()
        progress("asking the unwrapped model")
        with measure(vlm, dict(inputs)) as measured:
            text = answer()
        runs.append(Run("unwrapped", text, measured.report))
        wrap(vlm, preset, tokens=tokens, kv=kv, **(overrides or {}))
    label = preset if tokens is None and kv is None else vlm.__dict__[STATE].plan.method_name
    for _ in range(warmup):
        progress(f"warming up {label}")
        answer()
    progress(f"asking with {label}")
    text = answer()
    runs.append(Run(label, text, report(vlm)))
    draw = functools.partial(draw_call, vlm, report(vlm), inputs, processor, one_picture=True)
    return Answers(question, runs, draw)


def prepare(processor: Any, picture: Image.Image, question: str) -> Any:
    """The processor's inputs for one picture and one question, through its chat template."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
