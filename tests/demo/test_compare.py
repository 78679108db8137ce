"""What the Compare tab shows, from an engine whose answers and figures are made up here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmeff.demo.compare import ALL_KEPT, NO_COUNT, Comparison, Side, compare, describe, rows, verdict
from vlmeff.demo.engine import Choice, Done, Text
from vlmeff.demo.saving import save_comparison
from vlmeff.demo.work import Note, Stop
from vlmeff.drawing import TokenMap
from vlmeff.errors import ConfigError
from vlmeff.reporting import Report

PICTURE = Image.new("RGB", (8, 6), "white")
FAST = Choice(preset="fast")
BASE = Report(visual_tokens_before=100, visual_tokens_after=100, prompt_tokens_after=110, new_tokens=5,
              kv_bytes=4 * 2**20, prefill_ms=50.0, total_ms=100.0)  # fmt: skip
LESS = Report(visual_tokens_before=100, visual_tokens_after=30, prompt_tokens_after=40, new_tokens=5,
              kv_bytes=1 * 2**20, prefill_ms=20.0, total_ms=150.0)  # fmt: skip


class Scripted:
    """Answers by choice; what was asked is kept in ``asked``."""

    def __init__(self, plain: Done, preset: Done, control: Done | Exception | None = None) -> None:
        self.plain, self.preset, self.control = plain, preset, control
        self.asked: list[Choice] = []

    def presets(self, name: str) -> list[str]:
        return ["fast"]

    def answer(
        self, turns: Sequence[Any], choice: Choice, *, model: str | None = None, max_new_tokens: int = 64,
        stop: Stop | None = None,
    ) -> Iterator[Text | Note | Done]:  # fmt: skip
        self.asked.append(choice)
        done = self.plain if choice.plain else self.preset if choice.preset else self.control
        if isinstance(done, Exception):
            raise done
        assert done is not None
        yield Note("warm-up run, not measured")
        yield Text(done.text[:1])
        yield done


def end(engine: Scripted, **options: Any) -> Comparison:
    *_, last = compare(engine, PICTURE, "what?", FAST, **options)
    return last


def shown(now: Comparison) -> dict[str, tuple[str, ...]]:
    return {row.name: row.values for row in rows(now)}


def test_both_run_in_the_order_asked_for_and_the_page_says_which() -> None:
    engine = Scripted(Done("a", BASE), Done("a", LESS))
    first, second = end(engine), end(engine, preset_first=True)
    assert engine.asked == [Choice(), FAST, FAST, Choice()]
    assert shown(first)["order of the runs"] == ("first", "second")
    assert shown(second)["order of the runs"] == ("second", "first")


def test_news_come_as_they_happen_with_the_name_of_the_run() -> None:
    said = [now.status for now in compare(Scripted(Done("a", BASE), Done("b", LESS)), PICTURE, "what?", FAST)]
    assert said == [
        "starting",
        "baseline: warm-up run, not measured", "baseline: answering", "baseline: answering",
        "preset fast: warm-up run, not measured", "preset fast: answering", "preset fast: answering",
        "",
    ]  # fmt: skip


def test_the_table_has_the_figures_with_units() -> None:
    table = shown(end(Scripted(Done("a", BASE), Done("a", LESS))))
    assert table["visual tokens"] == ("100", "30")
    assert table["prompt tokens"] == ("110", "40")
    assert table["KV cache, MiB"] == ("4", "1")
    assert table["time to first token, ms"] == ("50.0", "20.0")
    assert table["total time, ms"] == ("100.0", "150.0")
    assert table["tokens per second"] == ("80.0", f"{4 / 0.13:.1f}")  # of the four behind the first
    assert table["same answer"] == ("", "yes")
    assert "peak device memory, MiB" not in table


def test_shares_are_of_costs_alone() -> None:
    shares = {row.name: row.share for row in rows(end(Scripted(Done("a", BASE), Done("a", LESS)))) if row.is_cost}
    assert shares == pytest.approx(
        {"visual tokens": 0.3, "prompt tokens": 40 / 110, "KV cache, MiB": 0.25, "time to first token, ms": 0.4,
         "total time, ms": 1.5}
    )  # fmt: skip


def test_device_memory_has_a_row_where_it_was_measured() -> None:
    now = end(Scripted(Done("a", BASE, peak_bytes=3 * 2**30), Done("a", LESS, peak_bytes=2**30)))
    assert shown(now)["peak device memory, MiB"] == ("3072", "1024")


@pytest.mark.parametrize(("answer", "same"), [("a", "yes"), ("b", "no")])
def test_same_answer_says_yes_or_no(answer: str, same: str) -> None:
    assert shown(end(Scripted(Done("a", BASE), Done(answer, LESS))))["same answer"][1] == same


def test_the_verdict_says_slower_where_it_was_slower() -> None:
    slower = verdict(end(Scripted(Done("a", BASE), Done("a", LESS))))
    assert slower == "The preset was slower in this run: 150 against 100 ms. The answers are the same."
    faster = verdict(end(Scripted(Done("a", LESS), Done("b", BASE))))
    assert faster == "The preset was faster in this run: 100 against 150 ms. The answers differ."
    equal = verdict(end(Scripted(Done("a", BASE), Done("a", BASE))))
    assert equal.startswith("Both took about as long")


def test_the_verdict_says_when_the_answers_are_not_of_one_length() -> None:
    longer = Report(new_tokens=9, total_ms=150.0)
    assert "for answers of 9 and 5 tokens" in verdict(end(Scripted(Done("a", BASE), Done("b", longer))))


def test_a_stopped_run_is_no_comparison() -> None:
    now = end(Scripted(Done("a", BASE), Done("a", LESS, stopped=True)))
    assert not now.finished
    assert verdict(now) == ""
    table = shown(now)
    assert table["same answer"][1] == "-"
    assert table["total time, ms"] == ("100.0", "-")


def test_after_a_stop_no_other_run_begins() -> None:
    engine, stop = Scripted(Done("a", BASE), Done("a", LESS)), Stop()
    for now in compare(engine, PICTURE, "what?", FAST, stop=stop):
        if now.status == "baseline: answering":
            stop.set()
    assert engine.asked == [Choice()]
    assert now.status == "stopped"


@pytest.mark.parametrize("method", ["random", "downsample"])
def test_the_control_keeps_as_many_tokens_as_the_preset_did(method: str) -> None:
    engine = Scripted(Done("a", BASE), Done("a", LESS), Done("b", LESS))
    now = end(engine, control=method, seed=7, preset_first=True)
    assert engine.asked[2] == Choice(tokens=method, keep=30, seed=7 if method == "random" else None)
    assert shown(now)["same answer"] == ("", "yes", "no")
    assert shown(now)["order of the runs"] == ("second", "first", "third")
    assert now.label("control") == f"control: {method}"


def test_the_control_of_a_preset_that_drops_between_layers_keeps_the_mean() -> None:
    between = Report(visual_tokens_before=100, visual_tokens_after=100, visual_tokens_processed=41.6, total_ms=9.0)
    engine = Scripted(Done("a", BASE), Done("a", between), Done("a", LESS))
    end(engine, control="random")
    assert engine.asked[2].keep == 42


def test_where_there_is_nothing_to_control_it_says_why() -> None:
    now = end(Scripted(Done("a", BASE), Done("a", BASE)), control="random")
    assert (now.control.failed, now.finished) == (ALL_KEPT, True)
    now = end(Scripted(Done("a", BASE), Done("a", LESS, stopped=True)), control="random")
    assert now.control.failed == NO_COUNT


def test_a_control_that_fails_leaves_the_comparison() -> None:
    now = end(Scripted(Done("a", BASE), Done("a", LESS), ConfigError("not for this model")), control="random")
    assert (now.control.failed, now.finished) == ("not for this model", True)


def test_the_baseline_can_be_held_against_itself() -> None:
    engine = Scripted(Done("a", BASE), Done("a", LESS))
    (*_, now) = compare(engine, PICTURE, "what?", Choice())
    assert engine.asked == [Choice(), Choice()]
    assert now.label("preset") == "baseline again"
    slower = replace(now, preset=Side("a", Done("a", LESS)))
    assert verdict(slower).startswith("The baseline's other run was slower")


def test_a_choice_has_a_short_name() -> None:
    assert describe(FAST) == "preset fast"
    assert describe(Choice(tokens="hiprune", keep=0.33)) == "hiprune, 33%"
    assert describe(Choice(tokens="hiprune", keep=40)) == "hiprune, 40"


def test_a_saved_comparison_has_names_made_here_and_holds_what_was_shown(tmp_path: Path) -> None:
    drawn = TokenMap("image 1", PICTURE, Image.new("RGB", (8, 6), "black"), 30, 100, [])
    now = end(Scripted(Done("a", BASE), Done("<b>ü</b>", LESS, [drawn])))
    folders = {save_comparison(tmp_path / "log", now, PICTURE, "../../etc/passwd", "tiny-llava") for _ in range(2)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path / "log"}
    folder = folders.pop()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", folder.name)
    assert sorted(file.name for file in folder.iterdir()) == ["comparison.json", "picture.png", "preset-map-1.png"]
    record = json.loads((folder / "comparison.json").read_text("utf-8"))
    assert (record["question"], record["model"], record["order"]) == (
        "../../etc/passwd", "tiny-llava", ["baseline", "preset"]
    )  # fmt: skip
    assert record["runs"]["preset"]["answer"] == "<b>ü</b>"
    assert record["runs"]["baseline"]["report"]["total_ms"] == 100.0
    assert Image.open(folder / "preset-map-1.png").getpixel((0, 0)) == (0, 0, 0)


def test_a_save_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = end(Scripted(Done("a", BASE), Done("a", LESS)))
    monkeypatch.setattr(Path, "write_text", lambda *args, **options: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(ConfigError, match="cannot be saved \\(disk full\\)"):
        save_comparison(tmp_path, now, PICTURE, "what?", "tiny-llava")
    assert not list(tmp_path.iterdir())


def test_visitors_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmeff.demo.saving.MOST_SAVED", 2)
    now = end(Scripted(Done("a", BASE), Done("a", LESS)))
    for _ in range(2):
        save_comparison(tmp_path, now, PICTURE, "what?", "tiny-llava")
    with pytest.raises(ConfigError, match="2 comparisons are saved already"):
        save_comparison(tmp_path, now, PICTURE, "what?", "tiny-llava")


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be saved"):
        save_comparison(tmp_path / "file", Comparison(), PICTURE, "what?", "tiny-llava")
