"""Draft by looking the last tokens up in the text so far: n-gram (prompt) lookup.

Source: "Prompt Lookup Decoding" (A. Saxena, 2023), as in transformers. Differs: longest n-gram and most recent match
first; matches never go on into a picture's placeholders; a continuation that reaches the end of the text goes on into
itself, so that repetitions are drafted at full length; O(1) per token through a table of n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.speculative.drafting import Request
from vlmeff.speculative.tree import Draft

EARLY_NGRAM = 3  # shorter matches are not worth a wider pass when the answer may end in a few tokens
BORDER = -1  # no token: nothing matches across it


@dataclass(frozen=True)
class Lookup:
    """Copy what followed the last tokens where they stood before.

    Args:
        depth: tokens of a draft at most.
        ngram: tokens that have to match at most; shorter matches are tried down to 1.
        pool: ids of more texts to look in, for example earlier turns or recognised text; older than the prompt.
    Raises:
        ConfigError: depth or ngram < 1, or a pool that is not made of ids.
    """

    depth: int = 10
    ngram: int = 3
    pool: tuple[tuple[int, ...], ...] = ()
    name = "lookup"
    rests = True

    def __post_init__(self) -> None:
        for field, value in (("depth", self.depth), ("ngram", self.ngram)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"Lookup: {field}={value!r} must be an int >= 1.")
        try:
            pool = tuple(tuple(int(token) for token in text) for text in self.pool)
        except (TypeError, ValueError) as error:
            raise ConfigError("Lookup: pool must be a list of texts, each a list of token ids.") from error
        object.__setattr__(self, "pool", pool)

    def start(self, request: Request) -> LookupSession:
        return LookupSession(self, request)


class LookupSession:
    """``text`` is the pool and what has been said so far; ``follows[gram]`` where the last such n-gram went on."""

    def __init__(self, settings: Lookup, request: Request) -> None:
        self._settings, self._request = settings, request
        self._text: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        self._known = 0  # of the ids that propose gets
        for text in settings.pool:
            self._extend([*text, BORDER])

    def _extend(self, tokens: Sequence[int]) -> None:
        """An n-gram enters the table once it is known that text follows it."""
        text, legal = self._text, self._request.legal
        for token in tokens:
            if legal(token):
                for n in range(1, min(self._settings.ngram, len(text)) + 1):
                    gram = tuple(text[-n:])
                    if not legal(gram[0]):
                        break
                    self._follows[gram] = len(text)
            text.append(token)

    def propose(self, ids: Sequence[int], depth: int, *, early: bool) -> Draft:
        self._extend(ids[self._known :])
        self._known = len(ids)
        text, legal = self._text, self._request.legal
        shortest = min(EARLY_NGRAM, self._settings.ngram) if early else 1
        for n in range(min(self._settings.ngram, len(ids)), shortest - 1, -1):
            start = self._follows.get(tuple(text[-n:]))
            if start is not None:
                break
        else:
            return Draft()
        tokens: list[int] = []
        for place in range(start, start + depth):
            token = text[place] if place < len(text) else tokens[place - len(text)]
            if not legal(token):
                break
            tokens.append(token)
        return Draft.chain(tokens)

    def observe(self, tokens: Sequence[int], logits: Tensor) -> None:
        """What the model said comes with the next ``propose``."""
