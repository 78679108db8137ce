"""Hooks on a model's attention modules for the duration of one ``generate`` or ``forward`` call.

Before a module: tell the layer of the cache which of the new tokens are real, and put a mask that fits the columns it
holds in the place of the model's. At the kernel (``kvcache.tap``): measure the prompt, and answer the steps behind it
where the cache is quantized (``kvcache.decode``). Behind the module: evict. Calls with any other cache pass through
untouched, and so does every other model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kvcache import assisted, decode, tap
from kvcache.cache import RetainedCache
from kvcache.layer import RetainedLayer
from kvcache.masks import Mask, compact_mask, last_visible, new_validity
from kvcache.measure import measure_kernel, measure_weights
from vlmeff.errors import IncompatibleError, UnsupportedCacheError, UnsupportedModelError


@dataclass
class _Seen:
    """What has been worked out for one mask tensor of the current pass; the layers share masks."""

    mask: Mask
    validity: Tensor | None = None
    validity_known: bool = False
    last_key: Tensor | None = None
    last_key_known: bool = False


class RetainedCall(AbstractContextManager["RetainedCall"]):
    """The hooks of one call: ``with RetainedCall(text_model, cache, ...): output = model(**kwargs)``.

    Args:
        text_model: the language model, a module with ``layers``.
        cache: the ``past_key_values`` of the call; empty, or one to go on from.
        prompt_end: slot behind the last token that the caller brings to ``generate``: what follows is generated, hence
            never padding, and no step needs to look (and wait for the device). None for a bare ``forward``.
        model: that ``generate`` is called on; None for a bare ``forward``.
    Raises (on entering or in the call):
        UnsupportedModelError: an attention module of another kind, attention sinks, or one that the hooks never saw.
        UnsupportedCacheError: under ``torch.compile``.  IncompatibleError: layers get different numbers of tokens.
    """

    def __init__(
        self, text_model: nn.Module, cache: RetainedCache, *, prompt_end: int | None = None, model: Any = None
    ) -> None:
        self.cache, self._model, self._assists = cache, model, False
        self.prompt_end = prompt_end
        layers: Any = text_model.layers
        if len(layers) != len(cache.layers):
            raise UnsupportedCacheError(
                f"past_key_values was made for a model of {len(cache.layers)} layers, this one has {len(layers)}."
            )
        self.modules = [attention_module(layers[index], index) for index in cache.retained]
        self._handles: list[Any] = []
        self._tapped: list[str] = []
        self._new = 0
        self._masks: dict[int, _Seen] = {}
        self._cut: dict[tuple[int, int], Mask] = {}
        self._entered = False

    def __enter__(self) -> RetainedCall:
        if self.cache.watched:  # a forward inside a generate that has the hooks in place
            return self
        self._entered = self.cache.watched = True
        try:
            measuring = self.cache.wants_attention and not self.cache.layer(0).compacted
            stored = self.cache.storage is not None
            names = {module.config._attn_implementation for module in self.modules}
            self._tapped = tap.install(n for n in names if measuring or (stored and decode.has_stand_in(n)))
            self._assists = self._model is not None and assisted.install(self._model)
            for position, module in enumerate(self.modules):
                before, behind = _Before(self, position), _Behind(self, position)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(behind, with_kwargs=True))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._entered:
            return
        self._leave()
        if error is None:
            self._check_done()

    def _leave(self) -> None:
        self._entered = self.cache.watched = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model is not None:  # assisted decoding switches it on and leaves it so
            for position in range(len(self.cache.retained)):
                self.cache.layer(position).record_past = False
        if self._assists:
            assisted.remove(self._model)
        tap.remove(self._tapped)
        self._tapped, self._assists = [], False
        tap.stop_listening()
        for position in range(len(self.cache.retained)):
            decode.take_back(self.cache.layer(position))
        self._forget_masks()

    def _forget_masks(self) -> None:
        self._masks.clear()
        self._cut.clear()

    def _check_done(self) -> None:
        """The whole prompt has gone through, so every layer must have been compacted."""
        for position, module in enumerate(self.modules):
            layer = self.cache.layer(position)
            length = self.cache.prompt_length
            if layer.seen and not layer.compacted and not layer.record_past and layer.seen >= (length or 0):
                raise UnsupportedModelError(
                    f"KV retention: {type(module).__name__} of layer {self.cache.retained[position]} did not pass "
                    "its cache as the keyword argument past_key_values, so nothing was retained. kv=False."
                )

    # -- one module. A hook registered by another thread may run for an instant without its keyword arguments.

    def before(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, module = self.cache, self.modules[position]
        if kwargs.get("past_key_values") is not cache:
            if any(argument is cache for argument in args):
                raise _signature(module)
            return None
        if torch.compiler.is_compiling():
            raise UnsupportedCacheError(
                "KV retention changes the length of the cache and cannot be compiled: do not torch.compile the model, "
                "or use kv=False."
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        if "attention_mask" not in kwargs and len(args) > 1:
            raise _signature(module)
        new = hidden.shape[1]
        if position == 0:
            cache.begin_pass(new)
            self._new = new
            self._forget_masks()
        layer, mask = cache.layer(position), kwargs.get("attention_mask")
        if new != self._new and layer.query_slots is None:
            raise IncompatibleError(
                f"KV retention needs to know which tokens a layer processes; layer {cache.retained[0]} got {self._new}"
                f" and layer {cache.retained[position]} {new}. What drops tokens between layers must call "
                "RetainedCache.set_query_slots, as AdaptInfer does; else use kv=False."
            )
        known = self.prompt_end is not None and layer.seen >= self.prompt_end
        valid = None if known else self._validity(mask, layer, new)
        layer.announce(new, valid)
        decode.lend(layer, new, module.config._attn_implementation)
        if cache.measures(position) or cache.storage is not None:
            self._listen(position, mask)
        if layer.aligned:
            return None
        return args, {**kwargs, "attention_mask": self._fitting(module, layer, mask, new, hidden, known)}

    def behind(self, position: int, kwargs: Mapping[str, Any], output: Any) -> None:
        cache, module = self.cache, self.modules[position]
        if kwargs.get("past_key_values") is not cache:
            return
        tap.stop_listening()
        layer = cache.layer(position)
        decode.check_taken(layer)
        start = layer.seen - self._new
        waiting = not layer.compacted and start < (cache.prompt_length or 0)
        if waiting and cache.wants_attention and module.config._attn_implementation == "eager":
            self._measure_weights(position, output)
        cache.after_layer(position)
        if position == len(self.modules) - 1:
            self._forget_masks()

    # -- at the kernel, and behind it

    def _listen(self, position: int, mask: Mask) -> None:
        module, layer = self.modules[position], self.cache.layer(position)
        measuring = self.cache.measures(position)

        def stand(kernel: tap.Kernel, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if measuring:
                self._measure_kernel(position, query, key, mask, kwargs)
            return decode.attend(layer, kernel, query, key, value, *args, **kwargs)

        tap.listen(module, stand)

    @torch.no_grad()
    def _measure_kernel(self, position: int, query: Tensor, key: Tensor, mask: Mask, kwargs: dict[str, Any]) -> None:
        if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
            raise _sinks(self.modules[position])
        scale, length = kwargs.get("scaling"), self.cache.prompt_length
        assert length is not None
        measure_kernel(
            self.cache.layer(position),
            self.cache.policy,
            length,
            query,
            key,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=kwargs.get("softcap"),
            last_key=self._last_key(mask),
        )

    @torch.no_grad()
    def _measure_weights(self, position: int, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4:
            raise UnsupportedModelError(
                f"KV retention: eager attention of {type(self.modules[position]).__name__} does not return its "
                "weights: use model.set_attn_implementation('sdpa')."
            )
        length = self.cache.prompt_length
        assert length is not None
        measure_weights(self.cache.layer(position), self.cache.policy, length, weights)

    # -- masks

    def _about(self, mask: Mask) -> _Seen:
        return self._masks.setdefault(id(mask), _Seen(mask))  # holds the mask, so that its id stays its own

    def _last_key(self, mask: Mask) -> Tensor | None:
        about = self._about(mask)
        if not about.last_key_known:
            about.last_key, about.last_key_known = last_visible(mask), True
        return about.last_key

    def _validity(self, mask: Mask, layer: RetainedLayer, new: int) -> Tensor | None:
        """[B, new], None when all new tokens are real."""
        if mask is None:
            return None
        about = self._about(mask)
        if not about.validity_known:
            valid = new_validity(mask, new)
            # One token behind the prompt is a step of a hand-written loop: not worth waiting for the device. It is then
            # taken for possible padding, which costs a mask and changes nothing.
            step = new == 1 and layer.compacted
            if not step and valid is not None and bool(valid.all()):
                valid = None
            about.validity, about.validity_known = valid, True
        return about.validity

    def _fitting(self, module: Any, layer: RetainedLayer, mask: Mask, new: int, hidden: Tensor, known: bool) -> Mask:
        """The mask for the columns of the layer; layers without fillers and of one length share it."""
        key = (id(mask), layer.physical_length)
        if layer.valid is None and key in self._cut:
            return self._cut[key]
        device = mask.device if isinstance(mask, Tensor) else hidden.device
        cut = compact_mask(
            mask,
            layer.valid,
            columns=layer.physical_length,
            new=new,
            seen=layer.seen,
            rows=len(hidden),
            backend=module.config._attn_implementation,
            device=device,
            dtype=hidden.dtype,
            new_valid=known,
        )
        if layer.valid is None:
            self._about(mask)
            self._cut[key] = cut
        return cut


class _Before:
    def __init__(self, call: RetainedCall, position: int) -> None:
        self._call, self._position = call, position

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return None if kwargs is None else self._call.before(self._position, args, kwargs)


class _Behind:
    def __init__(self, call: RetainedCall, position: int) -> None:
        self._call, self._position = call, position

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        if isinstance(kwargs, dict):
            self._call.behind(self._position, kwargs, output)


def attention_module(decoder_layer: nn.Module, index: int) -> Any:
    """The self-attention of a decoder layer: the module that takes a mask and a cache and knows its layer number.

    Raises:
        UnsupportedModelError: there is none, or more than one, or it has attention sinks.
    """
    found = [
        module
        for module in decoder_layer.modules()
        if module is not decoder_layer
        and getattr(module, "layer_idx", None) == index
        and {"attention_mask", "past_key_values"} <= inspect.signature(module.forward).parameters.keys()
    ]
    if len(found) != 1 or not hasattr(found[0], "config"):
        raise UnsupportedModelError(
            f"KV retention: layer {index} of the language model ({type(decoder_layer).__name__}) has no attention "
            "module with the arguments attention_mask and past_key_values. kv=False."
        )
    if getattr(found[0], "sinks", None) is not None:
        raise _sinks(found[0])
    return found[0]


def _sinks(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"KV retention does not know the attention of {type(module).__name__} (attention sinks or a position bias): "
        "kv=False."
    )


def _signature(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"KV retention: {type(module).__name__} is not called with attention_mask and past_key_values as keyword "
        "arguments. kv=False."
    )
