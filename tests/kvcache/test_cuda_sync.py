"""Decode steps of a retained cache do not wait for the device.

With CUDA, its own debug mode tells. Everywhere else, fake tensors do: they have no numbers, so whatever reads one on
the host is an error, and so is here a copy to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from retaining import TopScores, text_model_of
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from kvcache import PrefixKV, SnapKV, VLCache
from kvcache.cache import RetainedCache
from kvcache.request import retained_call

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its debug mode is the test")
STEPS = 5
POLICIES: dict[str, Any] = {
    "prefixkv": PrefixKV(keep_ratio=0.4, sink=1, recent=1),
    "snapkv": SnapKV(keep_ratio=0.4, window=4),
    "vl_cache": VLCache(keep_ratio=0.4),
    "fixed_point": TopScores(keep_ratio=0.4, decode="fixed_point", evict_interval=2),
    "window": TopScores(keep_ratio=0.4, decode="window", decode_window=2, evict_interval=1),
    "keep all": PrefixKV(keep_ratio=1.0),
}
CALLS = [([150], None, "sdpa"), ([150, 131], None, "eager"), ([390, 360], "int4", "sdpa")]
CASES = [(policy, *call) for policy in POLICIES for call in CALLS]
every_case = pytest.mark.parametrize(("policy", "lengths", "storage", "attention"), CASES, ids=str)
Guard = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def steps(model: Any, cache: RetainedCache, inputs: dict[str, torch.Tensor], place: Any, guard: Guard) -> None:
    """A prompt, then the steps of ``generate``, each in a ``guard``. ``place`` puts a tensor where the steps run.

    Waiting of the library itself (it looks at the mask when it makes its own) and of the first pass is not tested.
    """
    text, mask = text_model_of(model), inputs["attention_mask"]
    rows, lengths = len(mask), mask.sum(1, keepdim=True)
    kwargs = {**inputs, "past_key_values": cache}
    call = retained_call(model, text, None, kwargs, generating=True)
    assert call is not None
    with call:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        assert cache.layer(0).compacted
        held = [cache.layer(p).physical_length for p in range(len(cache.retained))]
        assert cache.keeps_all or max(held) < mask.shape[1]
        place(model, cache)
        for step in range(STEPS):
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            arguments = {
                "input_ids": torch.full((rows, 1), 11, device=mask.device),
                "attention_mask": library_masks(model, mask, cache, lengths + step),
                "position_ids": lengths + step,
            }
            placed = {name: on_every_tensor(place, x) for name, x in arguments.items()}
            with guard():
                out = text(**placed, past_key_values=cache, use_cache=True)
            assert out.last_hidden_state.shape[:2] == (rows, 1)
        assert cache.get_seq_length() == mask.shape[1]


def on_every_tensor(change: Any, x: Any) -> Any:
    if isinstance(x, dict):
        return {name: on_every_tensor(change, part) for name, part in x.items()}
    return change(x) if isinstance(x, torch.Tensor) else x


def library_masks(model: Any, mask: torch.Tensor, cache: RetainedCache, places: torch.Tensor) -> Any:
    config = model.config.get_text_config()
    about: dict[str, Any] = {
        "config": config,
        "inputs_embeds": torch.zeros(len(mask), 1, config.hidden_size, device=mask.device),
        "attention_mask": mask,
        "past_key_values": cache,
        "position_ids": places,
    }
    full = create_causal_mask(**about)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return full
    return {"full_attention": full, "sliding_attention": create_sliding_window_causal_mask(**about)}


# With CUDA


@contextmanager
def cuda_guard() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stay(x: Any, cache: Any = None) -> Any:
    return x


@needs_cuda
def test_cuda_notices_a_wait() -> None:
    x = torch.ones(3, device="cuda")
    with cuda_guard(), pytest.raises(RuntimeError, match="synchroniz"):
        bool(x.all())


@needs_cuda
@every_case
def test_decode_steps_do_not_wait_for_cuda(
    policy: str, lengths: list[int], storage: str | None, attention: str
) -> None:
    model = tiny_llama(attention=attention).cuda()
    inputs = {name: x.cuda() for name, x in llama_inputs(lengths).items()}
    steps(model, RetainedCache(model.config, POLICIES[policy], storage=storage), inputs, stay, cuda_guard)


@needs_cuda
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_decode_steps_behind_pictures_do_not_wait_for_cuda(name: str) -> None:
    model = tiny(name).cuda()
    inputs = {key: x.cuda() for key, x in prompts(model, [1, 2]).items()}
    steps(model, RetainedCache(model.config, POLICIES["prefixkv"]), inputs, stay, cuda_guard)


# Without


class CopyToHost(Exception):
    pass


class NoCopies(TorchDispatchMode):
    """Forbids copies from the accelerator to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = next((x for x in args if isinstance(x, torch.Tensor)), None)
        there = source is not None and source.device.type == "cuda"
        if there and isinstance(out, torch.Tensor) and out.device.type == "cpu":
            raise CopyToHost(str(func))
        return out


class Fakes:
    """Makes a model, a cache and tensors fake ones on an accelerator."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return (x if isinstance(x, FakeTensor) else self.mode.from_tensor(x)).to("cuda")

    def __call__(self, x: Any, cache: RetainedCache | None = None) -> Any:
        if cache is None:
            return self.tensor(x)
        for module in x.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(self.tensor(parameter.detach()), False)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = None if buffer is None else self.tensor(buffer)
        for layer in cache.layers:
            for name, value in list(vars(layer).items()):
                if isinstance(value, torch.Tensor):
                    setattr(layer, name, self.tensor(value))
                elif name in ("packed_keys", "packed_values") and value is not None:
                    setattr(layer, name, value.map(self.tensor))
            layer.device = torch.device("cuda", 0)
        return None

    @contextmanager
    def guard(self) -> Any:
        with self.mode, NoCopies():
            yield


@every_case
def test_decode_steps_read_nothing_back(policy: str, lengths: list[int], storage: str | None, attention: str) -> None:
    model, fakes = tiny_llama(attention=attention), Fakes()
    cache = RetainedCache(model.config, POLICIES[policy], storage=storage)
    steps(model, cache, llama_inputs(lengths), fakes, fakes.guard)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_decode_steps_behind_pictures_read_nothing_back(name: str) -> None:
    model, fakes = tiny(name), Fakes()
    steps(model, RetainedCache(model.config, POLICIES["prefixkv"]), prompts(model, [1, 2]), fakes, fakes.guard)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda x: bool(x.all()), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x.cpu(), CopyToHost),
    ],
)
def test_a_hook_that_reads_back_is_noticed(read: Any, error: type[Exception], monkeypatch: Any) -> None:
    model, fakes = tiny_llama(), Fakes()
    cache = RetainedCache(model.config, POLICIES["prefixkv"])

    @contextmanager
    def guard() -> Any:
        monkeypatch.setattr(cache, "after_layer", lambda position: read(cache.layer(position).keys[0, 0, 0, :1]))
        with fakes.guard():
            yield

    with pytest.raises(error):
        steps(model, cache, llama_inputs([31, 23]), fakes, guard)
