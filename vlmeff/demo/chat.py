"""A conversation with pictures, as the Chat tab keeps it on the server and as the model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from vlmeff.demo.engine import Turn, assistant_turn, user_turn
from vlmeff.demo.limits import Limits
from vlmeff.errors import DataError

MOST_MESSAGES = 60


@dataclass(frozen=True)
class Message:
    """What one side said. ``pictures``: paths of files that were uploaded here, shown before the text."""

    role: str
    text: str
    pictures: tuple[str, ...] = ()


def check_length(messages: Sequence[Message], limits: Limits) -> None:
    """Raises DataError: too many pictures or messages."""
    limits.check_count(sum(len(message.pictures) for message in messages))
    if len(messages) > MOST_MESSAGES:
        raise DataError(f"This conversation has {MOST_MESSAGES} messages: start a new one.")


def turns_of(messages: Sequence[Message], open_picture: Callable[[str], Image.Image]) -> list[Turn]:
    """The conversation as the model takes it.

    A question that was stopped before an answer joins the one that follows: many chat templates insist that the two
    sides take turns.
    """
    turns: list[Turn] = []
    for message in messages:
        if message.role == "assistant":
            turn = assistant_turn(message.text)
        else:
            turn = user_turn(message.text, [open_picture(path) for path in message.pictures])
        if turns and turns[-1]["role"] == turn["role"]:
            turns[-1]["content"] += turn["content"]
        else:
            turns.append(turn)
    return turns
