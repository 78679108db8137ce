"""One question, answered by the model as it is and with a preset: what the Compare tab streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from vlmeff.demo.engine import Choice, Done, Engine, Note, Stop, Text, user_turn

PLAIN = Choice()
MIB = 2**20


@dataclass(frozen=True)
class Side:
    """One of the two answers, as far as it has come."""

    text: str = ""
    done: Done | None = None


@dataclass(frozen=True)
class Comparison:
    """What is on the page at one moment."""

    status: str = ""
    baseline: Side = field(default_factory=Side)
    preset: Side = field(default_factory=Side)

    @property
    def finished(self) -> bool:
        return self.baseline.done is not None and self.preset.done is not None

    @property
    def same_answer(self) -> bool | None:
        if self.baseline.done is None or self.preset.done is None or self.baseline.done.stopped:
            return None
        return self.baseline.done.text == self.preset.done.text


def compare(
    engine: Engine,
    picture: Image.Image,
    question: str,
    choice: Choice,
    *,
    model: str | None = None,
    preset_first: bool = False,
    max_new_tokens: int = 64,
    stop: Stop | None = None,
) -> Iterator[Comparison]:
    """Run both, one after the other, and yield the page after every piece of news.

    ``preset_first`` alternates from click to click, so that neither run always has the warm caches.
    """
    stop = stop if stop is not None else Stop()
    turns = [user_turn(question, [picture])]
    now = Comparison(status="starting")
    order = [("preset", choice), ("baseline", PLAIN)] if preset_first else [("baseline", PLAIN), ("preset", choice)]
    for name, how in order:
        if stop.asked:
            break
        for news in engine.answer(turns, how, model=model, max_new_tokens=max_new_tokens, stop=stop):
            label = "baseline" if name == "baseline" else "preset"
            if isinstance(news, Note):
                now = replace(now, status=f"{label}: {news.text}")
            else:
                side = Side(news.text, news if isinstance(news, Done) else None)
                said: dict[str, Any] = {name: side}
                now = replace(now, status=f"{label}: answering" if isinstance(news, Text) else now.status, **said)
            yield now
    yield replace(now, status="stopped" if stop.asked else "")


@dataclass(frozen=True)
class Row:
    """A line of the table. ``share``: of the baseline, where the figure is a cost that both runs have."""

    name: str
    baseline: str
    preset: str
    share: float | None = None


def rows(now: Comparison) -> list[Row]:
    """The measured figures, with units; a run that has not ended has dashes."""
    base, run = now.baseline.done, now.preset.done
    out = [
        _row("visual tokens", base, run, lambda d: d.report.visual_tokens_after, "{:.0f}"),
        _row("prompt tokens", base, run, lambda d: d.report.prompt_tokens_after, "{:.0f}"),
        _row("KV cache, MiB", base, run, lambda d: _over(d.report.kv_bytes, MIB), "{:.3g}"),
        _row("time to first token, ms", base, run, lambda d: d.report.prefill_ms, "{:.1f}"),
        _row("total time, ms", base, run, lambda d: d.report.total_ms, "{:.1f}"),
        _row("tokens per second", base, run, lambda d: d.tokens_per_second, "{:.1f}", cost=False),
        _row("new tokens", base, run, lambda d: d.report.new_tokens, "{:.0f}", cost=False),
    ]
    same = now.same_answer
    return [*out, Row("same answer", "", "" if same is None else "yes" if same else "no")]


def _row(name: str, base: Done | None, run: Done | None, read: Any, form: str, *, cost: bool = True) -> Row:
    values = [None if done is None or _unmeasured(done) else read(done) for done in (base, run)]
    texts = ["-" if value is None else form.format(value) for value in values]
    share = values[1] / values[0] if cost and values[0] and values[1] is not None else None
    return Row(name, texts[0], texts[1], share)


def _unmeasured(done: Done) -> bool:
    """A run that was stopped before it began has an empty report."""
    return done.report.total_ms is None


def _over(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit
