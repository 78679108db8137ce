"""lmms-eval's ``--model vlmeff``: a wrapped model in its chat and its simple mode.

Documents are answered one by one, in the order of the requests, so that every answer has its own time to the first
token. Pictures only; what fails raises (lmms-eval's own models give an empty answer instead).
"""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vlmeff.errors import ConfigError, MissingExtraError, UnsupportedInputError
from vlmeff.evaluation.measuring import Generated, generate_measured
from vlmeff.integrations.lmms_arguments import Generation, ModelArguments, cut, generation_of, model_arguments
from vlmeff.loading import load
from vlmeff.wrapping import is_wrapped, unwrap, wrap

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from loguru import logger
except ImportError as error:
    raise MissingExtraError(error.name or "lmms_eval", "lmms", "models of lmms-eval") from error

PLACEHOLDER = "<image>"
PADDING = "__padding_only__"  # lmms-eval's mark of a request that only makes ranks equally long
Message = dict[str, Any]


class _Vlmeff(lmms):  # type: ignore[misc]  # lmms-eval may be missing where types are checked
    """Both modes; they differ in how a request becomes messages.

    Args: see ``lmms_arguments.MODEL_ARGS``; lmms-eval adds batch size and device where they were given.
    Raises:
        UnknownNameError: E-LM-01, a key of ``--model_args`` is not known.  What ``load`` and ``wrap`` raise.
    """

    def __init__(
        self, batch_size: Any = None, max_batch_size: Any = None, device: str | None = None, **model_args: Any
    ) -> None:
        super().__init__()
        arguments = model_arguments(model_args)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(device)
        self.batch_size = 1
        if batch_size not in (None, 1, "1"):
            logger.warning(f"vlmeff answers one document at a time; --batch_size {batch_size} is taken as 1.")
        self._system_prompt = self._resolve_system_prompt(arguments.system_prompt or "")
        self._model, self.processor = _loaded(arguments, self.device)
        self._ignored: set[str] = set()
        self._warm = False

    def loglikelihood(self, requests: Any) -> Any:
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise NotImplementedError(
            f"vlmeff generates answers and has no loglikelihood; it cannot run {tasks}. Take the variant of the task "
            "whose output_type is generate_until."
        )

    def generate_until_multi_round(self, requests: Any) -> Any:
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise NotImplementedError(f"vlmeff answers in one round; it cannot run {tasks}.")

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request, in their order, and one line of what they cost.

        ``TokenCounts.input_tokens`` are the tokens that the language model reads, behind any pruning.
        """
        from tqdm import tqdm

        answers, costs = [], []
        for request in tqdm(requests, disable=self.rank > 0, desc="vlmeff", mininterval=1):
            messages, generation = self._request(request.args)
            if not self._warm:  # whatever is set up once is no document's time
                self._warm = bool(self._answer(messages, dataclasses.replace(generation, max_new_tokens=1)))
            text, found = self._answer(messages, generation)
            counts = TokenCounts(input_tokens=found.prefill_tokens, output_tokens=found.tokens.shape[1])
            answers.append(GenerationResult(cut(text, generation.until).strip(), counts))
            if not (request.metadata or {}).get(PADDING):
                costs.append(found)
        self._log(costs, requests)
        return answers

    @abstractmethod
    def _request(self, args: tuple[Any, ...]) -> tuple[list[Message], Generation]:
        """Messages and settings of one request; its form is that of the simple or the chat class."""

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _settings(self, gen_kwargs: Any) -> Generation:
        generation = generation_of(gen_kwargs)
        if generation.other:
            raise ConfigError(
                f"vlmeff answers greedily and this task asks for {generation.other}: sampled answers cannot be paired. "
                "Pass --gen_kwargs do_sample=False,temperature=0,num_beams=1."
            )
        new = set(generation.ignored) - self._ignored
        if new:
            self._ignored |= new
            logger.warning(f"vlmeff does not know these generation settings and leaves them out: {sorted(new)}")
        return generation

    @torch.no_grad()
    def _answer(self, messages: list[Message], generation: Generation) -> tuple[str, Generated]:
        messages = self._apply_system_prompt(messages, self._system_prompt)
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        moved = {name: _moved(value, self._model) for name, value in inputs.items()}
        found = generate_measured(self._model, moved, max_new_tokens=generation.max_new_tokens)
        return self.processor.decode(found.tokens[0], skip_special_tokens=True), found

    def _log(self, costs: Sequence[Generated], requests: Sequence[Any]) -> None:
        """lmms-eval's throughput summary. Nothing where a response cache may have served some of the answers."""
        if not costs:
            return
        if any(_uses_cache(request) for request in requests):
            logger.warning("vlmeff reports no times under --use_cache: they would be those of the cache's misses.")
            return
        seconds = sum(found.e2e_ms for found in costs) / 1000
        tokens = sum(found.tokens.shape[1] for found in costs)
        figures = {
            "ttft_ms": _mean(found.ttft_ms for found in costs),
            "visual_tokens_in": _mean(found.visual_tokens_in for found in costs),
            "visual_tokens_kept": _mean(found.visual_tokens_kept for found in costs),
            "visual_tokens_layer_mean": _mean(found.visual_tokens_layer_mean for found in costs),
            "prefill_tokens": _mean(found.prefill_tokens for found in costs),
            "kv_mib": _mean(_mib(found.kv_bytes_prefill) for found in costs),
            "kv_mib_end": _mean(_mib(found.kv_bytes_end) for found in costs),
        }
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                "total_requests": len(costs),
                **{name: value for name, value in figures.items() if value is not None},
            },
        )
        if self.world_size > 1 and self.rank == 0:
            logger.warning(f"lmms-eval's throughput summary is of rank 0 alone ({self.world_size} ranks answered).")


