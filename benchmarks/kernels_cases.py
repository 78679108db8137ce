"""What ``kernels.py`` measures: one call of an op, the work in it, and other ways to the same numbers.

The linear layers and quantizers are in ``kernels_linear_cases.py``. Inputs are random (zeros run faster) and seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kernels_work as work
import torch
import torch.nn.functional as F
from kernels_work import Work
from torch import Tensor

from vlmeff import ops

Run = Callable[[], Any]
SCORES_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}  # relative, Frobenius
PLAIN = "plain PyTorch"  # the expression that a user would write
PLAIN_LIMIT = 20e9  # bytes of attention map above which it is not written out


@dataclass
class Call:
    """One call of an op, ready to run."""

    arguments: dict[str, Any]
    """Of the public function, by keyword."""
    peers: dict[str, Run] = field(default_factory=dict)
    """Others that compute the same: a kernel must be faster than each."""
    yardsticks: dict[str, Run] = field(default_factory=dict)
    """Others that compute something else, to compare with: goals refer to them, acceptance does not."""
    accurate: Run | None = None
    """The numbers that the back ends are checked against, where not those of the reference; called with the reference
    chosen."""


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    dtype: str
    sizes: Mapping[str, Any]
    work: Work
    make: Callable[[torch.device], Call]
    tolerance: float = 0.0
    """Relative Frobenius error against the accurate numbers. 0: equal bit by bit."""
    codes_off: float = 0.0
    """Share of integers that may be off by one."""
    compiled: bool = True
    """Whether torch.compile of the reference ends in reasonable time (long loops are unrolled)."""

    @property
    def key(self) -> str:
        return f"{self.op} | {self.name}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generator(device: torch.device, seed: int = 0) -> torch.Generator | None:
    """Seeded; None for tensors without values."""
    return None if device.type == "meta" else torch.Generator(device=device).manual_seed(seed)


def random(device: torch.device, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(device, seed), device=device, dtype=dtype)


def in_float64(op: str, arguments: dict[str, Any]) -> Run:
    """The op on the same numbers, which half precision has rounded already, with q, k and x in float64."""

    def run() -> Any:
        wide = {name: arguments[name].double() for name in ("q", "k", "x") if name in arguments}
        return getattr(ops, op)(**{**arguments, **wide})

    return run


# ---- statistics of attention


def naive_attention(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """The whole map [B, H, W, S]: keys repeated for the heads, a product, a mask, a softmax in float32."""
    rows, keys = q.shape[2], k.shape[2]
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits


def naive_mass(q: Tensor, k: Tensor, scale: float, causal: bool, reduce: str) -> Tensor:
    mass = naive_attention(q, k, scale, causal).softmax(-1, dtype=torch.float32).sum(-2)
    if reduce == "mean":
        return mass.mean(1)
    return mass if reduce == "none" else mass.unflatten(1, (k.shape[1], -1)).mean(2)


def attention_case(
    name: str, *, heads: int, kv_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype, causal: bool,
    reduce: str | None = "none", lse: bool = False, segments: tuple[int, ...] = (), batch: int = 1,
    compiled: bool = False,
) -> Case:  # fmt: skip
    """``reduce`` None: the log-sum-exp alone. ``segments``: packed, each attends to itself."""
    op = "row_logsumexp" if reduce is None else "attention_column_mass"
    out = batch * {None: heads * rows, "none": heads * keys, "group": kv_heads * keys, "mean": keys}[reduce]
    counted = work.attention_statistics(
        heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=dim, itemsize=dtype.itemsize, out=out, causal=causal,
        passes=1 if lse or reduce is None else 2, segments=segments, batch=batch,
    )  # fmt: skip
    map_bytes = batch * heads * rows * keys * (4 + dtype.itemsize)

    def make(device: torch.device) -> Call:
        q, k = (random(device, batch, h, n, dim, dtype=dtype, seed=h + n) for h, n in ((heads, rows), (kv_heads, keys)))
        scale = dim**-0.5
        arguments: dict[str, Any] = {"q": q, "k": k, "scale": scale}
        yardsticks = {"SDPA forward": lambda: F.scaled_dot_product_attention(
            q, k, k, is_causal=causal and rows == keys, enable_gqa=heads != kv_heads)}  # fmt: skip
        if segments:
            bounds = torch.tensor([0, *segments]).cumsum(0).int().to(device)
            packed = {name: arguments[name][0].transpose(0, 1).contiguous() for name in ("q", "k")}
            if lse and q.is_meta:
                arguments["lse"] = q.new_empty((heads, rows), dtype=torch.float32)
            elif lse:
                parts = zip(q.split(segments, 2), k.split(segments, 2), strict=True)
                with ops.backend("reference"):
                    each = [ops.row_logsumexp(part, keys, scale=scale)[0] for part, keys in parts]
                arguments["lse"] = torch.cat(each, 1)
            arguments |= {**packed, "cu_seqlens": bounds, "reduce": reduce}
            return Call(arguments, accurate=in_float64(op, arguments))
        arguments["causal"] = causal
        peers: dict[str, Run] = {}
        if lse and q.is_meta:
            arguments["lse"] = q.new_empty((batch, heads, rows), dtype=torch.float32)
        elif lse:
            with ops.backend("reference"):
                arguments["lse"] = ops.row_logsumexp(**arguments)
        if map_bytes < PLAIN_LIMIT:
            peers[PLAIN] = (
                (lambda: naive_attention(q, k, scale, causal).float().logsumexp(-1)) if reduce is None
                else lambda: naive_mass(q, k, scale, causal, str(reduce))
            )  # fmt: skip
        if reduce is not None:
            arguments["reduce"] = reduce
        return Call(arguments, peers, yardsticks, in_float64(op, arguments))

    sizes = {"heads": heads, "kv_heads": kv_heads, "rows": rows, "keys": keys, "dim": dim, "causal": causal,
             "lse_given": lse, "batch": batch}  # fmt: skip
    return Case(op, name, short(dtype), sizes, counted, make, SCORES_TOLERANCE[dtype], compiled=compiled)


def text_rows_case(name: str, *, heads: int, kv_heads: int, keys: int, vision: int, dim: int, dtype: torch.dtype,
                   compiled: bool = False) -> Case:  # fmt: skip
    """The visual tokens first, the text behind them."""
    text = keys - vision
    passes = [(text, keys), (text, text), (text, text), (text, vision)]
    counted = heads * sum(a * b for a, b in passes)
    counted_work = Work(
        dim * dtype.itemsize * (heads * text + kv_heads * keys) + 4 * vision, 2 * dim * counted, exps=counted
    )

    def make(device: torch.device) -> Call:
        q = random(device, 1, heads, text, dim, dtype=dtype, seed=1)
        k = random(device, 1, kv_heads, keys, dim, dtype=dtype, seed=2)
        rows, columns = torch.arange(vision, keys, device=device)[None], torch.arange(vision, device=device)[None]
        scale = dim**-0.5

        def plain() -> Tensor:
            a = naive_attention(q, k, scale, True).softmax(-1, dtype=torch.float32)
            among = a[..., vision:]
            weight = among.sum(-1) + among.sum(-2) - among.diagonal(dim1=-2, dim2=-1)
            return torch.einsum("bht,bhtv->bv", weight, a[..., :vision])

        arguments = {"q": q, "k": k, "text": rows, "vision": columns, "scale": scale}
        return Call(arguments, {PLAIN: plain}, accurate=in_float64("text_to_vision_scores", arguments))

    sizes = {"heads": heads, "kv_heads": kv_heads, "text": text, "vision": vision, "dim": dim}
    return Case("text_to_vision_scores", name, short(dtype), sizes, counted_work, make, SCORES_TOLERANCE[dtype],
                compiled=compiled)  # fmt: skip


def decode_case(
    name: str, *, batch: int, heads: int, kv_heads: int, keys: int, rest: int, dim: int, bits: int, dtype: torch.dtype
) -> Case:
    """A step of a cache whose last ``rest`` tokens are in full precision."""
    quantized, group = keys - rest, 32
    # Codes, then scale and zero of 16 bits for a group of keys' tokens and of values' channels.
    per_head = 2 * (quantized * dim * bits // 8 + 2 * 2 * quantized * dim // group + rest * dim * dtype.itemsize)
    counted = work.decode_attention(batch=batch, heads=heads, keys=keys, dim=dim, rows=1,
                                    stored_bytes=batch * kv_heads * per_head, itemsize=dtype.itemsize)  # fmt: skip

    def make(device: torch.device) -> Call:
        from kvcache.quantization import quantize_keys, quantize_values
        from vlmeff.ops.decode_attention import StoredStates

        q = random(device, batch, heads, 1, dim, dtype=dtype)
        k, v = (random(device, batch, kv_heads, keys, dim, dtype=dtype, seed=s) for s in (1, 2))
        stored = [quantize(t[:, :, :quantized], bits=bits, group=group)
                  for t, quantize in ((k, quantize_keys), (v, quantize_values))]  # fmt: skip
        ends = [t[:, :, quantized:].contiguous() for t in (k, v)]
        states = [StoredStates(*p.tensors(), end, bits, group) for p, end in zip(stored, ends, strict=True)]
        scale = dim**-0.5

        def plain() -> Tensor:
            whole = [torch.cat([p.dequantize(), end], 2) for p, end in zip(stored, ends, strict=True)]
            return F.scaled_dot_product_attention(q, *whole, scale=scale, enable_gqa=heads != kv_heads)

        def unquantized() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=heads != kv_heads)

        arguments = {"q": q, "keys": states[0], "values": states[1], "scale": scale}
        return Call(arguments, {PLAIN: plain}, {"SDPA over an unquantized cache": unquantized})

    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "keys": keys, "rest": rest, "dim": dim, "bits": bits}
    # Against the reference in the dtype of q, which rounds once.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-9
    return Case("quantized_decode_attention", name, short(dtype), sizes, counted, make, tolerance)


# ---- moving rows


def ascending(device: torch.device, tokens: int, kept: int, *shape: int, seed: int = 0) -> Tensor:
    """[*shape, kept] distinct places in ascending order."""
    order = torch.rand(*shape, tokens, generator=generator(device, seed), device=device).argsort(-1)
    return order[..., :kept].sort(-1).values


def gather_kv_case(
    name: str, *, layers: int, kv_heads: int, tokens: int, kept: int, dim: int, dtype: torch.dtype, batch: int = 1,
    per_head: bool = False, compiled: bool = True,
) -> Case:  # fmt: skip
    entries, choices = 2 * layers * batch * kv_heads * kept, layers * batch * (kv_heads if per_head else 1) * kept

    def make(device: torch.device) -> Call:
        shape = (batch, kv_heads, tokens, dim)
        keys, values = ([random(device, *shape, dtype=dtype, seed=s + 2 * i) for i in range(layers)] for s in (0, 1))
        rows = (batch, kv_heads) if per_head else (batch,)
        index = [ascending(device, tokens, kept, *rows, seed=i) for i in range(layers)]
        wide = [(i if per_head else i[:, None])[..., None].expand(-1, kv_heads, -1, dim) for i in index]

        def gathered() -> Any:
            return [(k.gather(2, i), v.gather(2, i)) for k, v, i in zip(keys, values, wide, strict=True)]

        def selected() -> Any:
            parts = zip(keys, values, index, strict=True)
            return [(k.index_select(2, i[0]), v.index_select(2, i[0])) for k, v, i in parts]

        peers = {PLAIN if per_head or batch > 1 else "torch.gather": gathered}
        if not per_head and batch == 1:
            peers[PLAIN] = selected
        return Call({"keys": keys, "values": values, "index": index}, peers)

    sizes = {"layers": layers, "kv_heads": kv_heads, "tokens": tokens, "kept": kept, "dim": dim, "per_head": per_head,
             "batch": batch}  # fmt: skip
    counted = work.gather(entries=entries, width=dim, itemsize=dtype.itemsize, index=choices)
    return Case("gather_kv", name, short(dtype), sizes, counted, make, compiled=compiled)


def gather_tokens_case(name: str, *, batch: int, tokens: int, kept: int, width: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Call:
        x, index = random(device, batch, tokens, width, dtype=dtype), ascending(device, tokens, kept, batch)
        wide = index[..., None].expand(-1, -1, width)
        peers: dict[str, Run] = {PLAIN: lambda: x.gather(1, wide)}
        if batch == 1:
            peers["index_select"] = lambda: x.index_select(1, index[0])
        return Call({"x": x, "index": index}, peers)

    counted = work.gather(entries=batch * kept, width=width, itemsize=dtype.itemsize, index=batch * kept)
    sizes = {"batch": batch, "tokens": tokens, "kept": kept, "width": width}
    return Case("gather_tokens", name, short(dtype), sizes, counted, make)


def top_case(name: str, *, batch: int, n: int, k: int, rounded: bool = False) -> Case:
    """``rounded``: scores of bfloat16, so that there are equals at the edge."""

    def make(device: torch.device) -> Call:
        scores = random(device, batch, n, dtype=torch.bfloat16 if rounded else torch.float32).float()

        def plain() -> Tensor:
            return scores.argsort(dim=-1, descending=True, stable=True)[..., :k].sort(-1).values

        any_of_equals: dict[str, Run] = {
            "torch.topk, any of equal scores": lambda: scores.topk(k).indices.sort(-1).values
        }
        return Call({"scores": scores, "k": k}, {PLAIN: plain}, any_of_equals)

    return Case("top_indices", name, "float32", {"batch": batch, "n": n, "k": k}, Work(batch * (4 * n + 8 * k)), make)


# ---- resampling, densities


def density_case(name: str, *, steps: int, tokens: int, values: int) -> Case:
    def make(device: torch.device) -> Call:
        names = ("x", "mean_p", "log_std_p", "mean_q", "log_std_q")
        tensors = {n: random(device, steps, tokens, values, dtype=torch.float32, seed=i) for i, n in enumerate(names)}
        for n in ("log_std_p", "log_std_q"):
            tensors[n] *= 0.1

        def plain() -> Tensor:
            x, mean_p, log_std_p, mean_q, log_std_q = tensors.values()
            p, q = (torch.distributions.Normal(m, s.exp(), validate_args=False)
                    for m, s in ((mean_p, log_std_p), (mean_q, log_std_q)))  # fmt: skip
            return (p.log_prob(x) - q.log_prob(x)).sum((0, 2))

        return Call(tensors, {PLAIN: plain})

    counted = Work(4 * 5 * steps * tokens * values + 8 * tokens, exps=2 * steps * tokens * values)
    sizes = {"steps": steps, "tokens": tokens, "values": values}
    return Case("gaussian_path_log_ratio", name, "float32", sizes, counted, make)


def dct_case(name: str, *, grid: tuple[int, int], new: tuple[int, int], channels: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Call:
        x = random(device, 1, grid[0] * grid[1], channels, dtype=dtype)

        def low_pass(n: int, new_n: int) -> Tensor:
            places, waves = torch.arange(n) + 0.5, torch.arange(new_n)[:, None]
            wide = torch.cos(math.pi / n * places * waves) * math.sqrt(2 / n)
            narrow = torch.cos(math.pi / new_n * (torch.arange(new_n) + 0.5) * waves) * math.sqrt(2 / new_n)
            wide[0], narrow[0] = math.sqrt(1 / n), math.sqrt(1 / new_n)
            return (narrow.T @ wide).to(device)

        a, b = low_pass(grid[0], new[0]), low_pass(grid[1], new[1])
        plain: Run = lambda: torch.einsum(  # noqa: E731
            "hH,bHWc,wW->bhwc", a, x.float().unflatten(1, grid), b).flatten(1, 2).to(dtype)  # fmt: skip
        arguments = {"x": x, "grid": grid, "new_grid": new}
        return Call(arguments, {PLAIN: plain}, accurate=in_float64("dct_resample", arguments))

    # One product with the Kronecker matrix up to 1024 tokens; the reference always takes two.
    counted = work.dct(grid=grid, new=new, channels=channels, itemsize=dtype.itemsize,
                       one_product=grid[0] * grid[1] <= 1024)  # fmt: skip
    sizes = {"grid": list(grid), "new_grid": list(new), "channels": channels}
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    return Case("dct_resample", name, short(dtype), sizes, counted, make, tolerance)
