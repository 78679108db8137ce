"""One request of a language model with random weights, timed: prefill, decode, bytes held, peak memory.

Needs torch and transformers only, so that it also runs in an environment without vlmeff (``kv_kvpress.py``).
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from random_models import VICUNA_7B
from torch import Tensor

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
QWEN25_7B = {  # config.json of Qwen/Qwen2.5-VL-7B-Instruct
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
# name -> (family, text configuration). The language models only: what an encoder costs is in ``tokens.py``.
GEOMETRIES: dict[str, tuple[str, dict[str, int]]] = {
    "llama-small": ("llama", SMALL),
    "qwen2.5-vl-small": ("qwen2.5-vl", SMALL),
    "llava-1.5-7b": ("llama", VICUNA_7B),
    "qwen2.5-vl-7b": ("qwen2.5-vl", QWEN25_7B),
}
POSITIONS = 32768
INITIAL_STD = 0.02
SHARPNESS = (0.5, 4.0)  # standard deviation of the attention logits, first and last layer
FIRST_TOKEN = "first token is there"  # what marks it in the profiler's trace


def build(name: str, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """The model in evaluation mode, and its geometry in plain values. The weights are drawn on ``device``.

    Random attention is flat and alike in all layers. The queries are scaled so that it grows sharper from layer to
    layer: policies that give layers budgets of their own then have something to tell apart.
    """
    torch.manual_seed(seed)
    family, text = GEOMETRIES[name]
    shape = {**text, "max_position_embeddings": POSITIONS, "initializer_range": INITIAL_STD}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if family == "llama":
                model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
            else:
                model = transformers.Qwen2_5_VLForConditionalGeneration(_qwen_config(shape))
    finally:
        torch.set_default_dtype(before)
    model = model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    layers = getattr(model.model, "language_model", model.model).layers
    low, high = SHARPNESS
    with torch.no_grad():
        for i, layer in enumerate(layers):
            wanted = low * (high / low) ** (i / max(1, len(layers) - 1))
            layer.self_attn.q_proj.weight *= wanted / (INITIAL_STD**2 * text["hidden_size"])
    geometry = {
        "class": type(model).__name__,
        "language_model": text,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "sharpness": SHARPNESS,
    }
    return model, geometry


def _qwen_config(shape: dict[str, Any]) -> Any:
    head = shape["hidden_size"] // shape["num_attention_heads"]
    section = [head // 8, head * 3 // 16, head * 3 // 16]  # the real model's 16, 24, 24 of 128
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(
        vision_config={**tower, "out_hidden_size": shape["hidden_size"]},  # not used: the prompts are text
        text_config={**shape, "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}},
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )


def prompt(model: Any, length: int, batch: int, *, seed: int = 0) -> Tensor:
    """[batch, length] ids; every row another text, so that rows are evicted from differently."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(16, vocabulary, (batch, length), generator=generator).to(model.device)


def held_bytes(cache: Any) -> int:
    """Bytes of the storages behind a cache; a cache that counts for itself is asked."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass
class Request:
    """``prefill_ms``: to the first token. ``first_ms``, ``second_ms``: the ``steps`` tokens behind it, and as many
    again. ``bytes``: the cache held at the end of each part."""

    prefill_ms: float
    first_ms: float
    second_ms: float
    bytes: tuple[int, int, int]


class Clock(transformers.StoppingCriteria):
    """Never stops ``generate``; notes the time at the ends of its three parts and then calls ``at_end(part)``.

    The device is waited for at these three tokens only.
    """

    def __init__(self, steps: int, device: torch.device, at_end: Callable[[int], None]) -> None:
        self._ends = {1: 0, 1 + steps: 1, 1 + 2 * steps: 2}
        self._device, self._at_end = device, at_end
        self._tokens = 0
        self._since = now(device)
        self.parts: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._tokens += 1
        part = self._ends.get(self._tokens)
        if part is not None:
            self.parts.append(1000 * (now(self._device) - self._since))
            self._at_end(part)
            self._since = now(self._device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, once the device has caught up, of the clock that ``clock_name`` names."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock_name(device: torch.device) -> str:
    """With one thread on the CPU the seconds are the process' own: those that others take are not in them."""
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return "CPU seconds of the process, one thread" if one else "elapsed seconds"


