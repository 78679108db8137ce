"""One piece of work at a time: in a thread of its own, telling its news, and ended when nobody listens any more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SILENCE_SECONDS = 600.0  # without news: the thread has died in a way that no exception tells
LEAVING_SECONDS = 1.0  # who closes the iterator may be an event loop: it does not wait for a model that still loads
LOOK_AGAIN_SECONDS = 0.1
WAITING = "waiting for another run to end"

alone = threading.Lock()
"""Held while a model runs: all of a process share one processor and its memory."""


@dataclass(frozen=True)
class Note:
    """What is going on, in a few words: loading, warming up, waiting for another visitor."""

    text: str


class Stopped(Exception):
    """The work was told to end, and did."""


class Stop:
    """Set by the stop button: ``generate`` ends at its next token, and no further run begins."""

    def __init__(self, outer: Stop | None = None) -> None:
        self._event, self._outer = threading.Event(), outer

    def set(self) -> None:
        self._event.set()

    @property
    def asked(self) -> bool:
        return self._event.is_set() or (self._outer is not None and self._outer.asked)

    def check(self) -> None:
        """Raise ``Stopped`` where it is set."""
        if self.asked:
            raise Stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """As a stopping criterion of transformers."""
        return torch.full((len(input_ids),), self.asked, device=input_ids.device, dtype=torch.bool)


def run_alone(work: Callable[[Callable[[Any], None], Stop], None], *, stop: Stop | None = None) -> Iterator[Any]:
    """What ``work(say, stop)`` says, while no other work runs; a ``Note`` before that where it has to wait.

    Leaving the iterator early sets the flag that the work is given, as does ``stop``.

    Raises:
        Stopped: it ended because of the flag, before its beginning or by ``Stop.check``.
        What the work raises.
    """
    flag = Stop(outer=stop)  # of its own, because leaving this iterator is no wish to end what comes after it
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    worker = threading.Thread(target=_work, args=(work, flag, news.put), daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = news.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"demo: the model said nothing for {SILENCE_SECONDS:.0f} seconds") from None
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        flag.set()
        worker.join(LEAVING_SECONDS)


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _work(work: Callable[..., None], stop: Stop, say: Callable[[Any], None]) -> None:
    try:
        if not alone.acquire(blocking=False):
            say(Note(WAITING))
            while not alone.acquire(timeout=LOOK_AGAIN_SECONDS):
                stop.check()
        try:
            stop.check()
            work(say, stop)
        finally:
            alone.release()
    except BaseException as error:  # handed to whoever asked
        say(_End(error))
    else:
        say(_End(None))
