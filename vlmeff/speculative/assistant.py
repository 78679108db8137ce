"""Draft with a smaller model of the same tokenizer: one that sees the pictures, or a language model that does not.

Source: "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192; drafting with reduced pictures as
in SpecVLM, arXiv 2508.16201 (here: hand over an assistant that is wrapped with a token method). transformers' own
assisted decoding runs its assistant without the pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import logits_process

from vlmeff.errors import ConfigError, UnsupportedInputError
from vlmeff.speculative.drafting import Request, forbidden_ids
from vlmeff.speculative.tree import Draft
from vlmeff.vlm.families import is_vlm

NOT_HANDED_ON = {
    "past_key_values",
    "inputs_embeds",
    "position_ids",
    "labels",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
# Processors without a memory of their own: drafts may go through them before the model's own tokens do.
STATELESS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
    )
)


@dataclass(frozen=True, eq=False)
class Assistant:
    """Let ``model`` write a few tokens ahead.

    Args:
        model: of the same tokenizer. One that takes pictures gets the call's own, unreduced, through its own encoder
            and with its own cache; if its processor is another, pass ``assistant_inputs={...}`` to ``generate``. It may
            be wrapped. A language model gets the text without the placeholders.
        depth: tokens of a draft at most.
        confidence: a draft ends where the assistant's likeliest token is less likely than this.
    Raises:
        ConfigError: not a model, depth < 1, or confidence outside [0, 1].
    """

    model: Any
    depth: int = 4
    confidence: float = 0.4
    name = "assistant"
    rests = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) or not hasattr(self.model, "config"):
            raise ConfigError(f"Assistant: model={self.model!r} must be a transformers model.")
        if type(self.depth) is not int or self.depth < 1:
            raise ConfigError(f"Assistant: depth={self.depth!r} must be an int >= 1.")
        if not 0 <= self.confidence <= 1:
            raise ConfigError(f"Assistant: confidence={self.confidence!r} must be a probability.")

    def start(self, request: Request) -> AssistantSession:
        return AssistantSession(self, request)


class AssistantSession:
    """The assistant's cache holds its own prompt and the generated tokens ``_fed`` to it, right or wrong."""

    def __init__(self, settings: Assistant, request: Request) -> None:
        self._settings, self._request, self._model = settings, request, settings.model
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._prompt = _own_prompt(self._model, request)
        self._cache: Any = None
        self._fed: list[int] = []

    @torch.no_grad()
    def propose(self, ids: Sequence[int], depth: int, *, early: bool) -> Draft:
        said = list(ids[len(self._request.prompt) :])
        if early or not said or max(said) >= self._vocabulary:
            return Draft()
        if self._cache is None:
            self._read_prompt()
        common = 0
        while common < min(len(self._fed), len(said) - 1) and self._fed[common] == said[common]:
            common += 1
        self._cache.crop(common - len(self._fed))
        self._fed[common:] = []
        feed = said[common:]
        tokens: list[int] = []
        rows: list[Tensor] = []
        while len(tokens) < depth:
            logits = self._step(feed)
            probs = self._distribution([*ids, *tokens], logits)
            if float(probs.max()) < self._settings.confidence:
                break
            token = int(torch.multinomial(probs, 1) if self._request.do_sample else probs.argmax())
            tokens.append(token)
            rows.append(probs)
            if token in self._request.last or token >= self._vocabulary:
                break
            feed = [token]
        return Draft.chain(tokens, torch.stack(rows) if rows and self._request.do_sample else None)

    def observe(self, tokens: Sequence[int], logits: Tensor) -> None:
        """The assistant learns nothing from the model but what was emitted."""

    def _read_prompt(self) -> None:
        core = getattr(self._model, "model", None)
        if getattr(core, "rope_deltas", None) is not None:  # of an earlier conversation; text alone does not renew them
            core.rope_deltas = None  # type: ignore[union-attr]
        try:
            output = self._model(**self._prompt, use_cache=True)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"text_speculation: the assistant ({type(self._model).__name__}) cannot read this call's inputs: "
                f"{error} If its processor is another than the model's, pass generate(assistant_inputs=its inputs)."
            ) from error
        self._cache = output.past_key_values
        if not hasattr(self._cache, "crop") or not getattr(self._cache, "is_croppable", True):
            raise ConfigError(
                f"text_speculation: the assistant's cache ({type(self._cache).__name__}) cannot take tokens back; use "
                "another assistant."
            )
        self._cache.activate_past_recording()

    def _step(self, tokens: list[int]) -> Tensor:
        """[V of the assistant] float logits behind ``tokens``."""
        device = self._prompt["input_ids"].device
        output = self._model(
            input_ids=torch.tensor([tokens], device=device), past_key_values=self._cache, use_cache=True
        )
        self._fed += tokens
        return output.logits[0, -1].float()

    def _distribution(self, ids: list[int], logits: Tensor) -> Tensor:
        """[V] of the model: processed as the model's own, without what a draft may not hold."""
        out = logits.new_full((self._request.vocabulary,), -torch.inf)
        shared = min(len(out), len(logits))
        out[:shared] = logits[:shared]
        banned = [token for token in self._request.forbidden if token < len(out)]
        out[banned] = -torch.inf
        prefix, scores = torch.tensor([ids], device=out.device), out[None]
        for processor in self._request.processors:
            if isinstance(processor, STATELESS):
                scores = processor(prefix, scores)
        if not bool(scores.isfinite().any()):  # the processors left only what is banned
            scores = out[None]
        return scores[0].softmax(-1)


