"""Several questions about one picture: the prompt up to the picture's end goes through the model once.

In a chat template the questions' prompts are the same until behind the picture. That part is prefilled once, by the
model's own ``generate``, wrapped or not; each question goes on from a copy of its cache. What was reduced is shared
too, so it must not depend on the question: methods that look at the question are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvcache import policies
from kvcache.request import DYNAMIC
from tokenpruning import Selector, methods
from vlmeff.asking import prepare
from vlmeff.config import Plan
from vlmeff.errors import (
    ConfigError,
    IncompatibleError,
    UnsupportedCacheError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmeff.reporting import Report, measure, placeholders, report
from vlmeff.vlm.settings import generation_setting
from vlmeff.vlm.wrapped import STATE
from vlmeff.wrapping import is_wrapped

TOKENWISE = ("attention_mask", "mm_token_type_ids", "token_type_ids")  # [1, L] inputs beside input_ids
NOT_SHARED = ("past_key_values", "inputs_embeds", "position_ids")
# Their prompt sees itself in both directions, so the picture's keys depend on the question behind it.
BIDIRECTIONAL = ("paligemma",)


@dataclass(frozen=True, kw_only=True)
class SharedReport:
    """What ``ask_many`` did.

    Measured: ``prefix_tokens`` that went through the language model once, pictures reduced already (of
    ``prefix_tokens_before``), in ``prefill_ms`` with the vision encoder; ``question_tokens`` of each question behind
    it, in ``question_ms`` to its first new token; ``total_ms`` of each answer; ``kv_bytes`` of the shared cache, of
    which one copy stands beside it at a time.
    """

    prefix_tokens: int
    prefix_tokens_before: int
    prefill_ms: float | None
    kv_bytes: int | None
    question_tokens: tuple[int, ...]
    question_ms: tuple[float | None, ...]
    total_ms: tuple[float | None, ...]

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that went through the language model for all questions together."""
        return self.prefix_tokens + sum(self.question_tokens)

    @property
    def prefilled_tokens_alone(self) -> int:
        """Counted: the same with every question asked alone, equally reduced."""
        return len(self.question_tokens) * self.prefix_tokens + sum(self.question_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **{name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()},
            "prefilled_tokens": self.prefilled_tokens,
            "prefilled_tokens_alone": self.prefilled_tokens_alone,
        }


class ManyAnswers(list[str]):
    """The answers in the order of the questions; ``report`` says what was shared."""

    def __init__(self, answers: Sequence[str], report: SharedReport) -> None:
        super().__init__(answers)
        self.report = report


def ask_many(
    model: Any, processor: Any, image: Image.Image, questions: Sequence[str], *, max_new_tokens: int = 64
) -> ManyAnswers:
    """Answer several questions about one picture greedily; the picture is encoded and prefilled once.

    Without KV retention the answers are those of asking each question alone; so they are with a preset, whose retention
    is left out where it looks at the question. A query-agnostic policy (streaming_llm,
    knorm, random) chooses among the tokens up to the picture's end, and the questions count as what follows the prompt
    (kept, unless the policy's decode rule says otherwise); asking alone it chooses among the question's tokens too.
    The processor, on the host, still prepares every prompt.

    Args:
        model: a vision-language model, wrapped or not.  processor: its processor.
    Returns:
        The answers, a list of str with ``report``. ``vlmeff.report`` of a wrapped model is of the last question.
    Raises:
        ConfigError: no question, or one string in the place of a list.
        UnsupportedModelError: the model takes no pictures, or its picture tokens see the question.
        IncompatibleError: the wrapped model's reduction depends on the question (kv=SnapKV, tokens=HiPrunePlus,
            AdaptInfer), or the chat template puts the question before the picture.
    """
    if isinstance(questions, str) or not len(questions):
        raise ConfigError(f"ask_many: questions={questions!r} must be a list of one or more questions.")
    if not hasattr(processor, "image_processor"):
        raise UnsupportedModelError(f"ask_many: {type(processor).__name__} takes no pictures.")
    _check_shareable(model)
    requests = []
    for question in questions:
        inputs = prepare(processor, image, question).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        requests.append(dict(inputs))
    new, shared = generate_shared(model, requests, max_new_tokens=max_new_tokens)
    return ManyAnswers([processor.decode(ids, skip_special_tokens=True).strip() for ids in new], shared)