class Stopwatch:
    """Adds up the time inside functions. On CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[Any, Any]] = []

    def _tick(self) -> Any:
        if self._device.type == "cpu":
            return now(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._tick()
            out = function(*args, **kwargs)
            self._spans.append((start, self._tick()))
            return out

        return timed

    def milliseconds(self) -> float:
        """So far. Call it when the device has caught up."""
        if self._device.type == "cpu":
            return 1000 * sum(end - start for start, end in self._spans)
        return sum(start.elapsed_time(end) for start, end in self._spans)


def request(model: Any, ids: Tensor, cache: Any, *, steps: int, at_end: Callable[[int], None] | None = None) -> Request:
    """``generate`` 1 + 2 ``steps`` tokens greedily in ``cache``."""
    held: list[int] = []

    def end(part: int) -> None:
        held.append(held_bytes(cache))
        if at_end is not None:
            at_end(part)

    clock = Clock(steps, ids.device, end)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=1 + 2 * steps,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    prefill, first, second = clock.parts
    return Request(prefill, first, second, (held[0], held[1], held[2]))


def peaks(run: Callable[[Callable[[int], None]], object], device: torch.device) -> tuple[int, int]:
    """Most bytes that torch held beyond what it held before: until the first token, and after it.

    ``run(at_end)`` is one request that calls ``at_end(0)`` at its first token. On the CPU from the allocations and
    releases that torch.profiler notes (see ``measuring.py``).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, until = torch.cuda.memory_allocated(device), []

        def mark_cuda(part: int) -> None:
            if part == 0:
                until.append(torch.cuda.max_memory_allocated(device))
                torch.cuda.reset_peak_memory_stats(device)

        run(mark_cuda)
        torch.cuda.synchronize(device)
        return until[0] - before, torch.cuda.max_memory_allocated(device) - before

    def mark(part: int) -> None:
        if part == 0:
            with torch.profiler.record_function(FIRST_TOKEN):
                pass

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(mark)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    at = next(e["ts"] for e in events if e.get("name") == FIRST_TOKEN)
    held, most = 0, {False: 0, True: 0}
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        behind = event["ts"] > at
        most[behind] = max(most[behind], held)  # of what the first token found, too
        held += event["args"]["Bytes"]
        most[behind] = max(most[behind], held)
    return most[False], most[True]


def rounds(names: Sequence[str], repeats: int) -> Iterator[str]:
    """Each name once a round; every round starts with another one."""
    for number in range(repeats):
        shift = number % len(names)
        yield from [*names[shift:], *names[:shift]]


class Forecast:
    """Seconds that a run of a cell will take, from the cells before it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, int], float] = {}

    def note(self, name: str, length: int, batch: int, seconds: float) -> None:
        self._seen[name, length, batch] = seconds

    def seconds(self, name: str, length: int, batch: int) -> float:
        """0 where nothing like it has run. Rows cost alike; attention costs the square of the length."""
        of_batch = [(b, t) for (n, s, b), t in self._seen.items() if (n, s) == (name, length) and b < batch]
        if of_batch:
            nearest, seconds = max(of_batch)
            return seconds * batch / nearest
        of_length = [(s, t) for (n, s, b), t in self._seen.items() if (n, b) == (name, batch) and s < length]
        if of_length:
            nearest, seconds = max(of_length)
            return seconds * (length / nearest) ** 1.8
        of_rows = [(s, t / b) for (n, s, b), t in self._seen.items() if n == name and s < length]
        if of_rows:
            nearest, seconds = max(of_rows)
            return seconds * batch * (length / nearest) ** 1.8
        return 0.0
