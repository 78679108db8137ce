"""What a drafter is: a setting that starts a session for each ``generate`` call, and what the session is told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vlmeff.speculative.tree import Draft

# Attributes of a configuration that name ids which stand for something else than text.
MARKERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "boi_token_id",
    "eoi_token_id",
    "boi_token_index",
    "eoi_token_index",
)


@dataclass(frozen=True, eq=False)
class Request:
    """One ``generate`` call, after its prompt has gone through the model.

    ``prompt`` the ids that the model was given (a shortened prompt where pictures are reduced); ``inputs`` the
    arguments as the caller gave them, whole pictures included, and ``assistant_inputs`` those meant for an assistant.
    ``processors``: the logits processors of the call. ``vocabulary``: V of the model. ``takes_trees``: a draft may
    branch.
    """

    model: Any
    prompt: list[int]
    inputs: Mapping[str, Any]
    assistant_inputs: Mapping[str, Any] | None
    processors: Any
    do_sample: bool
    vocabulary: int
    takes_trees: bool
    forbidden: Collection[int] = field(default_factory=frozenset)
    last: Collection[int] = field(default_factory=frozenset)

    def legal(self, token: int) -> bool:
        """Whether a draft may hold this id."""
        return 0 <= token < self.vocabulary and token not in self.forbidden


class Session(Protocol):
    """Drafts for one call."""

    def propose(self, ids: Sequence[int], depth: int, *, early: bool) -> Draft:
        """Up to ``depth`` tokens behind ``ids``, the prompt and what has been emitted (always the same growing list).

        ``early``: the answer has only begun; propose only what is very likely.
        """
        ...

    def observe(self, tokens: Sequence[int], logits: Tensor) -> None:
        """A pass of the model is done: ``logits`` [m, V] float, unprocessed, behind each of ``tokens``."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Settings of one way to draft; may keep what it learns from one call to the next.

    ``name`` for reports; ``depth``: tokens of the longest path; ``rests``: whether to pause for some tokens when the
    last drafts were all wrong (for drafters that cost nothing to switch off and on).
    """

    @property
    def name(self) -> str: ...

    @property
    def depth(self) -> int: ...

    @property
    def rests(self) -> bool: ...

    def start(self, request: Request) -> Session: ...


def forbidden_ids(model: Any, pad: int | None, last: Collection[int]) -> frozenset[int]:
    """Ids that no draft may hold: placeholders and marks of pictures and videos, and padding."""
    configs = [model.config, model.config.get_text_config()]
    found = {getattr(config, name, None) for config in configs for name in MARKERS}
    found |= {pad} - set(last)  # many models pad with the end of text
    return frozenset(token for token in found if isinstance(token, int))
