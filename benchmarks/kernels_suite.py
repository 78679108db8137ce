"""The sizes that ``kernels.py`` measures, of models that people run, and small ones of the same kinds for a CPU.

Wan2.1 14B makes 32,760 tokens of 81 frames at 480 x 832. LLaVA-1.5-7B: 32 heads of 128, 576 visual tokens and some
text. Qwen2.5-VL-7B: 28 query and 4 key heads of 128; its vision tower 16 of 80. CLIP-L: 16 of 64, 577 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from kernels_cases import (
    Case,
    attention_case,
    dct_case,
    decode_case,
    density_case,
    gather_kv_case,
    gather_tokens_case,
    text_rows_case,
    top_case,
)
from kernels_linear_cases import (
    gelu_case,
    norm_case,
    quantizer_case,
    w4a8_case,
    w8a8_case,
    wna16_case,
    wnan_case,
)

BF16, F32 = torch.bfloat16, torch.float32
LLAVA: dict[str, Any] = {"heads": 32, "kv_heads": 32, "dim": 128}
QWEN: dict[str, Any] = {"heads": 28, "kv_heads": 4, "dim": 128}
QWEN_VISION: dict[str, Any] = {"heads": 16, "kv_heads": 16, "dim": 80}
CLIP: dict[str, Any] = {"heads": 16, "kv_heads": 16, "dim": 64}
VIDEO = 32760  # tokens of Wan2.1 at 480 x 832 and 81 frames


def on_gpu() -> list[Case]:
    """Sizes of the specification; the last of each op are the longest to run."""
    bf16: dict[str, Any] = {"dtype": BF16}
    window: dict[str, Any] = {"rows": 64, "causal": True, "dtype": BF16}
    mass = [
        attention_case("LLaVA, last 64 queries of 640", **LLAVA, **window, keys=640, reduce="group", compiled=True),
        attention_case("LLaVA, all 640 queries", **LLAVA, **bf16, rows=640, keys=640, causal=True, reduce="mean"),
        attention_case("CLIP-L layer", **CLIP, **bf16, rows=577, keys=577, causal=False, reduce="mean"),
        attention_case(
            "CLIP-L layer, lse given", **CLIP, **bf16, rows=577, keys=577, causal=False, reduce="mean", lse=True
        ),
        attention_case("Qwen, last 64 queries of 16384", **QWEN, **window, keys=16384, reduce="group"),
        attention_case(
            "Qwen, last 64 queries of 16384, lse given", **QWEN, **window, keys=16384, reduce="group", lse=True
        ),
        attention_case("Qwen, last query of 16384", **QWEN, **(window | {"rows": 1}), keys=16384, reduce="group"),
        attention_case(
            "Qwen vision layer, 4096 patches", **QWEN_VISION, **bf16, rows=4096, keys=4096, causal=False, reduce="mean"
        ),
        attention_case(
            "Qwen vision layer, 3 pictures packed",
            **QWEN_VISION,
            **bf16,
            rows=7168,
            keys=7168,
            causal=False,
            reduce="mean",
            segments=(4096, 2048, 1024),
        ),
        attention_case(
            "Qwen vision layer, 3 pictures packed, lse given",
            **QWEN_VISION,
            **bf16,
            rows=7168,
            keys=7168,
            causal=False,
            reduce="mean",
            segments=(4096, 2048, 1024),
            lse=True,
        ),
        attention_case(
            "Qwen vision layer, 65536 patches, lse given",
            **QWEN_VISION,
            **bf16,
            rows=65536,
            keys=65536,
            causal=False,
            lse=True,
        ),
        attention_case("Qwen, all 16384 queries", **QWEN, **bf16, rows=16384, keys=16384, causal=True, reduce="mean"),
        attention_case(
            "Qwen, all 16384 queries, lse given",
            **QWEN,
            **bf16,
            rows=16384,
            keys=16384,
            causal=True,
            reduce="mean",
            lse=True,
        ),
    ]
    lse: dict[str, Any] = {"reduce": None}
    sums = [
        attention_case("LLaVA, last 64 queries of 640", **LLAVA, **window, **lse, keys=640, compiled=True),
        attention_case("Qwen, last 64 queries of 16384", **QWEN, **window, **lse, keys=16384),
        attention_case("Qwen, last query of 16384", **QWEN, **(window | {"rows": 1}), **lse, keys=16384),
        attention_case(
            "Qwen vision layer, 4096 patches", **QWEN_VISION, **bf16, **lse, rows=4096, keys=4096, causal=False
        ),
        attention_case("Qwen, all 16384 queries", **QWEN, **bf16, **lse, rows=16384, keys=16384, causal=True),
    ]
    moved = [
        gather_kv_case("LLaVA, 32 layers, half of 640", layers=32, kv_heads=32, tokens=640, kept=320, dim=128, **bf16),
        gather_kv_case(
            "Qwen, 28 layers, a fifth of 16384", layers=28, kv_heads=4, tokens=16384, kept=3277, dim=128, **bf16
        ),
        gather_kv_case(
            "Qwen, a fifth of 16384, heads apart",
            layers=28,
            kv_heads=4,
            tokens=16384,
            kept=3277,
            dim=128,
            per_head=True,
            compiled=False,
            **bf16,
        ),
        gather_kv_case(
            "Qwen, 4 rows of 4096",
            layers=28,
            kv_heads=4,
            tokens=4096,
            kept=1024,
            dim=128,
            batch=4,
            per_head=True,
            compiled=False,
            **bf16,
        ),
        gather_tokens_case("LLaVA-NeXT, 640 of 2880", batch=1, tokens=2880, kept=640, width=4096, **bf16),
        gather_tokens_case("video, 4 x 4096 of 16384", batch=4, tokens=16384, kept=4096, width=3584, **bf16),
        top_case("640 of 2880", batch=1, n=2880, k=640),
        top_case("28 x 3277 of 16384", batch=28, n=16384, k=3277),
        dct_case("24 x 24 to 12 x 12", grid=(24, 24), new=(12, 12), channels=4096, **bf16),
        dct_case("128 x 128 to 64 x 64", grid=(128, 128), new=(64, 64), channels=3584, **bf16),
        density_case("100 steps of 256 x 16", steps=100, tokens=256, values=16),
        text_rows_case("LLaVA, 64 text tokens", **LLAVA, keys=640, vision=576, **bf16),
        text_rows_case("Qwen, 256 text tokens", **QWEN, keys=4352, vision=4096, **bf16),
    ]
    quantized = [
        quantizer_case(
            op, f"Wan-14B, {VIDEO} x {k}{', smooth' if smooth else ''}", VIDEO, k, BF16, bits=bits, smooth=smooth
        )
        for op, bits in (("act_quant_int8", 8), ("act_quant_fp8", 8), ("act_quant_uint", 4))
        for k, smooth in ((5120, False), (13824, False), (5120, True))
        if not smooth or op == "act_quant_int8"
    ] + [
        quantizer_case("act_quant_int8", "256 x 4096", 256, 4096, BF16),
        quantizer_case("act_quant_int8", f"Wan-14B, {VIDEO} x 5120, groups of 128", VIDEO, 5120, BF16, group=128),
        norm_case(f"Wan-14B, {VIDEO} x 5120", VIDEO, 5120, BF16),
        norm_case("256 x 4096", 256, 4096, BF16),
        gelu_case(f"Wan-14B, {VIDEO} x 13824", VIDEO, 13824, BF16, approximate="tanh"),
        gelu_case("256 x 4096", 256, 4096, BF16, approximate="none"),
    ]
    products = [
        *(
            w8a8_case(kind, f"Wan-14B, {m} x {n} x {k}", m, n, k, BF16)
            for kind in ("int8", "fp8")
            for m, n, k in (
                (VIDEO, 5120, 5120),
                (VIDEO, 13824, 5120),
                (VIDEO, 5120, 13824),
                (4096, 5120, 5120),
                (256, 5120, 5120),
                (64, 5120, 5120),
                (16, 5120, 5120),
            )
        ),
        *(
            w4a8_case(f"Wan-14B, {m} x {n} x {k}{f', groups of {group}' if group else ''}", m, n, k, BF16, group=group)
            for m, n, k, group in (
                (VIDEO, 5120, 5120, 0),
                (VIDEO, 5120, 5120, 128),
                (256, 5120, 5120, 0),
                (64, 5120, 5120, 0),
            )
        ),
        *(
            wnan_case(f"Wan-14B, {m} x {n} x {k}", m, n, k, BF16)
            for m, n, k in ((VIDEO, 5120, 5120), (VIDEO, 13824, 5120), (256, 5120, 5120), (64, 5120, 5120))
        ),
        *(
            wna16_case(f"{m} x {n} x {k}, {bits} bits", m, n, k, BF16, bits=bits)
            for m, n, k, bits in (
                (1, 4096, 11008, 4),
                (16, 4096, 11008, 4),
                (64, 4096, 11008, 4),
                (1024, 4096, 11008, 4),
                (1, 4096, 11008, 8),
                (16, 4096, 11008, 8),
                (64, 4096, 11008, 8),
                (1024, 4096, 11008, 8),
            )
        ),
    ]
    stored = [
        decode_case(f"Qwen, {batch} x {keys}, {bits} bits", batch=batch, keys=keys, rest=128, bits=bits, **QWEN, **bf16)
        for batch, keys in ((1, 3328), (1, 16384), (8, 16384))
        for bits in (8, 4)
    ]
    stored += [
        decode_case(f"LLaVA, 4 x 640, {bits} bits", batch=4, keys=640, rest=128, bits=bits, **LLAVA, **bf16)
        for bits in (8, 4)
    ]
    return [*mass, *sums, *moved, *quantized, *products, *stored]


def on_cpu() -> list[Case]:
    """float32, one or two sizes of each op: minutes on one core."""
    f32: dict[str, Any] = {"dtype": F32}
    small: dict[str, Any] = {"heads": 14, "kv_heads": 2, "dim": 64, "dtype": F32}
    window: dict[str, Any] = {"rows": 32, "causal": True}
    cases = [
        attention_case("last 32 queries of 640", **small, **window, keys=640, reduce="group", compiled=True),
        attention_case("last 32 queries of 4096", **small, **window, keys=4096, reduce="group", compiled=True),
        attention_case("all 640 queries", **small, rows=640, keys=640, causal=True, reduce="mean", compiled=True),
        attention_case("all 2048 queries", **small, rows=2048, keys=2048, causal=True, reduce="mean"),
        attention_case("CLIP-L layer", **CLIP, **f32, rows=577, keys=577, causal=False, reduce="mean", compiled=True),
        attention_case(
            "CLIP-L layer, lse given", **CLIP, **f32, rows=577, keys=577, causal=False, reduce="mean", lse=True
        ),
        attention_case("last 32 queries of 4096", **small, **window, keys=4096, reduce=None, compiled=True),
        attention_case("all 640 queries", **small, rows=640, keys=640, causal=True, reduce=None, compiled=True),
        text_rows_case("32 text tokens behind 576", **small, keys=608, vision=576),
        gather_kv_case("4 layers, half of 640", layers=4, kv_heads=8, tokens=640, kept=320, dim=64, **f32),
        gather_kv_case(
            "4 layers, a fifth of 4096, heads apart",
            layers=4,
            kv_heads=4,
            tokens=4096,
            kept=819,
            dim=64,
            per_head=True,
            **f32,
        ),
        gather_tokens_case("576 of 2880", batch=1, tokens=2880, kept=576, width=1024, **f32),
        gather_tokens_case("4 x 192 of 576", batch=4, tokens=576, kept=192, width=1024, **f32),
        top_case("192 of 576", batch=1, n=576, k=192),
        top_case("640 of 2880", batch=1, n=2880, k=640),
        top_case("640 of 2880, equals at the edge", batch=1, n=2880, k=640, rounded=True),
        top_case("32 x 800 of 4096, equals at the edge", batch=32, n=4096, k=800, rounded=True),
        dct_case("24 x 24 to 12 x 12", grid=(24, 24), new=(12, 12), channels=1024, **f32),
        dct_case("64 x 64 to 32 x 32", grid=(64, 64), new=(32, 32), channels=256, **f32),
        density_case("100 steps of 64 x 16", steps=100, tokens=64, values=16),
        *(
            quantizer_case(op, "512 x 1536", 512, 1536, F32, bits=bits)
            for op, bits in (("act_quant_int8", 8), ("act_quant_fp8", 8), ("act_quant_uint", 4))
        ),
        norm_case("512 x 1536", 512, 1536, F32),
        gelu_case("512 x 1536", 512, 1536, F32, approximate="tanh"),
        *(w8a8_case(kind, f"{m} x 1536 x 1536", m, 1536, 1536, F32) for kind in ("int8", "fp8") for m in (1, 256)),
        w4a8_case("256 x 1536 x 1536", 256, 1536, 1536, F32),
        w4a8_case("256 x 1536 x 1536, groups of 128", 256, 1536, 1536, F32, group=128),
        wnan_case("256 x 1536 x 1536", 256, 1536, 1536, F32),
        wna16_case("1 x 1536 x 1536, 4 bits", 1, 1536, 1536, F32),
        wna16_case("256 x 1536 x 1536, 4 bits", 256, 1536, 1536, F32),
        wna16_case("256 x 1536 x 1536, 8 bits", 256, 1536, 1536, F32, bits=8, group=0),
    ]
    stored = [
        decode_case(f"2 x 2048, {bits} bits", batch=2, keys=2048, rest=128, bits=bits, **small) for bits in (8, 4)
    ]
    return [*cases, *stored]


def small() -> list[Case]:
    """Odd sizes, a moment of work each: for tools that slow a kernel down a hundredfold."""
    bf16: dict[str, Any] = {"dtype": BF16}
    grouped: dict[str, Any] = {"heads": 4, "kv_heads": 2, "dim": 80, "dtype": BF16}
    windows: list[tuple[str, dict[str, Any]]] = [
        ("all of 150", {"rows": 150, "keys": 150, "causal": True}),
        ("last 37 of 333", {"rows": 37, "keys": 333, "causal": True}),
        ("one of 333", {"rows": 1, "keys": 333, "causal": True}),
        ("not causal", {"rows": 65, "keys": 130, "causal": False}),
    ]
    sizes = [(1, 40, 160), (37, 70, 200), (130, 136, 392)]
    return [
        *(
            attention_case(name, **grouped, **rows, reduce=reduce)
            for name, rows in windows
            for reduce in ("mean", None)
        ),
        attention_case("packed", **grouped, rows=120, keys=120, causal=False, segments=(70, 1, 49)),
        gather_kv_case("3 layers", layers=3, kv_heads=2, tokens=50, kept=23, dim=72, batch=2, **bf16),
        gather_kv_case("heads apart", layers=3, kv_heads=2, tokens=50, kept=23, dim=128, per_head=True, **bf16),
        gather_tokens_case("23 of 50", batch=2, tokens=50, kept=23, width=333, **bf16),
        *(
            quantizer_case(op, f"{m} x {k}", m, k, BF16, bits=bits)
            for op, bits in (("act_quant_int8", 8), ("act_quant_fp8", 8), ("act_quant_uint", 4))
            for m, _, k in sizes
        ),
        *(norm_case(f"{m} x {k}", m, k, BF16) for m, _, k in sizes),
        *(gelu_case(f"{m} x {k}", m, k, BF16, approximate="tanh") for m, _, k in sizes),
        *(w8a8_case(kind, f"{m} x {n} x {k}", m, n, k, BF16) for kind in ("int8", "fp8") for m, n, k in sizes),
        *(w4a8_case(f"{m} x {n} x {k}", m, n, k, BF16, group=group) for m, n, k in sizes for group in (0, 32)),
        *(wnan_case(f"{m} x {n} x {k}", m, n, k, BF16) for m, n, k in sizes),
        *(wna16_case(f"{m} x {n} x {k}", m, n, k, BF16, group=32) for m, n, k in sizes),
        *(
            decode_case(f"{bits} bits", batch=2, keys=177, rest=17, bits=bits, **(grouped | {"dim": 64}))
            for bits in (8, 4)
        ),
    ]
