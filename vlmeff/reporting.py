"""The measured report of a call. Every figure says how it was got: measured, counted or reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kvcache import cache_bytes, full_cache_bytes
from kvcache.report import RetentionReport
from tokenpruning.plan import PrunePlan
from vlmeff.errors import ConfigError
from vlmeff.speculative.text_report import TextStatistics
from vlmeff.vlm.cost import prefill_flops
from vlmeff.vlm.inner import InnerRecord


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one call did.

    Measured: tokens (of all rows together), storage bytes of the key/value cache at the end of the call, and
    milliseconds; ``prefill_ms`` runs from the call to the first logits and includes the vision encoder and the token
    selection. Counted: ``prefill_gflops`` of the language model, from the measured token counts. Reference:
    ``kv_bytes_full``, what the same cache would hold for the unshortened prompt. ``skipped``: the request has fewer
    visual tokens than the preset's ``min_visual_tokens``, so nothing was reduced. ``visual_tokens_processed``: where
    tokens are dropped between layers, how many were processed, averaged over the layers (``inner`` says which stayed);
    ``retention`` says what each layer of the cache kept of the prompt that came to it, ``kv_storage`` how that is
    stored (None: as the model computes); ``kv_bytes`` of ``kv_bytes_full`` is the effect of all of it together;
    ``visual_tokens_label`` counts a layer behind which tokens are dropped as if it had lost them already, as the labels
    of AdaptInfer's paper do. ``speculation``: what text speculation drafted and saved, None without it.
    """

    method: str = "none"
    preset: str | None = None
    rows: int = 1
    visual_tokens_before: int = 0
    visual_tokens_after: int = 0
    prompt_tokens_before: int = 0
    prompt_tokens_after: int = 0
    new_tokens: int | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    kv_storage: str | None = None
    prefill_gflops_before: float | None = None
    prefill_gflops_after: float | None = None
    encode_ms: float | None = None
    prefill_ms: float | None = None
    total_ms: float | None = None
    visual_tokens_processed: float | None = None
    visual_tokens_label: float | None = None
    skipped: bool = False
    inner: InnerRecord | None = field(default=None, repr=False, compare=False)
    retention: RetentionReport | None = field(default=None, repr=False, compare=False)
    speculation: TextStatistics | None = field(default=None, repr=False, compare=False)
    plan: PrunePlan | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values (without ``plan`` and ``inner``).

        "retention": None, or ``keep_ratio``, the ``layers`` retained, ``kept`` and ``prompt_tokens`` of each (a list
        with one number per row), ``bytes``, ``full_bytes``, ``storage``. "speculation": None, or the fields of
        ``TextStatistics`` with ``tokens_per_pass`` and ``accept_rate``.
        """
        nested = ("plan", "inner", "retention", "speculation")
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in nested}
        return out | {
            "retention": None if self.retention is None else self._retention(self.retention),
            "speculation": None if self.speculation is None else self.speculation.to_dict(),
        }

    def _retention(self, retention: RetentionReport) -> dict[str, Any]:
        return {
            "keep_ratio": retention.keep_ratio,
            "layers": [layer.layer for layer in retention.layers],
            "kept": [list(layer.kept) for layer in retention.layers],
            "prompt_tokens": [list(layer.prompt_tokens) for layer in retention.layers],
            "bytes": retention.bytes,
            "full_bytes": retention.full_bytes,
            "storage": self.kv_storage,
        }

    def rows_of_text(self) -> list[tuple[str, str, str]]:
        """(what, value, how it was got), for tables."""

        def pair(before: object, after: object) -> str:
            return f"{after}" if before == after else f"{before} -> {after}"

        out = [
            ("method", self.method + (", skipped: few visual tokens" if self.skipped else ""), ""),
            ("visual tokens", pair(self.visual_tokens_before, self.visual_tokens_after), "measured"),
            *(
                [
                    ("visual tokens, mean over layers", f"{self.visual_tokens_processed:.1f}", "measured"),
                    ("as the paper labels it", f"{self.visual_tokens_label:.1f}", "counted"),
                ]
                if self.visual_tokens_processed is not None
                else []
            ),
            ("prompt tokens", pair(self.prompt_tokens_before, self.prompt_tokens_after), "measured"),
        ]
        if self.new_tokens is not None:
            out.append(("new tokens", str(self.new_tokens), "measured"))
        if self.speculation is not None:
            out += self.speculation.rows_of_text()
        if self.retention is not None and self.retention.keep_ratio is not None:
            out.append(("KV entries of the prompt kept", shares_kept(self.retention), "measured"))
        if self.kv_storage is not None:
            out.append(("KV storage", self.kv_storage, ""))
        if self.kv_bytes is not None:
            out.append(("KV cache", format_bytes(self.kv_bytes), "measured"))
        if self.kv_bytes_full is not None and self.kv_bytes_full != self.kv_bytes:
            full = format_bytes(self.kv_bytes_full)
            if self.kv_bytes is not None and self.kv_bytes_full:
                full += f", of which {self.kv_bytes / self.kv_bytes_full:.1%} is held"
            # Nothing dropped, nothing evicted, nothing quantized: the combined effect.
            out.append(("KV cache, unshortened prompt", full, "reference"))
        if self.prefill_gflops_before is not None and self.prefill_gflops_after is not None:
            flops = pair(f"{self.prefill_gflops_before:.3g}", f"{self.prefill_gflops_after:.3g}")
            out.append(("LLM prefill GFLOP", flops, "counted"))
        for name, value in (("encode", self.encode_ms), ("prefill", self.prefill_ms), ("total", self.total_ms)):
            if value is not None:
                out.append((f"{name} ms", f"{value:.1f}", "measured"))
        return out

    def __str__(self) -> str:
        rows = self.rows_of_text()
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}  {f'({how})' if how else ''}".rstrip() for name, value, how in rows)


def shares_kept(retention: RetentionReport) -> str:
    """The share of the prompt's entries that stayed, and the least and the most that a layer kept (of all rows)."""
    shares = [sum(layer.kept) / max(1, sum(layer.prompt_tokens)) for layer in retention.layers]
    layers = f"{min(shares):.1%} to {max(shares):.1%}"
    return f"{retention.keep_ratio:.1%}, {layers} in a layer"


