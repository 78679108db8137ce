"""What stands behind the demo's page: one model at a time, one answer at a time, streamed and stoppable.

No Gradio here. Whoever asks gets an iterator of what has been said so far and, at its end, what the call cost. The
model is wrapped and unwrapped for each run under one lock, so users never see each other's settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vlmeff import zoo
from vlmeff.demo.work import Note, Stop, Stopped, alone, run_alone
from vlmeff.drawing import TokenMap, token_maps
from vlmeff.errors import ConfigError, DataError, UnsupportedModelError
from vlmeff.loading import load
from vlmeff.reporting import Report, measure, report
from vlmeff.wrapping import is_wrapped, unwrap, wrap

MOST_WARM = 1000

Content = list[dict[str, Any]]
Turn = dict[str, Any]
"""{"role": "user" or "assistant", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the model is to run. Nothing named: as it is."""

    preset: str | None = None
    tokens: str | None = None
    """A token method that replaces the preset's."""
    keep: float | int | None = None
    """Its budget: a share of the visual tokens, or tokens per picture."""
    kv: str | None = None
    keep_ratio: float | None = None
    seed: int | None = None
    """Of the method ``random``."""

    @property
    def plain(self) -> bool:
        return self.preset is None and self.tokens is None and self.kv is None

    def wrap(self, model: Any) -> Any:
        if self.plain:
            return unwrap(model) if is_wrapped(model) else model
        given = {"keep": self.keep, "keep_ratio": self.keep_ratio, "seed": self.seed}
        overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return wrap(model, self.preset, tokens=self.tokens, kv=self.kv, **overrides)


@dataclass(frozen=True)
class Text:
    """The whole answer so far."""

    text: str


@dataclass(frozen=True, eq=False)
class Done:
    """The answer and what it cost.

    ``maps``: what became of each picture's tokens; empty for a run without a method.  ``peak_bytes``: the most memory
    of the device that tensors took during the run, the model's weights included; None on a CPU.
    """

    text: str
    report: Report
    maps: list[TokenMap] = field(default_factory=list)
    stopped: bool = False
    peak_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens behind the first one; None where there are none or no times."""
        r = self.report
        if r.total_ms is None or r.prefill_ms is None or r.new_tokens is None or r.new_tokens < 2:
            return None
        seconds = (r.total_ms - r.prefill_ms) / 1000
        return (r.new_tokens - 1) / seconds if seconds > 0 else None


class Answering(Protocol):
    """What the page needs of an engine."""

    def presets(self, name: str) -> list[str]:
        """Names that ``Choice.preset`` may have on a model."""

    def answer(
        self,
        turns: Sequence[Turn],
        choice: Choice,
        *,
        model: str | None = None,
        max_new_tokens: int = 64,
        stop: Stop | None = None,
    ) -> Iterator[Text | Note | Done]:
        """News of the answer to the last turn; the last one is a ``Done``, unless it raises."""


class Engine:
    """One vision-language model and its processor, exchanged for another when a run asks for that.

    Args:
        name: a model of the zoo, a hub id or a folder.
    Raises:
        UnknownModelError, ModelLoadError, UnsupportedModelError: when the model is first needed.
    """

    def __init__(self, name: str = "tiny-llava", *, device: str | None = None, dtype: str = "auto") -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.model: Any = None
        self.processor: Any = None
        self._warm: set[Choice] = set()

    # -- the model

    def load(self) -> None:
        """Load the model that the engine was made for."""
        with alone:
            if self.model is None:
                self._load(self.name)

    def _load(self, name: str) -> None:
        model, processor = load(name, device=self.device, dtype=self.dtype)
        if not hasattr(processor, "image_processor"):
            raise UnsupportedModelError(f"demo: {name!r} ({type(model).__name__}) takes no pictures; use a VLM.")
        self.name, self.model, self.processor = name, model, processor
        self._warm.clear()

    def presets(self, name: str) -> list[str]:
        """The presets that the zoo has for a model."""
        known = self.model if self.model is not None and name == self.name else name
        return [row.preset for row in zoo.preset_table(known)]

    # -- answers

    def answer(
        self,
        turns: Sequence[Turn],
        choice: Choice,
        *,
        model: str | None = None,
        max_new_tokens: int = 64,
        stop: Stop | None = None,
    ) -> Iterator[Text | Note | Done]:
        """Answer the last turn greedily, with the model of that name (None: the present one).

        A model that cannot be loaded leaves the present one in place.
        The first run of a choice follows an unmeasured one of two tokens, so that its times are not those of what is
        set up once. Leaving the iterator early stops the generation at its next token.

        Raises what loading, wrapping and generating raise, from the iterator.
        """

        def work(say: Callable[[Any], None], stop: Stop) -> None:
            name = self.name if model is None else model
            if self.model is None or name != self.name:
                say(Note(f"loading {name}"))
                self._load(name)
                stop.check()
            say(self._run(turns, choice, max_new_tokens, stop, say))

        try:
            yield from run_alone(work, stop=stop)
        except Stopped:
            yield Done("", Report(), stopped=True)

    def _run(
        self, turns: Sequence[Turn], choice: Choice, max_new_tokens: int, stop: Stop, say: Callable[[Any], None]
    ) -> Done:
        model, processor = self.model, self.processor
        try:
            choice.wrap(model)
            inputs = prepare_turns(processor, turns).to(model.device)
            for name in ("pixel_values", "pixel_values_videos"):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name].to(model.dtype)
            options: dict[str, Any] = {"do_sample": False, "stopping_criteria": [stop]}
            stop.check()
            if choice not in self._warm:
                say(Note("warm-up run, not measured"))
                model.generate(**inputs, **options, max_new_tokens=2)
                if len(self._warm) >= MOST_WARM:
                    self._warm.clear()
                self._warm.add(choice)
            peak = _Peak(model.device)
            streamer = _Streamer(processor.tokenizer, say)
            if choice.plain:
                with measure(model, dict(inputs)) as measured:
                    ids = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, streamer=streamer)
                found = measured.report
            else:
                ids = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, streamer=streamer)
                found = report(model)
            peak_bytes = peak.read()
            text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            maps = [] if choice.plain else _maps(model, found, inputs, processor)
            return Done(text, found, maps, stopped=stop.asked, peak_bytes=peak_bytes)
        finally:
            if is_wrapped(model):
                unwrap(model)


class _Peak:
    """The most memory of a CUDA device since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


class _Streamer:
    """Decodes all tokens so far at each new one (an answer is short), at most some times a second."""

    INTERVAL_SECONDS = 0.03

    def __init__(self, tokenizer: Any, say: Any) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] = []
        self._prompt_is_past = False
        self._last = 0.0

    def put(self, value: Tensor) -> None:
        if not self._prompt_is_past:  # generate hands over the prompt first
            self._prompt_is_past = True
            return
        self._ids += value.flatten().tolist()
        now = time.monotonic()
        if now - self._last >= self.INTERVAL_SECONDS:
            self._last = now
            self._tell()

    def end(self) -> None:
        self._tell()

    def _tell(self) -> None:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        self._say(Text(text.removesuffix("\N{REPLACEMENT CHARACTER}")))  # a character that is not whole yet


