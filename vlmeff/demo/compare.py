"""One question, answered by the model as it is and with a preset: what the Compare tab streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from vlmeff.demo.engine import Answering, Choice, Done, Text, user_turn
from vlmeff.demo.work import Note, Stop
from vlmeff.errors import VlmeffError

PLAIN = Choice()
MIB = 2**20
CONTROLS = ("random", "downsample")
ALL_KEPT = "no run: the preset kept every visual token, so there is no smaller number to match"
NO_COUNT = "no run: the preset's own run did not end"


@dataclass(frozen=True)
class Side:
    """One of the answers, as far as it has come. ``failed``: why there is none, where the others go on."""

    text: str = ""
    done: Done | None = None
    failed: str = ""

    @property
    def measured(self) -> Done | None:
        """A run that ended by itself; a stopped one has done less work than the others."""
        return None if self.done is None or self.done.stopped else self.done


@dataclass(frozen=True)
class Comparison:
    """What is on the page at one moment.

    ``order``: the runs in the order of execution.  ``choice``: the preset's; None before
    the first run.  ``control``: a third run that keeps as
    many visual tokens as the preset did, by the method ``control_method``.
    """

    status: str = ""
    baseline: Side = field(default_factory=Side)
    preset: Side = field(default_factory=Side)
    control: Side = field(default_factory=Side)
    order: tuple[str, ...] = ("baseline", "preset")
    choice: Choice | None = None
    control_method: str | None = None

    @property
    def runs(self) -> tuple[str, ...]:
        """The columns of the table."""
        return ("baseline", "preset", "control") if self.control_method else ("baseline", "preset")

    def side(self, name: str) -> Side:
        side: Side = getattr(self, name)
        return side

    def label(self, name: str) -> str:
        if name == "baseline":
            return "baseline"
        if name == "control":
            return f"control: {self.control_method}"
        return "preset" if self.choice is None else describe(self.choice)

    @property
    def finished(self) -> bool:
        """Both runs that are compared ended by themselves."""
        return self.baseline.measured is not None and self.preset.measured is not None

    def same_answer(self, name: str = "preset") -> bool | None:
        base, run = self.baseline.measured, self.side(name).measured
        return None if base is None or run is None else base.text == run.text


def describe(choice: Choice) -> str:
    """A choice in a few words, for the head of a column. The baseline beside itself shows how noisy the times are."""
    if choice.plain:
        return "baseline again"
    if choice.tokens is None:
        return f"preset {choice.preset}"
    if choice.keep is None:
        return choice.tokens
    return (
        f"{choice.tokens}, {choice.keep:.0%}" if isinstance(choice.keep, float) else f"{choice.tokens}, {choice.keep}"
    )


def compare(
    engine: Answering,
    picture: Image.Image,
    question: str,
    choice: Choice,
    *,
    model: str | None = None,
    preset_first: bool = False,
    control: str | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    stop: Stop | None = None,
) -> Iterator[Comparison]:
    """Run both, one after the other, and yield the page after every piece of news.

    Args:
        preset_first: alternates from click to click, so that neither run always has the warm caches.
        control: one of ``CONTROLS``: a third run, the last, that keeps as many visual tokens as the preset's run did.
        seed: of the control ``random``.
    """
    stop = stop if stop is not None else Stop()
    turns = [user_turn(question, [picture])]
    order: tuple[str, ...] = ("preset", "baseline") if preset_first else ("baseline", "preset")
    order = (*order, "control") if control else order
    now = Comparison(status="starting", order=order, choice=choice, control_method=control)
    yield now
    for name in order:
        if stop.asked:
            break
        how = PLAIN if name == "baseline" else choice
        if name == "control":
            found = same_budget(now.preset.measured, control or "", seed)
            if isinstance(found, str):
                now = replace(now, control=Side(failed=found))
                continue
            how = found
        try:
            for news in engine.answer(turns, how, model=model, max_new_tokens=max_new_tokens, stop=stop):
                now = _after(now, name, news)
                yield now
        except VlmeffError as error:
            if name != "control":
                raise
            now = replace(now, control=Side(failed=str(error)))
    yield replace(now, status="stopped" if stop.asked else "")


def _after(now: Comparison, name: str, news: Text | Note | Done) -> Comparison:
    if isinstance(news, Note):
        return replace(now, status=f"{now.label(name)}: {news.text}")
    side: dict[str, Any] = {name: Side(news.text, news if isinstance(news, Done) else None)}
    return replace(now, status=f"{now.label(name)}: answering", **side)


def same_budget(preset: Done | None, method: str, seed: int = 0) -> Choice | str:
    """The run of a control method with as many visual tokens as a preset's run kept, or why there is none.

    Of a preset that drops tokens between layers: as many as it processed, averaged over the layers.
    """
    if preset is None:
        return NO_COUNT
    r = preset.report
    kept = r.visual_tokens_after if r.visual_tokens_processed is None else round(r.visual_tokens_processed)
    if kept >= r.visual_tokens_before:
        return ALL_KEPT
    return Choice(tokens=method, keep=max(1, kept), seed=seed if method == "random" else None)


@dataclass(frozen=True)
class Row:
    """A line of the table. ``share``: the preset's of the baseline, where the figure is a cost that both runs have."""

    name: str
    values: tuple[str, ...]
    share: float | None = None
    is_cost: bool = False


