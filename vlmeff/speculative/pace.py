"""How long drafts may be: shorter while they are wrong, longer while they are right."""

from __future__ import annotations

from typing import Any

MISSES = 3  # rounds without an accepted token after which drafts get shorter
REST = 8  # tokens for which a drafter that rests is left alone then
GROWTH = 2  # tokens that a draft accepted in full adds to the next


class Pace:
    """``settings``: a ``TextSpeculation``."""

    def __init__(self, settings: Any) -> None:
        self._adaptive, self._rests = settings.adaptive, settings.drafter.rests
        self._longest = self._depth = settings.drafter.depth
        self._misses = self._rested_until = 0

    def depth(self, emitted: int) -> int:
        """Tokens of the next draft at most, ``emitted`` tokens into the answer."""
        return 0 if emitted < self._rested_until else self._depth

    def note(self, drafted: int, accepted: int, *, emitted: int) -> None:
        """The longest path of a draft, and how much of it was right."""
        if not self._adaptive:
            return
        self._misses = 0 if accepted else self._misses + 1
        if self._misses == MISSES:
            self._misses = 0
            self._depth = max(1, self._depth // 2)
            if self._rests:
                self._rested_until = emitted + REST
        elif accepted == drafted:
            self._depth = min(self._longest, self._depth + GROWTH)
