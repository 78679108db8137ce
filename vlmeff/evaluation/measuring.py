"""One ``generate`` call, measured alike whether the model is wrapped or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvcache import cache_bytes
from vlmeff.evaluation.stages import StageClock
from vlmeff.reporting import Report, report, text_flops, visual_tokens
from vlmeff.wrapping import is_wrapped

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, eq=False)
class Generated:
    """``tokens`` [B, n] int64: what is new. Times in milliseconds; ``ttft_ms``: until the first new token is on the
    host.

    ``kv_bytes_prefill``: of the cache behind the pass that ends the prompt, ``kv_bytes_end``: at the end.
    ``peak_bytes``: on CUDA the allocator's maximum, on the CPU the resident set's (None where psutil is missing).
    """

    tokens: Tensor
    visual_tokens_in: int
    visual_tokens_kept: int
    visual_tokens_layer_mean: float | None
    prompt_tokens: int
    prefill_tokens: int
    prefill_gflops: float | None
    ttft_ms: float | None
    e2e_ms: float
    kv_bytes_prefill: int | None
    kv_bytes_end: int | None
    peak_bytes: int | None
    report: Report | None
    vision_ms: float | None = None
    score_ms: float | None = None


def greedy(model: Any, max_new_tokens: int, *, fixed_output: bool = False) -> dict[str, Any]:
    """Arguments of ``generate``. ``fixed_output``: no token ends the answer, so that all answers are equally long.

    What comes before the first token that would have ended it is then the answer as it would have been.
    """
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    options |= {"temperature": None, "top_p": None, "top_k": None, "return_dict_in_generate": False}
    if fixed_output:  # None would be filled in again from the model's own settings
        options["eos_token_id"] = model.config.get_text_config().vocab_size
    return options


@torch.no_grad()
def generate_measured(
    model: Any, inputs: Mapping[str, Any], *, max_new_tokens: int, timed: bool = True, fixed_output: bool = False
) -> Generated:
    """Greedy ``generate`` and what it cost.

    Args:
        inputs: the processor's; ``input_ids`` [B, L].
        timed: with a streamer for the first token and the stages in front of it (B = 1 only), and the peak of memory.
        fixed_output: generate exactly ``max_new_tokens``, whatever ends the answer.
    """
    ids: Tensor = inputs["input_ids"]
    meter = _Meter()
    alone = timed and len(ids) == 1
    # On MPS tokens are streamed one step late.
    first = FirstToken() if alone and ids.device.type != "mps" else None
    stages = StageClock(model, ids.device) if alone else None
    options = greedy(model, max_new_tokens, fixed_output=fixed_output)
    handle = model.register_forward_hook(meter.after_forward)
    peak = PeakMemory(ids.device) if timed else None
    try:
        with peak or nullcontext():
            _synchronize(ids.device)
            with stages or nullcontext():
                start = time.perf_counter()
                out: Tensor = model.generate(**inputs, **options, streamer=first)
                _synchronize(ids.device)
                end = time.perf_counter()
    finally:
        handle.remove()
    about = report(model) if is_wrapped(model) else None
    mask = inputs.get("attention_mask")
    prompt = ids.numel() if mask is None else int(mask.sum())
    visual = visual_tokens(model, ids)
    vision_ms, score_ms = (None, None) if stages is None else stages.times(about)
    return Generated(
        tokens=out[:, ids.shape[1] :],
        visual_tokens_in=visual,
        visual_tokens_kept=visual if about is None else about.visual_tokens_after,
        visual_tokens_layer_mean=None if about is None else about.visual_tokens_processed,
        prompt_tokens=prompt,
        prefill_tokens=prompt if about is None else about.prompt_tokens_after,
        prefill_gflops=text_flops(model, ids, prompt) if about is None else about.prefill_gflops_after,
        ttft_ms=None if first is None or first.at is None else 1000 * (first.at - start),
        e2e_ms=1000 * (end - start),
        kv_bytes_prefill=meter.at_prefill,
        kv_bytes_end=meter.at_end,
        peak_bytes=None if peak is None else peak.bytes,
        report=about,
        vision_ms=vision_ms,
        score_ms=score_ms,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class FirstToken(BaseStreamer):
    """When the first new token is on the host: the second ``put``, the first being the prompt."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._puts = 0

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


@dataclass(eq=False)
class _Meter:
    """Bytes of the cache behind the prompt, which comes in one pass, and at the end."""

    at_prefill: int | None = None
    at_end: int | None = None

    def after_forward(self, module: Any, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.at_end = cache_bytes(cache)
            if self.at_prefill is None:
                self.at_prefill = self.at_end


class PeakMemory:
    """The most memory that a block used. ``bytes``: None where it cannot be known.

    On the CPU the resident set is sampled, for the maximum over the life of a process never falls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            with suppress(ImportError):
                import psutil

                process = psutil.Process()
                self.bytes = process.memory_info().rss
                self._thread = threading.Thread(target=self._watch, args=(process,), daemon=True)
                self._thread.start()
        return self

    def _watch(self, process: Any) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes or 0, process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
