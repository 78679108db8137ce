"""Attention of one new token per row over keys and values that are stored in 8, 4 or 2 bits.

Shape letters: B batch, Hq query heads, Hk key/value heads, T tokens whose codes are stored, R newer tokens in full
precision, S = T + R, W bytes that hold the codes of a token, G groups, D head dim of the keys, E of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmeff.ops._arguments import autocast_off
from vlmeff.ops._dispatch import dispatch, operator
from vlmeff.ops.kv_codes import dequantize_keys, dequantize_values

_OP = "quantized_decode_attention"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BITS = (8, 4, 2)
_CPU_BLOCK_ENTRIES = 2**19  # 2 MB in float32
Group = int | tuple[int, ...]


class StoredStates(NamedTuple):
    """The keys, or the values, of S = T + R tokens: T quantized ones, then R in full precision.

    x = code * scale + zero in float32, rounded to the dtype of ``rest``.
    """

    codes: Tensor
    """[B, Hk, T, W] uint8: 8 / bits codes to a byte, the first channel in the lowest bits."""
    scale: Tensor
    """Keys: [B, Hk, G, D], one for each channel of a group of tokens. Values: [B, Hk, T, G], one for each group of
    channels of a token. Floating point."""
    zero: Tensor
    """As ``scale``."""
    rest: Tensor
    """[B, Hk, R, D] (values: E): the newest tokens."""
    bits: int
    """8, 4 or 2."""
    group: Group
    """Keys: tokens of a group, of which the last may have fewer, or the tokens of each of the G groups where they
    differ. Values: channels of a group; it divides E."""


@operator
def quantized_decode_attention(
    q: Tensor,
    keys: StoredStates,
    values: StoredStates,
    *,
    scale: float,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with the newest token of every row to all tokens of a quantized cache.

    out = softmax_j(z_j over the valid j) @ v, z_j = scale * <q, k_j>, and z <- softcap * tanh(z / softcap) if given; k
    and v are the dequantized tokens followed by the rest, products and softmax in float32. Query head h reads key head
    h // (Hq // Hk). Keys and values may have different T, but the same S.

    Args:
        q: [B, Hq, 1, D] float32, float16, bfloat16 or float64.
        keys: codes [B, Hk, T, ceil(D * bits / 8)], rest [B, Hk, R, D] of the dtype of q.
        values: codes [B, Hk, T', ceil(E * bits / 8)], rest [B, Hk, R', E] of the dtype of q; T' + R' = T + R.
        scale: factor of the inner products, usually D ** -0.5.
        valid: [B, S] bool, False for tokens that are not to be seen (fillers, padding); default all True. They must be
            finite all the same.
        softcap: positive, or None.
    Returns:
        [B, Hq, 1, E] in the dtype of q; zeros for a row without a valid token.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.

    The storage is that of KIVI (arXiv 2402.02750), as ``kvcache.quantization`` makes it. Tolerance of the back ends:
    1e-4 relative to the reference in float32, the rounding of the output to the dtype of q apart. The reference
    dequantizes the keys, then the values, on a CPU a few heads at a time.
    """
    _check_query(q)
    _check_states("keys", keys, q)
    _check_states("values", values, q)
    key_group = _checked_key_group(keys)
    _check_values_group(values)
    if keys.rest.shape[1] != values.rest.shape[1]:
        raise ValueError(f"{_OP}: values must have the heads of keys, {keys.rest.shape[1]}, got {values.rest.shape[1]}")
    sizes = [states.codes.shape[2] + states.rest.shape[2] for states in (keys, values)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{_OP}: values must have as many tokens as keys, {sizes[0]}, got {sizes[1]}")
    if valid is not None:
        _check(("valid", valid), q, {"B": q.shape[0], "S": sizes[0]}, (torch.bool,))
    for name, number in (("scale", scale), ("softcap", 1 if softcap is None else softcap)):
        if not isinstance(number, int | float):
            raise TypeError(f"{_OP}: {name} must be a number, got {type(number).__name__}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{_OP}: softcap must be positive, got {softcap}")
    return dispatch(
        _OP,
        _reference,
        q=q,
        keys=tuple(keys[:4]),  # codes, scale, zero, rest
        values=tuple(values[:4]),
        key_bits=keys.bits,
        value_bits=values.bits,
        key_group=key_group,
        value_group=values.group,
        scale=scale,
        valid=valid,
        softcap=softcap,
    )


# The reference. It defines the numbers.


def _reference(
    *,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_bits: int,
    value_bits: int,
    key_group: Group,
    value_group: int,
    scale: float,
    valid: Tensor | None,
    softcap: float | None,
) -> Tensor:
    kv_heads, dim = keys[3].shape[1], max(keys[3].shape[3], values[3].shape[3])
    entries = q.shape[0] * dim * (keys[0].shape[2] + keys[3].shape[2])
    # On a CPU as many heads at a time as fit into its cache: new memory for all would cost more than the arithmetic.
    step = max(1, _CPU_BLOCK_ENTRIES // max(1, entries)) if q.device.type == "cpu" else kv_heads
    grouped = q.unflatten(1, (kv_heads, -1)).squeeze(3)
    out = []
    with autocast_off(q):
        for start in range(0, kv_heads, step):
            part = slice(start, start + step)
            out.append(
                _attended(
                    grouped[:, part],
                    [t[:, part] for t in keys],
                    [t[:, part] for t in values],
                    bits=(key_bits, value_bits),
                    key_sizes=_sizes(key_group, keys[0].shape[2]),
                    scale=scale,
                    valid=valid,
                    softcap=softcap,
                )
            )
    return torch.cat(out, 1).flatten(1, 2)[:, :, None]


def _attended(
    q_BKGD: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    *,
    bits: tuple[int, int],
    key_sizes: tuple[int, ...],
    scale: float,
    valid: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """[B, K, G, E]."""
    dtype = q_BKGD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    stored = dequantize_keys(*keys[:3], sizes=key_sizes, bits=bits[0], dtype=dtype)
    # In two pieces: joining the logits copies less than joining the keys, and likewise below.
    logits = torch.cat([(q_BKGD.to(wide) * scale) @ part.to(wide).mT for part in (stored, keys[3])], -1)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if valid is None:
        p = logits.softmax(-1)
    else:
        hidden = ~valid[:, None, None]
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        p = p.masked_fill(hidden.all(-1, keepdim=True), 0)  # nothing to see: softmax gives NaN
    border = values[0].shape[2]
    stored = dequantize_values(*values[:3], head_dim=values[3].shape[3], bits=bits[1], dtype=dtype)
    return (p[..., :border] @ stored.to(wide) + p[..., border:] @ values[3].to(wide)).to(dtype)


def _sizes(group: Group, tokens: int) -> tuple[int, ...]:
    """Tokens of each group of keys."""
    if not isinstance(group, int):
        return group
    whole, left = tokens // group, tokens % group  # divmod is not for symbolic sizes
    return (group,) * whole + (left,) * (left > 0)


# Checks of the arguments. None of them reads a value of a tensor, so none waits for the device.


def _check_query(q: Tensor) -> None:
    _check(("q", q), q, dict.fromkeys(("B", "Hq", "1", "D")), _FLOATS)
    if q.shape[2] != 1:
        raise ValueError(f"{_OP}: q must have one query a row, [B, Hq, 1, D], got {tuple(q.shape)}")


def _check_states(name: str, states: StoredStates, q: Tensor) -> None:
    codes, scale, zero, rest, bits, _ = states
    if bits not in _BITS:
        raise ValueError(f"{_OP}: {name}.bits must be 8, 4 or 2, got {bits!r}")
    dim = q.shape[-1] if name == "keys" else None
    _check((f"{name}.rest", rest), q, {"B": q.shape[0], "Hk": None, "R": None, "D": dim}, (q.dtype,))
    kv_heads, dim = rest.shape[1], rest.shape[3]
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"{_OP}: the heads of {name} must divide those of q, got {kv_heads} for {q.shape[1]}")
    leading: dict[str, int | None] = {"B": q.shape[0], "Hk": kv_heads}
    _check((f"{name}.codes", codes), q, {**leading, "T": None, "W": -(-dim * bits // 8)}, (torch.uint8,))
    trailing = {"G": None, "D": dim} if name == "keys" else {"T": codes.shape[2], "G": None}
    _check((f"{name}.scale", scale), q, {**leading, **trailing}, _FLOATS)
    sizes = dict(zip((*leading, *trailing), scale.shape, strict=True))
    _check((f"{name}.zero", zero), q, sizes, (scale.dtype,))


def _checked_key_group(keys: StoredStates) -> Group:
    """The group as back ends get it: an int where the groups are equal, but for a smaller last one."""
    group, tokens, groups = keys.group, keys.codes.shape[2], keys.scale.shape[2]
    if isinstance(group, tuple):
        if len(group) != groups or sum(group) != tokens or (group and min(group) < 1):
            raise ValueError(
                f"{_OP}: keys.group must be the tokens of each of the G = {groups} groups, {tokens} in all, got "
                f"{len(group)} groups of {sum(group)} tokens"
            )
        if not group:
            return 1
        regular = group.count(group[0]) + (group[-1] < group[0]) == groups
        return group[0] if regular else group
    if type(group) is not int or group < 1 or groups != -(-tokens // group):
        raise ValueError(
            f"{_OP}: keys.group={group!r} must be the tokens of a group, ceil(T / group) = G with T = {tokens} and "
            f"G = {groups}"
        )
    return group


def _check_values_group(values: StoredStates) -> None:
    group, dim, groups = values.group, values.rest.shape[3], values.scale.shape[3]
    if type(group) is not int or group < 1 or group * groups != dim:
        raise ValueError(
            f"{_OP}: values.group={group!r} must be the channels of a group, group * G = E with E = {dim} and "
            f"G = {groups}"
        )


def _check(
    named: tuple[str, Any], like: Tensor, shape: Mapping[str, int | None], dtypes: Sequence[torch.dtype]
) -> None:
    """Check the shape (None leaves a size open), the dtype and, against the tensor like, the device."""
    name, value = named
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(value).__name__}")
    sizes = tuple(shape.values())
    if value.ndim != len(sizes) or any(n is not None and n != got for n, got in zip(sizes, value.shape, strict=True)):
        known = ", ".join(f"{letter} = {size}" for letter, size in shape.items() if size is not None)
        raise ValueError(
            f"{_OP}: {name} must be [{', '.join(shape)}]{' with ' + known if known else ''}, got {tuple(value.shape)}"
        )
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{_OP}: {name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != like.device:
        raise ValueError(f"{_OP}: {name} must be on {like.device} (as q), got {value.device}")
