"""One piece of work at a time, stoppable, with its errors handed to whoever asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from vlmeff.demo.work import WAITING, Note, Stop, Stopped, alone, run_alone

PATIENCE_SECONDS = 30


def test_news_come_in_order_and_the_iterator_ends_with_the_work() -> None:
    def work(say: Callable[[Any], None], stop: Stop) -> None:
        for number in range(3):
            say(number)

    assert list(run_alone(work)) == [0, 1, 2]
    assert not alone.locked()


def test_nothing_runs_beside_it_and_who_waits_is_told() -> None:
    inside, most = [0], [0]
    release = threading.Event()

    def work(say: Callable[[Any], None], stop: Stop) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        say("in")
        assert release.wait(PATIENCE_SECONDS)
        inside[0] -= 1

    first, second = run_alone(work), run_alone(work)
    assert next(first) == "in"
    assert next(second) == Note(WAITING)
    release.set()
    assert (list(first), list(second), most[0]) == ([], ["in"], 1)


def test_who_waits_can_stop_and_then_never_begins() -> None:
    stop = Stop()
    with alone:
        waiting = run_alone(lambda say, stop: say("ran"), stop=stop)
        assert next(waiting) == Note(WAITING)
        stop.set()
        with pytest.raises(Stopped):
            next(waiting)


def test_an_error_is_raised_where_the_news_are_read_and_the_next_work_runs() -> None:
    def work(say: Callable[[Any], None], stop: Stop) -> None:
        say("first")
        raise ZeroDivisionError

    news = run_alone(work)
    assert next(news) == "first"
    with pytest.raises(ZeroDivisionError):
        next(news)
    assert list(run_alone(lambda say, stop: say("next"))) == ["next"]


def test_leaving_sets_the_flag_of_the_work_and_not_the_flag_that_was_given() -> None:
    given, ended = Stop(), threading.Event()

    def work(say: Callable[[Any], None], stop: Stop) -> None:
        say("begun")
        end = time.monotonic() + PATIENCE_SECONDS
        while not stop.asked and time.monotonic() < end:
            time.sleep(0.001)
        if stop.asked:
            ended.set()

    news = run_alone(work, stop=given)
    assert next(news) == "begun"
    news.close()
    assert ended.wait(PATIENCE_SECONDS)
    assert not given.asked
