"""Shorten a prompt by a keep mask and put the original prompt back. Pure functions on tensors.

Shapes: B rows, L prompt width, S width of the shortened prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmeff.errors import UnsupportedInputError

# What stands in the padding of each tensor that runs along the prompt.
FILL = {"attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100, "position_ids": 0}


@dataclass(frozen=True, eq=False)
class Shortening:
    """Where each kept token of a prompt goes: rows are packed to the right, padding stands on the left.

    ``take`` [B, L] bool: kept and not padding. ``place`` [B, L] int64: its column in the short prompt, where ``take``.
    ``width`` S; ``padded`` whether any short row has padding.
    """

    take: Tensor
    place: Tensor
    width: int
    padded: bool

    def apply(self, x: Tensor, fill: int) -> Tensor:
        """[..., B, L] -> [..., B, S], ``fill`` in the padding."""
        out = x.new_full((*x.shape[:-1], self.width), fill)
        rows, columns = self.take.nonzero(as_tuple=True)
        out[..., rows, self.place[rows, columns]] = x[..., rows, columns]
        return out

    @property
    def mask(self) -> Tensor:
        """[B, S] int64 attention mask of the short prompt."""
        return self.apply(self.take.long(), 0)


def plan_shortening(keep: Tensor, valid: Tensor) -> Shortening:
    """Pack the tokens that are kept and valid.

    Args:
        keep: [B, L] bool, false for pruned placeholders.  valid: [B, L] bool, false for padding.
    """
    take = keep & valid
    counts = take.sum(1)
    lengths = counts.tolist()  # the width of the short prompt has to be known on the host
    width = max(lengths)
    place = take.cumsum(1) - 1 + (width - counts)[:, None]
    return Shortening(take, place, width, padded=min(lengths) < width)


def keep_mask(input_ids: Tensor, token_id: int, kept: Iterable[tuple[Tensor, int]]) -> Tensor:
    """[B, L] bool: true for text and for kept placeholders.

    Args:
        input_ids: [B, L].  token_id: the placeholder.
        kept: per picture, in the order of the placeholders, (index [k] of kept tokens, number of tokens). Pictures are
            matched to placeholders by count in order, so two pictures in one run need no special case.
    Raises:
        UnsupportedInputError: the pictures have another number of tokens than there are placeholders.
    """
    flags = []
    for index, n in kept:
        flag = torch.zeros(n, dtype=torch.bool, device=input_ids.device)
        flag[index.to(input_ids.device)] = True
        flags.append(flag)
    placeholders = input_ids == token_id
    features = sum(len(f) for f in flags)
    count = int(placeholders.sum())
    if count != features:
        raise UnsupportedInputError(
            f"the prompt has {count} picture placeholders (token {token_id}) and the pictures have {features} tokens. "
            "Make input_ids and pixel_values with the model's own processor, in one call."
        )
    return (~placeholders).masked_scatter(placeholders, torch.cat(flags))


def contiguous_positions(mask: Tensor) -> Tensor:
    """[B, S] positions 0, 1, ... of the unpadded tokens, 0 in the padding."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
