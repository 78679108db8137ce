"""One picture and question at shrinking budgets: what the Sweep tab streams."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vlmeff.demo.compare import MIB, PLAIN
from vlmeff.demo.engine import Answering, Choice, Done, user_turn
from vlmeff.demo.work import Note, Stop
from vlmeff.errors import VlmeffError
from vlmeff.evaluation.normalize import vqa

BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


@dataclass(frozen=True)
class Point:
    """One run. ``share`` of the visual tokens asked for; ``correct``: None where no answer is known."""

    share: float
    visual_tokens: int
    answer: str
    same: bool
    correct: bool | None
    first_token_ms: float | None
    total_ms: float | None
    kv_mib: float | None
    failed: str = ""


@dataclass(frozen=True)
class Sweep:
    """The runs so far, of ``total``."""

    points: Sequence[Point] = ()
    total: int = len(BUDGETS)
    status: str = ""
    ended: bool = False


def sweep(
    engine: Answering,
    picture: Image.Image,
    question: str,
    choice: Choice,
    *,
    model: str | None = None,
    known: str | None = None,
    budgets: Sequence[float] = BUDGETS,
    max_new_tokens: int = 32,
    stop: Stop | None = None,
) -> Iterator[Sweep]:
    """Answer at every budget, the model as it is first (100 %).

    Args:
        choice: names the method; its ``keep`` is replaced by each budget.  known: the right answer, if there is one.
    """
    stop = stop if stop is not None else Stop()
    now = Sweep(total=len(budgets))
    reference: str | None = None
    for share in budgets:
        if stop.asked:
            break
        how = PLAIN if share >= 1 else replace(choice, keep=share)
        try:
            done = yield from _run(engine, picture, question, how, model, now, share, max_new_tokens, stop)
        except VlmeffError as error:  # a budget that this model or method cannot meet says so in its row
            if how is PLAIN:
                raise
            point = Point(share, 0, "", False, None, None, None, None, failed=str(error))
        else:
            if done.stopped:
                break
            reference = done.text if reference is None else reference
            point = _point(share, done, reference, known)
        now = replace(now, points=(*now.points, point))
        yield now
    yield replace(now, status="stopped" if stop.asked else "done", ended=True)


def accuracy(points: Sequence[Point]) -> tuple[int, int]:
    """(right answers, answers that were judged)."""
    judged = [point.correct for point in points if point.correct is not None]
    return sum(judged), len(judged)


def _run(
    engine: Answering,
    picture: Image.Image,
    question: str,
    how: Choice,
    model: str | None,
    now: Sweep,
    share: float,
    longest: int,
    stop: Stop,
) -> Generator[Sweep, None, Done]:
    """Yields what is going on; returns the Done."""
    at = f"{len(now.points) + 1} of {now.total}: {share:.0%} of the visual tokens"
    yield replace(now, status=at)
    turns = [user_turn(question, [picture])]
    for news in engine.answer(turns, how, model=model, max_new_tokens=longest, stop=stop):
        if isinstance(news, Done):
            return news
        if isinstance(news, Note):
            yield replace(now, status=f"{at}, {news.text}")
    raise AssertionError("an answer ends in Done")


def _point(share: float, done: Done, reference: str, known: str | None) -> Point:
    r = done.report
    tokens = r.visual_tokens_after if r.visual_tokens_processed is None else round(r.visual_tokens_processed)
    return Point(
        share,
        tokens,
        done.text,
        done.text == reference,
        None if known is None else vqa(done.text) == vqa(known),
        r.prefill_ms,
        r.total_ms,
        None if r.kv_bytes is None else r.kv_bytes / MIB,
    )