class VlmeffChat(_Vlmeff):
    """Chat mode: the task gives messages."""

    is_simple = False

    def _request(self, args: tuple[Any, ...]) -> tuple[list[Message], Generation]:
        _, doc_to_messages, gen_kwargs, doc_id, task, split = args
        messages = doc_to_messages(self._document(doc_id, task, split))
        return [
            {"role": message["role"], "content": [_part(part) for part in _parts(message["content"])]}
            for message in messages
        ], self._settings(gen_kwargs)


class VlmeffSimple(_Vlmeff):
    """Simple mode (``--force_simple``): the task gives a text and pictures, which stand in front of it or at its
    ``<image>`` marks."""

    is_simple = True

    def _request(self, args: tuple[Any, ...]) -> tuple[list[Message], Generation]:
        context, gen_kwargs, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self._document(doc_id, task, split)) or []
        pictures = [_picture(visual) for visual in visuals]
        texts = context.split(PLACEHOLDER)
        content: list[dict[str, Any]] = []
        if len(texts) == 1:
            content = [*pictures, {"type": "text", "text": context}]
        elif len(texts) == len(pictures) + 1:
            for picture, text in zip([None, *pictures], texts, strict=True):
                content += [picture] if picture else []
                content += [{"type": "text", "text": text}] if text else []
        else:
            raise UnsupportedInputError(
                f"task {task!r}: document {doc_id!r} has {len(pictures)} pictures and {len(texts) - 1} marks "
                f"{PLACEHOLDER}. Leave --force_simple out."
            )
        return [{"role": "user", "content": content}], self._settings(gen_kwargs)


def _loaded(arguments: ModelArguments, device: torch.device) -> tuple[Any, Any]:
    attention = arguments.attn_implementation
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    model, processor = load(
        arguments.pretrained,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=device,
        **options,
    )
    # A zoo entry ("tiny-llava/fast") comes wrapped already; any preset replaces what it came with.
    preset = arguments.preset
    if preset == "none" and is_wrapped(model):
        unwrap(model)
    if arguments.preset_args or preset not in (None, "none"):
        wrap(model, None if preset == "none" else preset, **arguments.preset_args)
    _limit_pixels(processor, arguments.min_pixels, arguments.max_pixels)
    return model, processor


def _limit_pixels(processor: Any, low: int | None, high: int | None) -> None:
    if low is None and high is None:
        return
    images: Any = getattr(processor, "image_processor", None)
    size = dict(getattr(images, "size", None) or {})
    # Processors of a fixed number of tokens have a shortest edge in pixels of length and no longest one.
    if not {"shortest_edge", "longest_edge"} <= size.keys() or not hasattr(images, "merge_size"):
        raise ConfigError(
            f"min_pixels and max_pixels are for models whose tokens follow the picture's size; {type(images).__name__} "
            "is not of that kind. Leave them out."
        )
    size |= {"shortest_edge": low} if low is not None else {}
    size |= {"longest_edge": high} if high is not None else {}
    if size["shortest_edge"] > size["longest_edge"]:
        raise ConfigError(f"min_pixels={size['shortest_edge']} exceeds max_pixels={size['longest_edge']}.")
    images.size = type(images.size)(**size)


def _device(name: str | None) -> torch.device:
    """The device asked for; of several processes each takes its own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _parts(content: Any) -> Iterable[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return _picture(part["url"])
    raise UnsupportedInputError(f"vlmeff under lmms-eval answers about pictures; this task has {part['type']} input.")


def _picture(visual: Any) -> dict[str, Any]:
    if not hasattr(visual, "convert"):
        raise UnsupportedInputError(
            f"vlmeff under lmms-eval answers about pictures; this task hands over {type(visual).__name__}."
        )
    return {"type": "image", "image": visual.convert("RGB")}


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _uses_cache(request: Any) -> bool:
    """Whether lmms-eval runs with a response cache; the methods of a task lead to its command-line arguments."""
    tasks = (getattr(argument, "__self__", None) for argument in request.args)
    return any(getattr(getattr(task, "args", None), "use_cache", None) is not None for task in tasks)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
