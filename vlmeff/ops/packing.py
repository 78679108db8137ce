"""Two 4-bit codes in a byte: the layout of every low-bit weight in a checkpoint.

Shape letters: N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, *, pad: int | Tensor = 0) -> Tensor:
    """Pack codes into bytes: the low nibble holds even k, the high nibble odd k.

    Args:
        codes: [N, K] integers in 0..15.
        pad: the code that fills the last high nibble of an odd K, one for all rows or [N] (kernels must not read it).
    Returns:
        [N, ceil(K / 2)] uint8.
    Raises:
        ValueError: not two-dimensional, or a code is out of range.
    """
    if codes.ndim != 2:
        raise ValueError(f"pack_nibbles: codes must be [N, K], got {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 15):
        raise ValueError(f"pack_nibbles: codes must lie in 0..15, got {int(codes.min())}..{int(codes.max())}")
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        filling = torch.as_tensor(pad, dtype=torch.uint8, device=codes.device).expand(len(codes))
        codes = torch.cat([codes, filling[:, None]], dim=1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, k: int, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Invert ``pack_nibbles``: [N, ceil(K / 2)] uint8 -> [N, K] codes of ``dtype``."""
    pairs = torch.empty(*packed.shape, 2, dtype=dtype, device=packed.device)
    pairs[..., 0] = packed & 15  # several times as fast as a stack of both, and no second pass for the dtype
    pairs[..., 1] = packed >> 4
    return pairs.flatten(1)[:, :k]
