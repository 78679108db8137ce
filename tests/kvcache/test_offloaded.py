"""A ``RetainedCache`` whose layers wait on the host between their turns, as far as that runs without an accelerator.

What is computed: on the CPU, with streams that do nothing, equal to the cache that stays where it is. Where it is: with
fake tensors, which have shapes and devices and no numbers, so that every mix of host and accelerator is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from retaining import CLOSE, STEPS, Ends, TopScores, retained_forward, retained_generate
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode

import vlmeff
from kvcache import KNorm, PrefixKV, controller
from kvcache.cache import RetainedCache
from kvcache.quantized_layer import QuantizedRetainedLayer


class Stream:
    """Of a machine on which everything happens in order."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Stream)

    __enter__ = __exit__ = lambda *_: None


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())


@pytest.fixture
def nothing_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether new tokens are real is read off the mask's numbers, which fake tensors do not have."""
    monkeypatch.setattr(controller, "new_validity", lambda mask, new: None)


POLICIES = {
    "grow": TopScores(keep_ratio=0.4),
    "fixed_point": TopScores(keep_ratio=0.4, decode="fixed_point", evict_interval=2),
    "prefixkv": PrefixKV(keep_ratio=0.4, sink=1, recent=1),
    "knorm": KNorm(keep_ratio=0.4),
}


@pytest.mark.parametrize("storage", [None, "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_offloading_changes_no_number(policy: str, storage: str | None) -> None:
    model, inputs = tiny_llama(), llama_inputs([230, 190] if storage else [31, 23])
    logits, caches = [], []
    for offloading in (False, True):
        cache = RetainedCache(model.config, POLICIES[policy], storage=storage, offloading=offloading)
        result, got = retained_generate(model, None, inputs, max_new_tokens=STEPS, past_key_values=cache)
        assert got is cache
        logits.append(torch.stack(result.logits))
        caches.append(cache)
    assert torch.equal(*logits)
    plain, offloaded = caches
    assert offloaded.nbytes() == plain.nbytes() < plain.full_nbytes()
    assert offloaded.report().layers == plain.report().layers


def test_headroom_is_given_up_when_a_layer_leaves() -> None:
    """A buffer that stayed on the device would be what offloading is to free."""
    model, inputs = tiny_llama(), llama_inputs([31])
    expected, _ = retained_generate(model, POLICIES["grow"], inputs, max_new_tokens=STEPS)
    cache = RetainedCache(model.config, POLICIES["grow"], headroom=4, offloading=True)
    result, _ = retained_generate(model, None, inputs, max_new_tokens=STEPS, past_key_values=cache)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(expected.logits), **CLOSE)
    assert all(cache.layer(p)._buffers is None for p in range(len(cache.retained)))


@torch.no_grad()
def test_a_wrapped_model_takes_an_offloaded_cache_and_names_it_where_transformers_would_make_its_own() -> None:
    model = tiny("llava")
    inputs = prompts(model, [1, 2])
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5), kv=PrefixKV(keep_ratio=0.4, sink=1, recent=1))
    expected = model.generate(**inputs, max_new_tokens=4)
    cache = RetainedCache(model.config, PrefixKV(keep_ratio=0.4, sink=1, recent=1), offloading=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, past_key_values=cache), expected)
    assert vlmeff.report(model).kv_bytes == cache.nbytes()
    with pytest.raises(vlmeff.errors.UnsupportedCacheError, match="offloading=True"):
        model.generate(**inputs, max_new_tokens=4, cache_implementation="offloaded")


# Where it is


def devices(cache: RetainedCache) -> list[set[str]]:
    """Of each layer."""
    found = []
    for position in range(len(cache.retained)):
        layer = cache.layer(position)
        packed = []
        if isinstance(layer, QuantizedRetainedLayer):
            packed = [t for p in (layer.packed_keys, layer.packed_values) if p is not None for t in p.tensors()]
        found.append({t.device.type for t in (layer.keys, layer.values, *packed)})
    return found


# The last layer's turn brings the first back for the next pass.
AWAY = [{"cuda"}, {"cpu"}, {"cpu"}, {"cpu"}]


