"""Accelerated back ends for the operations of ``vlmeff.ops``.

``vlmeff.ops`` looks here, and only when a CUDA tensor or an explicit choice needs it: ``OPS[op][back end]``, with
``"cuda"``, ``"triton"`` or ``"torch"`` as the back end's name. This package imports nothing of ours, so the arguments
of ``run`` and ``supports`` are those of the public function, by name, already checked by it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

__all__ = ["OPS", "BackEnd"]


HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackEnd(Protocol):
    """One implementation of one op."""

    def supports(self, **arguments: Any) -> str | None:
        """Return why these arguments are refused (dtype, head dim, alignment, device, ...), or None if they are not."""
        ...

    def unproven(self, **arguments: Any) -> str | None:
        """Return why automatic dispatch passes over what ``supports`` does not refuse (it was never measured here, or
        was slower), or None."""
        ...

    def run(self, **arguments: Any) -> Any:
        """Compute the op. ``supports`` has returned None, and every tensor has unit stride in its last dimension."""
        ...


class _Later:
    """A back end whose module is imported when it is first asked, so that importing this package stays light."""

    def __init__(self, module: Callable[[], Any], name: str, *, triton: bool = True) -> None:
        self._module, self._name, self._triton = module, name, triton

    def _back_end(self) -> Any:
        return getattr(self._module(), self._name)

    def supports(self, **arguments: Any) -> str | None:
        if self._triton and not HAS_TRITON:
            return "the package triton is not installed"
        reason: str | None = self._back_end().supports(**arguments)
        return reason

    def unproven(self, **arguments: Any) -> str | None:
        reason: str | None = self._back_end().unproven(**arguments)
        return reason

    def run(self, **arguments: Any) -> Any:
        return self._back_end().run(**arguments)


# Import statements and not importlib: torch.compile traces through them.
def _column_mass() -> Any:
    from vlmeff_kernels import column_mass

    return column_mass


def _cuda_ops() -> Any:
    from vlmeff_kernels import cuda_ops

    return cuda_ops


def _decode_attention() -> Any:
    from vlmeff_kernels import decode_attention

    return decode_attention


def _gather() -> Any:
    from vlmeff_kernels import gather

    return gather


def _linear_fp8() -> Any:
    from vlmeff_kernels import linear_fp8

    return linear_fp8


def _linear_int4() -> Any:
    from vlmeff_kernels import linear_int4

    return linear_int4


def _linear_int8() -> Any:
    from vlmeff_kernels import linear_int8

    return linear_int8


def _linear_wna16() -> Any:
    from vlmeff_kernels import linear_wna16

    return linear_wna16


def _producers() -> Any:
    from vlmeff_kernels import producers

    return producers


def _quantize() -> Any:
    from vlmeff_kernels import quantize

    return quantize


def _row_logsumexp() -> Any:
    from vlmeff_kernels import row_logsumexp

    return row_logsumexp


def _torch_linear() -> Any:
    from vlmeff_kernels import torch_linear

    return torch_linear


_BACK_ENDS: dict[str, dict[str, BackEnd]] = {
    "act_quant_fp8": {"triton": _Later(_quantize, "ACT_QUANT_FP8")},
    "act_quant_int8": {
        "cuda": _Later(_cuda_ops, "ACT_QUANT_INT8", triton=False),
        "triton": _Later(_quantize, "ACT_QUANT_INT8"),
    },
    "act_quant_uint": {"triton": _Later(_quantize, "ACT_QUANT_UINT")},
    "attention_column_mass": {"triton": _Later(_column_mass, "COLUMN_MASS")},
    "gather_kv": {
        "cuda": _Later(_cuda_ops, "GATHER_KV", triton=False),
        "triton": _Later(_gather, "GATHER_KV"),
    },
    "gather_tokens": {"triton": _Later(_gather, "GATHER_TOKENS")},
    "gelu_quant_int8": {"triton": _Later(_producers, "GELU_QUANT_INT8")},
    "linear_w4a8_int8": {"triton": _Later(_linear_int4, "W4A8")},
    "linear_w8a8_fp8": {
        "triton": _Later(_linear_fp8, "W8A8_FP8"),
        "torch": _Later(_torch_linear, "FP8_LINEAR", triton=False),
    },
    "linear_w8a8_int8": {
        "triton": _Later(_linear_int8, "W8A8_INT8"),
        "torch": _Later(_torch_linear, "INT8_LINEAR", triton=False),
    },
    "linear_wna16": {"triton": _Later(_linear_wna16, "WNA16")},
    "linear_wnan_int": {"triton": _Later(_linear_int4, "WNAN")},
    "norm_quant_int8": {"triton": _Later(_producers, "NORM_QUANT_INT8")},
    "quantized_decode_attention": {"triton": _Later(_decode_attention, "DECODE_ATTENTION")},
    "row_logsumexp": {"triton": _Later(_row_logsumexp, "ROW_LOGSUMEXP")},
}
OPS: Mapping[str, Mapping[str, BackEnd]] = MappingProxyType(
    {op: MappingProxyType(back_ends) for op, back_ends in _BACK_ENDS.items()}
)
"""Op name -> back-end name -> implementation."""