def user_turn(question: str, pictures: Sequence[Image.Image] = ()) -> Turn:
    """A turn of the user: pictures, then the question."""
    content: Content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def video_turn(question: str, frames: Sequence[Image.Image], metadata: Mapping[str, Any]) -> Turn:
    """A turn about the sampled frames of a video; ``metadata`` are fields of transformers' ``VideoMetadata``."""
    video = {"type": "video", "video": list(frames), "metadata": dict(metadata)}
    return {"role": "user", "content": [video, {"type": "text", "text": question}]}


def assistant_turn(text: str) -> Turn:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def prepare_turns(processor: Any, turns: Sequence[Turn]) -> Any:
    """The processor's inputs for a conversation, through its chat template."""
    if not turns or turns[-1]["role"] != "user":
        raise ConfigError("demo: a conversation must end with a question.")
    _check_texts(processor.tokenizer, turns)
    videos = [part for turn in turns for part in turn["content"] if part["type"] == "video"]
    options: dict[str, Any] = {}
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise UnsupportedModelError(
                "This model takes no videos: choose one that does, as tiny-qwen, at the top of the page."
            )
        # They are sampled already; the metadata says when each frame was.
        metadata = [part["metadata"] for part in videos]
        options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    return processor.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def _check_texts(tokenizer: Any, turns: Sequence[Turn]) -> None:
    """A text must not hold what the model reads as a picture, or as the end of a turn."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for turn in turns:
        for part in turn["content"]:
            for token in (*added, *tokenizer.all_special_tokens):
                if part["type"] == "text" and token in part["text"]:
                    raise DataError(f"{token!r} has a meaning of its own for this model: leave it out of the question.")


def _maps(model: Any, found: Report, inputs: Mapping[str, Any], processor: Any) -> list[TokenMap]:
    try:
        return token_maps(model, found, inputs, processor)
    except UnsupportedModelError:  # of this family the pixels cannot be recovered: there is nothing to draw on
        return []