def fake(model: Any, mode: FakeTensorMode, device: str) -> Any:
    """The model without numbers on ``device``; ``model.to`` would swap tensors, which fake ones do not always allow."""

    def moved(x: Any) -> Any:
        return None if x is None else (x if isinstance(x, FakeTensor) else mode.from_tensor(x)).to(device)

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = None if parameter is None else torch.nn.Parameter(moved(parameter), False)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = moved(buffer)
    return model


def packed_tokens(cache: RetainedCache) -> int:
    layers = [cache.layer(p) for p in range(len(cache.retained))]
    return sum(getattr(layer, "packed_values", None) is not None for layer in layers)


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize(
    ("policy", "backend"),
    [
        (KNorm(keep_ratio=0.8), "sdpa"),
        (KNorm(keep_ratio=0.8), "eager"),
        (Ends(keep_ratio=0.8, decode="fixed_point", evict_interval=1), "sdpa"),
        (Ends(keep_ratio=0.8, decode="window", decode_window=2, evict_interval=1), "sdpa"),
        (Ends(keep_ratio=1.0), "sdpa"),
    ],
    ids=["knorm", "knorm eager", "fixed_point", "window", "all"],
)
@torch.no_grad()
def test_layers_wait_on_the_host_and_nothing_meets_there(
    policy: Any, storage: str | None, backend: str, nothing_is_padding: None
) -> None:
    model = tiny_llama(attention=backend)
    with FakeTensorMode() as mode:
        fake(model, mode, "cuda")
        cache = RetainedCache(model.config, policy, storage=storage, offloading=True)
        prompt = torch.full((2, 200), 11, device="cuda")
        seen = 200
        out = retained_forward(model, cache, {"input_ids": prompt})
        for new in (1, 1, 3, 1):
            assert out.logits.device.type == "cuda"
            assert devices(cache) == AWAY
            out = retained_forward(model, cache, {"input_ids": torch.full((2, new), 12, device="cuda")})
            seen += new
        assert cache.get_seq_length() == seen
        assert cache.layer(0).compacted
        assert packed_tokens(cache) == (4 if storage else 0)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        retained_forward(model, cache, {"input_ids": torch.full((2, 1), 12, device="cuda")})
        assert devices(cache) == AWAY


@torch.no_grad()
def test_the_fake_devices_would_show_a_mix() -> None:
    """The test above can fail: a layer that nobody brings back is on another device than its new tokens."""
    model = tiny_llama()
    with FakeTensorMode() as mode:
        fake(model, mode, "cuda")
        cache = RetainedCache(model.config, Ends(keep_ratio=0.5), offloading=True)
        retained_forward(model, cache, {"input_ids": torch.full((1, 20), 11, device="cuda")})
        cache.prefetch = lambda *args, **kwargs: None
        with pytest.raises(FakeTensorDeviceMismatchError):
            retained_forward(model, cache, {"input_ids": torch.full((1, 1), 11, device="cuda")})


@pytest.mark.parametrize("storage", [None, "int4"])
@torch.no_grad()
def test_a_model_that_is_spread_over_devices_keeps_each_layer_where_it_runs(
    storage: str | None, nothing_is_padding: None
) -> None:
    """Half of the layers on another device, as ``device_map`` places them: masks and choices follow the layer."""
    model = tiny_llama()
    with FakeTensorMode() as mode:
        fake(model, mode, "cuda")
        for layer in model.model.layers[2:]:
            fake(layer, mode, "cpu")
            layer.register_forward_pre_hook(_to_host, with_kwargs=True)
        model.model.layers[3].register_forward_hook(lambda m, a, output: output.to("cuda"))
        cache = RetainedCache(model.config, KNorm(keep_ratio=0.8), storage=storage)
        for new in (200, 1, 2):
            retained_forward(model, cache, {"input_ids": torch.full((2, new), 11, device="cuda")})
        assert [cache.layer(p).keys.device.type for p in range(4)] == ["cuda", "cuda", "cpu", "cpu"]
        assert [cache.layer(p).physical_length for p in range(4)] == [163] * 4


def _to_host(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def to_host(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to("cpu")
        return tuple(map(to_host, x)) if isinstance(x, tuple) else x

    return to_host(args), {name: to_host(x) for name, x in kwargs.items()}
