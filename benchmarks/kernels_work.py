"""How much work an operation is, counted and not measured, and the least time it can take on a device.

Bytes are those of the inputs, each read once, and of the outputs; what a given implementation reads twice or spills is
its own affair. FLOPs are two for each multiplication with its addition. Exponentials are counted apart: an SM computes
16 a clock, a small share of its matrix throughput, and at long sequences they are what attention statistics wait for.

Letters: B batch, H query heads, K key heads, W query rows, S keys, D head dim, T steps; M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXP_PER_CLOCK = 16  # of one SM


@dataclass(frozen=True)
class Work:
    """What one call must at least read and write, multiply and exponentiate."""

    bytes: int
    flops: int = 0
    arithmetic: str = "bf16"
    """Which ceiling the FLOPs have: "bf16", "int8" or "fp8"."""
    exps: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: copied bytes, FLOPs of a large product and exponentials, each a second."""

    copy: float
    products: dict[str, float]
    exp: float

    def floor(self, work: Work) -> tuple[float, str]:
        """(microseconds, what they are spent on): the largest of the three times, as all go on at once."""
        times = {
            "memory": work.bytes / self.copy,
            "products": work.flops / self.products.get(work.arithmetic, self.products["bf16"]) if work.flops else 0.0,
            "exp": work.exps / self.exp,
        }
        bound = max(times, key=times.__getitem__)
        return 1e6 * times[bound], bound

    @classmethod
    def of(cls, report: dict[str, Any]) -> Ceilings:
        """From a result file."""
        return cls(report["copy_bytes_s"], report["products_flops_s"], report["exp_s"])


def pairs(rows: int, keys: int, *, causal: bool) -> int:
    """Query-key pairs that count, the rows right-aligned with the keys."""
    return rows * keys - (rows * (rows - 1) // 2 if causal else 0)


def attention_statistics(
    *, heads: int, kv_heads: int, rows: int, keys: int, dim: int, itemsize: int, out: int, causal: bool, passes: int,
    segments: tuple[int, ...] = (), batch: int = 1,
) -> Work:  # fmt: skip
    """Log-sum-exp (one pass) or column mass (two, one where the normalisers are given); ``out`` values in float32."""
    counted = sum(n * n for n in segments) if segments else pairs(rows, keys, causal=causal)
    read = batch * dim * itemsize * (heads * rows + kv_heads * keys)
    counted *= batch * heads * passes
    return Work(read + 4 * out, 2 * dim * counted, exps=counted)


def gather(*, entries: int, width: int, itemsize: int, index: int) -> Work:
    """``entries`` rows of ``width`` read and written, and ``index`` places of eight bytes."""
    return Work(2 * entries * width * itemsize + 8 * index)


def dct(*, grid: tuple[int, int], new: tuple[int, int], channels: int, itemsize: int, one_product: bool) -> Work:
    """Two products, A_h X and then A_w; the middle is written and read unless one product does both."""
    (h, w), (new_h, new_w) = grid, new
    values = h * w + new_h * new_w + (0 if one_product else 2 * new_h * w)
    return Work(values * channels * itemsize, 2 * channels * (new_h * h * w + new_h * new_w * w), "bf16")


def act_quant(m: int, k: int, *, itemsize: int = 2, vectors: int = 0, outputs: int = 1) -> Work:
    """Read [M, K], write a code for each value and ``outputs`` numbers of four bytes for each token; ``vectors`` more
    inputs of K float32 values."""
    return Work(m * k * (itemsize + 1) + 4 * m * outputs + 4 * k * vectors)


def linear(
    m: int, n: int, k: int, *, x_bytes: float, w_bytes: float, y_bytes: int = 2, scales: int = 0, arithmetic: str
) -> Work:
    """y = x W^T; ``x_bytes`` and ``w_bytes`` of one value (0.5 for packed codes), ``scales`` bytes in all."""
    return Work(int(m * k * x_bytes + n * k * w_bytes + m * n * y_bytes) + scales, 2 * m * n * k, arithmetic)


def decode_attention(
    *, batch: int, heads: int, keys: int, dim: int, rows: int, stored_bytes: int, itemsize: int
) -> Work:
    """One step over stored keys and values: they are read once, whatever their format."""
    return Work(stored_bytes + 2 * batch * heads * rows * dim * itemsize, 4 * batch * heads * rows * keys * dim,
                exps=batch * heads * rows * keys)  # fmt: skip