def format_bytes(n: int) -> str:
    """Binary units, three digits: 1536 -> '1.5 KiB'."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError


class Clock:
    """Marks in device time on CUDA, in wall time elsewhere. Reading it waits for the device; marking does not."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks[name] = event
        else:
            self.marks[name] = time.perf_counter()

    def between(self, start: str, end: str) -> float | None:
        """Milliseconds between two marks, None when one was not set."""
        if start not in self.marks or end not in self.marks:
            return None
        a, b = self.marks[start], self.marks[end]
        if self.cuda:
            b.synchronize()
            return a.elapsed_time(b)
        return 1000 * (b - a)


shared_clock: ContextVar[Clock | None] = ContextVar("shared_clock", default=None)
"""Set by who times parts of a call itself: times from two clocks, started one after the other, cannot be subtracted."""


class Meter:
    """Follows one ``generate`` or ``forward`` call of a model."""

    def __init__(self, device: torch.device) -> None:
        shared = shared_clock.get()  # of the first call alone: within it an assistant may be followed by a meter too
        self.clock = shared if shared is not None and "start" not in shared.marks else Clock(device)
        self.clock.mark("start")
        self.remaining = 0  # prompt columns that have not gone through the model yet
        self.steps = 0  # passes that gave logits for a new token
        self.kv_bytes: int | None = None
        self.kv_bytes_full: int | None = None
        self.kv_storage: str | None = None
        self.cache: Any = None
        self.cache_length = 0

    def expect(self, prompt_width: int) -> None:
        """Tell how many prompt columns will be processed before the first token can be chosen."""
        self.remaining = prompt_width

    def after_forward(self, tokens: int, output: Any) -> None:
        """Call after each forward pass of ``tokens`` columns; chunked prefill makes several before the first token."""
        self.remaining -= tokens
        if self.remaining <= 0:
            self.steps += 1
            if self.steps == 1:
                self.clock.mark("prefill")
        self.cache = getattr(output, "past_key_values", None)

    def finish(self) -> None:
        self.clock.mark("end")
        if self.cache is not None:
            self.kv_bytes, self.kv_bytes_full = cache_bytes(self.cache), full_cache_bytes(self.cache)
            self.kv_storage = getattr(self.cache, "storage", None)  # of a RetainedCache
            self.cache_length = int(self.cache.get_seq_length())
        self.cache = None  # a report must not keep the cache alive

    def figures(self) -> dict[str, Any]:
        return {
            "kv_bytes": self.kv_bytes,
            "kv_storage": self.kv_storage,
            "encode_ms": self.clock.between("start", "encoded"),
            "prefill_ms": self.clock.between("start", "prefill"),
            "total_ms": self.clock.between("start", "end"),
        }