@torch.no_grad()
def generate_shared(
    model: Any, requests: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 64
) -> tuple[list[Tensor], SharedReport]:
    """Greedy ``generate`` of several prompts of one row that begin alike and have the same pictures.

    Args:
        requests: what ``generate`` would be called with for each: ``input_ids`` [1, L], the tokenwise inputs of the
            processor, and the pictures, which may be left out of all but the first.
    Returns:
        ([n] int64 new tokens of each, on the model's device; what was shared).
    Raises:
        ConfigError, UnsupportedModelError, UnsupportedInputError, UnsupportedCacheError, IncompatibleError: before
        the model has run.
    """
    if not requests:
        raise ConfigError("generate_shared: requests is empty; pass one or more prompts.")
    _check_shareable(model)
    for request in requests:
        _check_request(request)
    first = requests[0]
    end = _shared_length(model, requests)
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    prefix = {name: x[:, :end] if name in ("input_ids", *TOKENWISE) else x for name, x in first.items()}
    prefix["attention_mask"] = torch.ones_like(prefix["input_ids"])
    if is_wrapped(model) and _is_query_aware(model.__dict__[STATE].plan):
        prefix["past_key_values"] = DynamicCache(config=model.config)  # a preset's retention is left out
    # One token is chosen and thrown away: the cache that comes back holds the prefix alone.
    out, filled = _measured(
        model, prefix, prefix["input_ids"], max_new_tokens=1, return_dict_in_generate=True, **options
    )
    cache = out.past_key_values
    answers, reports = [], []
    for request in requests:
        ids = request["input_ids"]
        turn = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": copy.deepcopy(cache),
        }
        sequences, about = _measured(
            model, turn, ids[:, end:], max_new_tokens=max_new_tokens, return_dict_in_generate=False, **options
        )
        answers.append(sequences[0, ids.shape[1] :])
        reports.append(about)
    return answers, SharedReport(
        prefix_tokens=filled.prompt_tokens_after,
        prefix_tokens_before=end,
        prefill_ms=filled.prefill_ms,
        kv_bytes=filled.kv_bytes,
        question_tokens=tuple(request["input_ids"].shape[1] - end for request in requests),
        question_ms=tuple(about.prefill_ms for about in reports),
        total_ms=tuple(about.total_ms for about in reports),
    )


def _measured(model: Any, inputs: dict[str, Any], new: Tensor, **options: Any) -> tuple[Any, Report]:
    """A ``generate`` call and its report; ``new`` [1, n] ids are those that the cache does not hold."""
    if is_wrapped(model):
        out = model.generate(**inputs, **options)
        return out, report(model)
    with measure(model, {"input_ids": new}) as measured:
        out = model.generate(**inputs, **options)
    return out, measured.report


def _check_shareable(model: Any) -> None:
    """Raise unless what the model keeps of a picture is the same for every question."""
    if getattr(model.config, "model_type", None) in BIDIRECTIONAL:
        raise UnsupportedModelError(
            f"ask_many: in {type(model).__name__} the picture's tokens see the question behind them, so questions "
            "cannot share them. Ask each question with generate."
        )
    implementation = generation_setting(model, {}, "cache_implementation")
    if implementation not in DYNAMIC:
        raise UnsupportedCacheError(
            f"ask_many: cache_implementation={implementation!r} has no room behind the picture to go on in; set "
            "model.generation_config.cache_implementation = None."
        )
    if is_wrapped(model):
        _check_plan(model.__dict__[STATE].plan)


def _is_query_aware(plan: Plan) -> bool:
    return plan.kv is not None and plan.kv.query_aware and plan.kv.keep_ratio < 1


def _check_plan(plan: Plan) -> None:
    if _is_query_aware(plan) and not plan.kv_optional:
        assert plan.kv is not None
        blind = [name for name in policies.names() if policies.get(name).query_aware is False]
        raise IncompatibleError(
            f"ask_many: kv={policies.name_of(plan.kv)!r} keeps what the question looks at, so its cache cannot serve "
            f"another question. Wrap with a policy that does not look at it ({', '.join(blind)}) or kv=False."
        )
    if plan.inner is not None:
        raise IncompatibleError(
            f"ask_many: tokens={methods.name_of(plan.inner)!r} drops what the question does not look at, so the "
            "questions cannot share the rest. Use a method before the language model, like HiPrune."
        )
    method = plan.reduction.method
    if isinstance(method, Selector) and "text" in method.needs:
        raise IncompatibleError(
            f"ask_many: tokens={methods.name_of(method)!r} scores the picture's tokens against the question, so the "
            "questions cannot share them. Use a method that does not look at it, like HiPrune."
        )


def _check_request(request: Mapping[str, Any]) -> None:
    given = next((name for name in NOT_SHARED if request.get(name) is not None), None)
    if given is not None:
        raise UnsupportedInputError(f"ask_many: {given} cannot be given; pass input_ids and the pictures.")
    ids, mask = request.get("input_ids"), request.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise UnsupportedInputError("ask_many: each request needs input_ids [1, L]; questions are not batched.")
    if mask is not None and not bool(mask.bool().all()):
        raise UnsupportedInputError("ask_many: attention_mask hides tokens; pass each prompt without padding.")


def _shared_length(model: Any, requests: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the prompts that are shared, after checking that they are the same in all.

    They end with the last picture. Not the longest prefix in common: what a policy keeps would then depend on how the
    questions begin.
    """
    ends = []
    for request in requests:
        visual = placeholders(model, request["input_ids"])[0].nonzero()
        if not len(visual):
            raise UnsupportedInputError("ask_many: a prompt has no picture; pass prompts with the picture's tokens.")
        ends.append(int(visual[-1]) + 1)
    first, end = requests[0], ends[0]
    same = len(set(ends)) == 1 and all(
        torch.equal(request["input_ids"][:, :end], first["input_ids"][:, :end]) for request in requests
    )
    if not same:
        raise IncompatibleError(
            "ask_many: the prompts are not the same up to the picture's end (does the chat template put the question "
            "before the picture?), so the picture cannot be shared. Ask each question with generate."
        )
    if any(request["input_ids"].shape[1] <= end for request in requests):
        raise UnsupportedInputError("ask_many: a prompt ends with the picture; a question must follow it.")
    for request in requests[1:]:
        for name in request.keys() - {"input_ids", *TOKENWISE}:
            if not _equal(request[name], first.get(name)):
                raise IncompatibleError(f"ask_many: {name} differs between the requests; all share one picture.")
    return end


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
