"""Queries and keys of timm's attention modules, from their input: for towers of transformers' ``TimmWrapperModel`` and
of open_clip's ``TimmModel``.

Covers ``Attention`` (ViT), ``EvaAttention`` and ``AttentionRope``: one projection for q, k and v or three, norms per
head, rotary positions for all but the prefix tokens, fewer key than query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.probe import QueryKey

KNOWN = ("Attention", "EvaAttention", "AttentionRope")


def is_timm_attention(module: nn.Module) -> bool:
    """Whether ``timm_query_key`` knows this module."""
    return type(module).__name__ in KNOWN and type(module).__module__.startswith("timm.")


def timm_model(tower: Any) -> Any:
    """The timm model in a tower of transformers (``timm_model``) or open_clip (``trunk``), or the tower itself."""
    return getattr(tower, "timm_model", None) or getattr(tower, "trunk", None) or tower


def timm_attention_layers(tower: Any) -> list[nn.Module]:
    """The attention module of every block; raises ``UnsupportedModelError`` where a block has none that is known."""
    model = timm_model(tower)
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    if not layers or not all(isinstance(layer, nn.Module) and is_timm_attention(layer) for layer in layers):
        raise UnsupportedModelError(
            f"the vision tower {type(model).__name__} has no blocks[i].attn of timm's classes {', '.join(KNOWN)}, so "
            "its tokens have no attention scores; use a method without them: tokens='downsample'."
        )
    return layers  # type: ignore[return-value]


def timm_query_key(module: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> QueryKey:
    """q and k [B, H, M, D] of a timm attention module from its input [B, M, C], as its own forward makes them.

    Args:
        kwargs: of the module's call: ``rope`` [M - prefix, 2 D] (or with leading axes for heads and batch) is applied;
            ``attn_mask`` and ``is_causal`` are refused.
    Raises:
        UnsupportedModelError: the attention is masked, so it is no plain softmax of q k^T.
    """
    if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
        raise UnsupportedModelError(
            f"{type(module).__name__}: masked attention of a timm tower is not supported; use a method without "
            "attention scores: tokens='downsample'."
        )
    if getattr(module, "qkv", None) is not None:
        qkv = module.qkv(hidden)
        if getattr(module, "q_bias", None) is not None:  # EVA keeps the biases apart: there is none for k
            qkv = qkv + torch.cat((module.q_bias, module.k_bias, module.v_bias))
        q, k, _ = qkv.chunk(3, -1)
    else:
        q, k = module.q_proj(hidden), module.k_proj(hidden)
    q, k = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (q, k))
    q, k = module.q_norm(q), module.k_norm(k)
    rope = kwargs.get("rope")
    if rope is not None:
        q, k = (_rotated(module, x, rope).to(hidden.dtype) for x in (q, k))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return QueryKey(q, k, module.scale)


def _rotated(module: Any, x: Tensor, rope: Tensor) -> Tensor:
    """x [B, H, M, D] with pairs of channels turned by the angles whose sines and cosines are ``rope``'s two halves.

    Prefix tokens (class, registers) stand nowhere in the picture and are not turned. A pair is (2i, 2i + 1), or
    (i, i + D / 2) in the ``rotate_half`` layout.
    """
    prefix, patches = x[:, :, : module.num_prefix_tokens], x[:, :, module.num_prefix_tokens :]
    sin, cos = rope.chunk(2, -1)
    if getattr(module, "rotate_half", False):
        first, second = patches.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([prefix, patches * cos + turned * sin], 2)