class Measured:
    """Filled by ``measure``; ``report`` is there once its block is left."""

    report: Report


@contextmanager
def measure(model: Any, inputs: dict[str, Any], *, name: str = "unwrapped") -> Iterator[Measured]:
    """Measure one ``generate`` call of an unwrapped model the way a wrapped one measures itself.

    Args:
        model: a transformers model.  inputs: what generate is called with; needs ``input_ids`` [B, L].
    """
    input_ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    prompt = int(mask.sum()) if mask is not None else input_ids.numel()
    visual = visual_tokens(model, input_ids)
    meter = Meter(input_ids.device)
    meter.expect(input_ids.shape[1])

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        meter.after_forward(columns(args, kwargs), output)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    result = Measured()
    try:
        yield result
    finally:
        handle.remove()
    meter.finish()
    flops = text_flops(model, input_ids, prompt)
    result.report = Report(
        method=name,
        rows=len(input_ids),
        visual_tokens_before=visual,
        visual_tokens_after=visual,
        prompt_tokens_before=prompt,
        prompt_tokens_after=prompt,
        new_tokens=meter.steps,
        kv_bytes_full=meter.kv_bytes,
        prefill_gflops_before=flops,
        prefill_gflops_after=flops,
        **meter.figures(),
    )


def columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Token columns that a forward pass processes."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    return 0 if ids is None else ids.shape[1]


def placeholders(model: Any, input_ids: Tensor) -> Tensor:
    """[B, L] bool: picture and video placeholders."""
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in ids:
        if token_id is not None:
            found |= input_ids == token_id
    return found


def visual_tokens(model: Any, input_ids: Tensor) -> int:
    """Picture and video placeholders in [B, L] ids."""
    return int(placeholders(model, input_ids).sum())


def text_flops(model: Any, input_ids: Tensor, prompt_tokens: int, inner: InnerRecord | None = None) -> float | None:
    """Counted GFLOP of the language model's prefill, rows taken as equally long; None for an unknown config.

    ``inner``: what was dropped between its layers.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "intermediate_size") or not hasattr(config, "num_attention_heads"):
        return None
    rows = max(1, len(input_ids))
    tokens = round(prompt_tokens / rows)
    if inner is None:
        return rows * prefill_flops(config, tokens) / 1e9
    full = inner.processed[0][1]
    return rows * prefill_flops(config, [tokens - full + visual for _, visual in inner.processed]) / 1e9


def report(model: Any) -> Any:
    """What the last call of a wrapped model did.

    Returns:
        ``Report`` of a vision-language model; of a video model
        ``vlmeff.diffusion.report.DiffusionReport``, which is there before the first call too.

    Raises:
        ConfigError: the model is not wrapped, or has not been called since.
    """
    state = model.__dict__.get("_vlmeff")
    if state is None:
        raise ConfigError("report: the model is not wrapped. Call model = vlmeff.wrap(model) first.")
    if state.report is None:
        raise ConfigError("report: the wrapped model has not been called yet. Call model.generate(...) first.")
    return state.report