def rows(now: Comparison) -> list[Row]:
    """The measured figures, with units; a run that has not ended has dashes."""
    out = [
        _row(now, "visual tokens", _visual_tokens, "{:.0f}"),
        _row(now, "prompt tokens", lambda d: d.report.prompt_tokens_after, "{:.0f}"),
        _row(now, "KV cache, MiB", lambda d: _over(d.report.kv_bytes, MIB), "{:.3g}"),
        _row(now, "time to first token, ms", lambda d: d.report.prefill_ms, "{:.1f}"),
        _row(now, "total time, ms", lambda d: d.report.total_ms, "{:.1f}"),
        _row(now, "tokens per second", lambda d: d.tokens_per_second, "{:.1f}", cost=False),
        _row(now, "new tokens", lambda d: d.report.new_tokens, "{:.0f}", cost=False),
    ]
    peaks = [side.measured.peak_bytes for side in map(now.side, now.runs) if side.measured is not None]
    if any(peak is not None for peak in peaks):
        out.append(_row(now, "peak device memory, MiB", lambda d: _over(d.peak_bytes, MIB), "{:.0f}"))
    same = {None: "-", True: "yes", False: "no"}
    out.append(Row("same answer", ("", *(same[now.same_answer(name)] for name in now.runs[1:]))))
    ran = dict(zip(now.order, ("first", "second", "third"), strict=False))
    known = now.choice is not None
    out.append(Row("order of the runs", tuple(ran[name] if known else "-" for name in now.runs)))
    return out


def verdict(now: Comparison) -> str:
    """What the finished comparison says, in a sentence or two, whichever way it went; empty before."""
    base, run = now.baseline.measured, now.preset.measured
    if base is None or run is None or not base.report.total_ms or not run.report.total_ms:
        return ""
    share = run.report.total_ms / base.report.total_ms
    word = "slower" if share > 1 else "faster"
    who = "The baseline's other run" if now.choice is not None and now.choice.plain else "The preset"
    text = f"{who} was {word} in this run: {run.report.total_ms:.0f} against {base.report.total_ms:.0f} ms"
    if 0.95 <= share <= 1.05:
        text = f"Both took about as long in this run: {run.report.total_ms:.0f} and {base.report.total_ms:.0f} ms"
    lengths = run.report.new_tokens, base.report.new_tokens
    if lengths[0] != lengths[1]:
        text += f", for answers of {lengths[0]} and {lengths[1]} tokens"
    same = "The answers are the same." if now.same_answer() else "The answers differ."
    return f"{text}. {same}"


def _row(now: Comparison, name: str, read: Callable[[Done], float | None], form: str, *, cost: bool = True) -> Row:
    done = [now.side(run).measured for run in now.runs]
    values = [None if one is None or one.report.total_ms is None else read(one) for one in done]
    share = values[1] / values[0] if cost and values[0] and values[1] is not None else None
    return Row(name, tuple("-" if value is None else form.format(value) for value in values), share, cost)


def _visual_tokens(done: Done) -> float:
    r = done.report
    return r.visual_tokens_after if r.visual_tokens_processed is None else r.visual_tokens_processed


def _over(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit
