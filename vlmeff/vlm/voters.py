"""Who votes on the visual tokens of a prompt: where they and the text behind them stand, and the text's queries.

Letters: B rows, L prompt columns, nv visual tokens of a row, T text rows that vote, n columns of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import ConfigError, UnsupportedInputError


@dataclass(frozen=True, eq=False)
class VisualRows:
    """Where the visual tokens and the voters of a prompt stand.

    ``width`` L; ``vision`` [B, nv] and ``text`` [B, T] columns, ascending; ``text_valid`` [B, T] false where a row has
    fewer voters; ``valid`` [B, L] false in the padding.
    """

    width: int
    vision: Tensor
    text: Tensor
    text_valid: Tensor
    valid: Tensor

    def repeated(self, rows: int) -> VisualRows:
        """For the ``rows`` that generate makes of a prompt's (beams, returned sequences)."""
        n = rows // len(self.vision)
        if n == 1:
            return self
        tensors = (self.vision, self.text, self.text_valid, self.valid)
        return VisualRows(self.width, *(x.repeat_interleave(n, 0) for x in tensors))


def visual_rows(visual: Tensor, valid: Tensor | None = None) -> VisualRows | None:
    """Find the visual tokens and the text behind the last of them, which votes; None when there are none.

    Args:
        visual: [B, L] bool, the placeholders of the prompt as the language model gets it.
        valid: [B, L] bool or int, false for padding; None: no padding.
    Raises:
        UnsupportedInputError: the rows have different numbers of visual tokens.
        ConfigError: a row has no text behind its last picture.
    """
    valid = torch.ones_like(visual) if valid is None else valid.to(visual.device).bool()
    visual = visual & valid
    counts = visual.sum(1).tolist()
    if not any(counts):
        return None
    if len(set(counts)) > 1:
        raise UnsupportedInputError(
            f"AdaptInfer: the rows of the batch have {', '.join(map(str, counts))} visual tokens, and it needs equally "
            "many in each: make pictures of one size and number per row, or call the model row by row."
        )
    behind = visual.flip(1).cumsum(1).flip(1) == 0
    voters = behind & valid
    votes = voters.sum(1).tolist()
    if not all(votes):
        raise ConfigError(
            f"AdaptInfer: row {votes.index(0)} of input_ids has no text after its last picture, and that text chooses "
            "the tokens: put the question behind the picture (chat templates do)."
        )
    text, text_valid = columns_of(voters, max(votes))
    return VisualRows(visual.shape[1], columns_of(visual, counts[0])[0], text, text_valid, valid)


def columns_of(flags: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[B, L] bool -> the first n columns that are set [B, n], ascending, and whether each is (fewer may be)."""
    columns = torch.argsort((~flags).byte(), dim=1, stable=True)[:, :n]
    return columns, flags.gather(1, columns)


def query_key(
    layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], *, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The queries of some rows and all keys of a decoder layer, from its input.

    Args:
        hidden: [B, n, C].  position_embeddings: cos and sin, [1 or B, n, D].  rows: [B, T] columns.
    Returns:
        q [B, Hq, T, D] and k [B, Hkv, n, D], rotary embedding applied.
    """
    attention = layer.self_attn
    device = attention.q_proj.weight.device  # hooks run before accelerate moves a layer's inputs to its device
    rows = rows.to(device)
    cos, sin = (x.to(device).expand(len(hidden), -1, -1) for x in position_embeddings)
    x = layer.input_layernorm(hidden.to(device))

    def heads(projected: Tensor, norm: str, cos: Tensor, sin: Tensor) -> Tensor:
        split = projected.view(*projected.shape[:-1], -1, attention.head_dim)
        split = getattr(attention, norm)(split) if hasattr(attention, norm) else split
        split = split.transpose(1, 2)
        first, second = split.chunk(2, -1)
        return split * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    k = heads(attention.k_proj(x), "k_norm", cos, sin)
    q = heads(attention.q_proj(ops.gather_tokens(x, rows)), "q_norm", rows_at(cos, rows), rows_at(sin, rows))
    return q, k


def rows_at(x: Tensor, columns: Tensor) -> Tensor:
    """[1 or B, n, D] -> [B, n', D]."""
    return ops.gather_tokens(x.expand(len(columns), -1, -1), columns)
