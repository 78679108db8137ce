"""Every hot operation: a public function, the PyTorch reference that defines its numbers, and the choice of back end.

A leaf of the house: of vlmeff it imports only ``vlmeff.errors``. Importing it loads neither Triton nor vlmeff_kernels.
"""

from vlmeff.ops._dispatch import backend, counters, explain
from vlmeff.ops.attention import attention_column_mass, row_logsumexp
from vlmeff.ops.dct import dct_resample
from vlmeff.ops.decode_attention import StoredStates, quantized_decode_attention
from vlmeff.ops.gather import gather_kv, gather_tokens
from vlmeff.ops.gaussian import gaussian_path_log_ratio
from vlmeff.ops.linear import (
    linear_w4a8_int8,
    linear_w8a8_fp8,
    linear_w8a8_int8,
    linear_wna16,
    linear_wnan_int,
)
from vlmeff.ops.producers import gelu_quant_int8, norm_quant_int8
from vlmeff.ops.quantize import act_quant_fp8, act_quant_int8, act_quant_uint
from vlmeff.ops.select import top_indices
from vlmeff.ops.text_rows import text_to_vision_scores

__all__ = [
    "StoredStates",
    "act_quant_fp8",
    "act_quant_int8",
    "act_quant_uint",
    "attention_column_mass",
    "backend",
    "counters",
    "dct_resample",
    "explain",
    "gather_kv",
    "gather_tokens",
    "gaussian_path_log_ratio",
    "gelu_quant_int8",
    "linear_w4a8_int8",
    "linear_w8a8_fp8",
    "linear_w8a8_int8",
    "linear_wna16",
    "linear_wnan_int",
    "norm_quant_int8",
    "quantized_decode_attention",
    "row_logsumexp",
    "text_to_vision_scores",
    "top_indices",
]
