"""Collect on a layer of the cache what its policy needs to see of the prompt, pass by pass."""

from __future__ import annotations

from torch import Tensor

from kvcache import scores
from kvcache.layer import RetainedLayer
from kvcache.policy import RetentionPolicy

ATTENTION_KINDS = ("full", "window", "post_vision")


def prompt_queries(layer: RetainedLayer, policy: RetentionPolicy, new: int, prompt_length: int) -> tuple[int, int]:
    """(first, end) among the ``new`` queries of a pass that ``update`` has seen: the prompt's that are measured."""
    start = layer.seen - new
    end = min(layer.seen, prompt_length) - start
    first = 0 if policy.needs.kind == "full" else max(0, prompt_length - policy.needs.window - start)
    return first, max(first, end)


def measure_kernel(
    layer: RetainedLayer,
    policy: RetentionPolicy,
    prompt_length: int,
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float | None,
    last_key: Tensor | None,
) -> None:
    """From the q [B, H, W, D] and k [B, K, S, D] of the kernel call."""
    first, end = prompt_queries(layer, policy, q.shape[2], prompt_length)
    if first == end:
        return
    keys = layer.seen - q.shape[2] + end
    q, k = q[:, :, first:end].detach(), k[:, :, :keys].detach()
    valid = None if layer.valid is None else layer.valid[:, :keys].to(q.device)
    last_key = None if last_key is None else last_key[:, first:end].to(q.device)
    if policy.needs.sums:
        reduce = policy.needs.reduction(policy.selection)
        new = scores.full_scores(q, k, scale=scale, reduce=reduce, valid=valid, last_key=last_key, softcap=softcap)
        layer.scores = scores.accumulate(layer.scores, new)
    else:
        rows = scores.window_rows(q, k, scale=scale, valid=valid, last_key=last_key, softcap=softcap)
        layer.probs = scores.stack_rows(layer.probs, rows)


def measure_weights(layer: RetainedLayer, policy: RetentionPolicy, prompt_length: int, weights: Tensor) -> None:
    """From the attention weights [B, H, W, S] that eager attention returns."""
    first, end = prompt_queries(layer, policy, weights.shape[2], prompt_length)
    if first == end:
        return
    keys = layer.seen - weights.shape[2] + end
    weights = weights[:, :, first:end, :keys].detach()
    valid = None if layer.valid is None else layer.valid[:, :keys].to(weights.device)
    if policy.needs.sums:
        reduce, kv_heads = policy.needs.reduction(policy.selection), layer.keys.shape[1]
        new = scores.full_scores_of_weights(weights, kv_heads=kv_heads, reduce=reduce, valid=valid)
        layer.scores = scores.accumulate(layer.scores, new)
    else:
        layer.probs = scores.stack_rows(layer.probs, scores.window_rows_of_weights(weights, valid=valid))