def _own_prompt(model: Any, request: Request) -> dict[str, Any]:
    """The assistant's arguments: without padding, on its device, in its dtype; pictures only if it takes them.

    Raises:
        UnsupportedInputError: no input_ids.  ConfigError: pictures meant for another kind of model.
    """
    given: Mapping[str, Any] = request.assistant_inputs or request.inputs
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.numel() == 0:
        raise UnsupportedInputError(
            "text_speculation: an assistant needs the prompt as input_ids (or assistant_inputs={'input_ids': ...})."
        )
    mask = given.get("attention_mask")
    keep = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].to(ids.device).bool()
    if not is_vlm(model):
        vocabulary = int(model.config.get_text_config().vocab_size)
        text = [t for t in ids[0, keep].tolist() if t not in request.forbidden and t < vocabulary]
        return {"input_ids": torch.tensor([text or ids[0, -1:].tolist()], device=model.device)}
    kinds = model.config.model_type, request.model.config.model_type
    names = inspect.signature(model.forward).parameters.keys() - NOT_HANDED_ON
    inputs = {name: value for name, value in given.items() if name in names and value is not None}
    pictures = [name for name in inputs if name.startswith(("pixel", "image"))]
    if request.assistant_inputs is None and kinds[0] != kinds[1] and pictures:
        raise ConfigError(
            f"text_speculation: the assistant is a {kinds[0]!r} and cannot read the {pictures[0]} of a {kinds[1]!r}: "
            "pass generate(..., assistant_inputs=the inputs of the assistant's own processor)."
        )
    inputs.pop("attention_mask", None)
    width = ids.shape[1]
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.ndim == 2 and value.shape == (1, width):
                value = value[:, keep.to(value.device)]
            value = value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        out[name] = value
    return out


def check_assistant(model: Any, assistant: Any) -> None:
    """Raise ``ConfigError`` for an assistant that cannot draft for ``model``."""
    if assistant is model:
        raise ConfigError("text_speculation: a model cannot assist itself; pass a smaller one of the same tokenizer.")
    if getattr(assistant.config, "is_encoder_decoder", False):
        raise ConfigError(f"text_speculation: {type(assistant).__name__} is an encoder-decoder and cannot draft.")
    theirs, ours = (forbidden_ids(m, None, ()) for m in (assistant, model))
    if is_vlm(assistant) and is_vlm(model) and theirs and ours and not theirs & ours:
        raise ConfigError(
            f"text_speculation: assistant and model share none of the ids that stand for pictures ({sorted(theirs)} "
            f"and {sorted(ours)}): they have different tokenizers."
        )
