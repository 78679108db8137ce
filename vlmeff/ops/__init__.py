"""Every hot operation: a public function, the PyTorch reference that defines its numbers, and the choice of back end.

A leaf of the house: of vlmeff it imports only ``vlmeff.errors``. Importing it loads neither Triton nor vlmeff_kernels.
"""

from vlmeff.ops._dispatch import backend, counters, explain
from vlmeff.ops.attention import attention_column_mass, row_logsumexp
from vlmeff.ops.dct import dct_resample
from vlmeff.ops.gather import gather_tokens
from vlmeff.ops.text_rows import text_to_vision_scores

__all__ = [
    "attention_column_mass",
    "backend",
    "counters",
    "dct_resample",
    "explain",
    "gather_tokens",
    "row_logsumexp",
    "text_to_vision_scores",
]
