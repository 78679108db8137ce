"""What the tabs share: the engine, the limits, who is to stop, and how errors reach the visitor."""

from __future__ import annotations

import functools
import html
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlmeff.demo.compare import Comparison
from vlmeff.demo.engine import Answering, Choice
from vlmeff.demo.limits import NO_PICTURE, Limits
from vlmeff.demo.work import Stop
from vlmeff.errors import DataError, VlmeffError

logger = logging.getLogger(__name__)

QUEUE = "model"  # every event that runs a model: one at a time
MOST_SESSIONS = 1000
MOST_KEPT = 32  # they hold pictures
FAVOURITE = "fast"
AS_PRESET = "as the preset says"
BASELINE = "baseline"  # the model as it is, among the presets


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished comparison that its visitor may save."""

    comparison: Comparison
    picture: Image.Image
    question: str
    model: str


@dataclass
class Site:
    """One demo. ``models``: what the visitor may choose from; the first is loaded first."""

    engine: Answering
    models: list[str]
    limits: Limits = field(default_factory=Limits)
    log_dir: Path | None = None
    _kept: OrderedDict[str | None, Kept] = field(default_factory=OrderedDict)
    _stops: OrderedDict[str, Stop] = field(default_factory=OrderedDict)

    def begin(self, session: str | None, tab: str) -> Stop:
        """A new flag for the visitor's run in a tab; a run that still goes on there is told to end."""
        key = f"{tab}/{session}"
        self.stop(session, tab)
        self._stops[key] = stop = Stop()
        self._stops.move_to_end(key)
        while len(self._stops) > MOST_SESSIONS:
            self._stops.popitem(last=False)
        return stop

    def stop(self, session: str | None, tab: str) -> None:
        stop = self._stops.get(f"{tab}/{session}")
        if stop is not None:
            stop.set()

    def keep(self, session: str | None, kept: Kept) -> None:
        """Remember a visitor's last comparison, where such may be saved at all."""
        if self.log_dir is None:
            return
        self._kept[session] = kept
        self._kept.move_to_end(session)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    def kept(self, session: str | None) -> Kept | None:
        """The visitor's last comparison, once: nobody fills the disk by pressing a button."""
        return self._kept.pop(session, None)

    def after(self, session: str | None, tab: str) -> str:
        """What the status line says of a run that did not come to its end."""
        stop = self._stops.get(f"{tab}/{session}")
        return "stopped" if stop is not None and stop.asked else ""

    def picture(self, path: str | None) -> Image.Image:
        """A picture that was uploaded here; a path that a client made up is as good as none.

        Raises:
            DataError.
        """
        from gradio.utils import get_upload_folder

        if path and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            raise DataError("That picture was not uploaded here: drop it on the page.")
        if path and not Path(path).is_file():
            raise DataError("A picture is no longer here, because uploads are deleted after a while: send it again.")
        return self.limits.picture(path)

    def complaints(self, path: str | None, question: str | None) -> tuple[str, str]:
        """What is wrong with a picture's and a question's field, as far as it is seen without opening the file."""
        try:
            self.limits.question(question)
        except DataError as error:
            return "" if path else NO_PICTURE, str(error)
        return "" if path else NO_PICTURE, ""

    def pictures(self, paths: Sequence[str]) -> list[Image.Image]:
        self.limits.check_count(len(paths))
        return [self.picture(path) for path in paths]

    def checked(self, fields: Sequence[Any], *, picture: int, question: int) -> list[Any]:
        """As a ``validator=`` of an event: one verdict per field, before the event gets into the queue."""
        import gradio as gr

        found = dict(zip((picture, question), self.complaints(fields[picture], fields[question]), strict=True))
        return [gr.validate(not found.get(place), found.get(place, "")) for place in range(len(fields))]

    def favourite(self, model: str | None = None) -> str:
        known = self.presets(model)
        return FAVOURITE if FAVOURITE in known else known[-1]

    def presets(self, model: str | None = None) -> list[str]:
        return [BASELINE, *self.engine.presets(self.models[0] if model is None else model)]


def make_choice(
    preset: str | None, method: str | None, share: float | None, *, kv: str | None = None, seed: int | None = None
) -> Choice:
    """From what the controls say: ``share`` in percent of the visual tokens counts where a method is named."""
    if method is None or method == AS_PRESET:
        return Choice(preset=None if preset == BASELINE else preset)
    keep = None if share is None else share / 100
    return Choice(preset=None, tokens=method, keep=keep, kv=kv, seed=seed if method == "random" else None)


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours reach the page in their own words; of anything else it says only that, and the log says all."""
    import gradio as gr

    def as_error(error: Exception) -> Exception:
        if isinstance(error, VlmeffError):
            return gr.Error(html.escape(str(error), quote=False), title="That does not work", print_exception=False)
        logger.exception("demo: %s failed", function.__name__)
        return gr.Error("Something went wrong in the demo; its log says what.", title="Sorry", print_exception=False)

    if _is_generator(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise as_error(error) from error

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise as_error(error) from error

    return call


def _is_generator(function: Callable[..., Any]) -> bool:
    import inspect

    return inspect.isgeneratorfunction(function)
