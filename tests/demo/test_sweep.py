"""The sweep over budgets, on an engine that is made up here and on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from PIL import Image

from vlmeff.demo.engine import Choice, Done, Engine, Text
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.sweep import BUDGETS, Sweep, accuracy, sweep
from vlmeff.demo.work import Note, Stop
from vlmeff.errors import ConfigError, ModelLoadError
from vlmeff.reporting import Report

PICTURE = Image.new("RGB", (8, 8))
METHOD = Choice(tokens="hiprune")


class Counting:
    """Right down to a budget of 0.25, wrong below, and without a budget below 0.1."""

    def __init__(self) -> None:
        self.asked: list[Choice] = []

    def presets(self, name: str) -> list[str]:
        return []

    def answer(
        self, turns: Sequence[Any], choice: Choice, *, model: str | None = None, max_new_tokens: int = 64,
        stop: Stop | None = None,
    ) -> Iterator[Text | Note | Done]:  # fmt: skip
        self.asked.append(choice)
        keep = 1.0 if choice.keep is None else choice.keep
        if keep < 0.1:
            raise ConfigError("that is too few")
        yield Text("f")
        tokens = round(200 * keep)
        yield Done("four" if keep >= 0.25 else "five", Report(visual_tokens_after=tokens, total_ms=9.0, kv_bytes=2**19))


def end(engine: Any, **options: Any) -> Sweep:
    *_, last = sweep(engine, PICTURE, "how many?", METHOD, **options)
    return last


def test_every_budget_runs_once_the_model_as_it_is_first() -> None:
    engine = Counting()
    now = end(engine)
    assert engine.asked == [Choice(), *(Choice(tokens="hiprune", keep=share) for share in BUDGETS[1:])]
    assert [point.share for point in now.points] == list(BUDGETS)
    assert [point.visual_tokens for point in now.points if not point.failed] == [200, 150, 100, 70, 50, 30, 20]
    assert now.status == "done"
    assert now.points[0].kv_mib == 0.5


def test_answers_are_judged_only_where_the_right_one_is_known() -> None:
    judged = end(Counting(), known="4").points  # as VQA's normaliser reads numbers
    assert [point.correct for point in judged] == [True] * 5 + [False] * 2 + [None]
    assert accuracy(judged) == (5, 7)
    assert accuracy(end(Counting()).points) == (0, 0)


def test_a_budget_that_fails_says_so_in_its_row_and_the_others_run() -> None:
    assert [point.failed for point in end(Counting()).points] == [""] * 7 + ["that is too few"]


def test_a_sweep_whose_reference_fails_ends() -> None:
    class Broken(Counting):
        def answer(self, turns: Any, choice: Choice, **options: Any) -> Iterator[Any]:
            raise ModelLoadError("no such model")

    with pytest.raises(ModelLoadError):
        end(Broken())


def test_progress_is_counted() -> None:
    said = [now.status for now in sweep(Counting(), PICTURE, "how many?", METHOD)]
    assert said[0] == "1 of 8: 100% of the visual tokens"
    assert "8 of 8: 5% of the visual tokens" in said


def test_a_stop_ends_the_sweep_with_what_has_come() -> None:
    engine, stop = Counting(), Stop()
    for now in sweep(engine, PICTURE, "how many?", METHOD, stop=stop):
        if len(now.points) == 2:
            stop.set()
    assert (len(engine.asked), len(now.points), now.status) == (2, 2, "stopped")


def test_budgets_of_the_shipped_model_keep_that_share_of_its_tokens() -> None:
    example = next(example for example in EXAMPLES if example.answer == "yellow")
    picture = Image.open(example.path).convert("RGB")
    *_, now = sweep(
        Engine("tiny-llava", device="cpu"), picture, example.question, METHOD, known=example.answer, budgets=(1.0, 0.25)
    )
    assert [point.visual_tokens for point in now.points] == [324, 81]
    assert now.points[0].correct is True
    assert now.points[0].same
    assert now.points[1].kv_mib == pytest.approx(now.points[0].kv_mib * 81 / 324, rel=0.2)  # and a short question
