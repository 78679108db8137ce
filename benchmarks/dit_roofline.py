"""Tables of ``docs/diffusion.md`` that are computed, not measured: models, schemes, and what faster layers can give.

    python benchmarks/dit_roofline.py

Models are built on the meta device from their published sizes; nothing is downloaded or run.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from vlmeff.diffusion.cost import forecast
from vlmeff.diffusion.families import family_of
from vlmeff.diffusion.rules import choose_layers, layer_report
from vlmeff.diffusion.schemes import SCHEMES, SUMMARIES, LayerSpec

GIB = 2**30
WAN_1B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
COGVIDEOX15_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 96,
    "sample_width": 170,
    "sample_frames": 81,
    "use_rotary_positional_embeddings": True,
}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
# Name -> (class of diffusers, configuration, sizes in frames, height and width); the classes' defaults are the others.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, int, int], ...]]] = {
    "Wan2.1 T2V 1.3B": (WAN, WAN_1B, ((81, 480, 832),)),
    "Wan2.1 T2V 14B": (WAN, {}, ((81, 480, 832), (81, 720, 1280))),
    "Wan2.1 I2V 14B": (WAN, I2V, ()),
    "Wan2.1 VACE 1.3B": ("WanVACETransformer3DModel", {**WAN_1B, "vace_layers": list(range(0, 30, 2))}, ()),
    "CogVideoX 2B": (COGVIDEOX, {}, ((49, 480, 720),)),
    "CogVideoX1.5 5B": (COGVIDEOX, COGVIDEOX15_5B, ((81, 768, 1360),)),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, ((129, 720, 1280),)),
    "LTX-Video 2B": ("LTXVideoTransformer3DModel", {}, ((121, 512, 704),)),
}
EXAMPLE = (5120, 5120)  # layer whose bytes the table of schemes gives


def on_meta(name: str) -> nn.Module:
    import diffusers

    cls, config, _ = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return getattr(diffusers, cls)(**config)
    finally:
        torch.set_default_dtype(before)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def families() -> str:
    """Layers of each model and GiB of what is quantized, in bfloat16 and by two schemes."""
    rows = []
    for name in MODELS:
        model = on_meta(name)
        reports = {}
        for scheme in ("w8a8_int8", "w4a16"):
            reports[scheme] = layer_report(choose_layers(model, scheme, family_of(model).rules), model)
        groups = reports["w8a8_int8"].groups
        done = [group for group in groups if group.scheme is not None]
        sizes = [sum(group.bytes_before for group in done)]
        sizes += [sum(g.bytes_after for g in report.groups if g.scheme is not None) for report in reports.values()]
        rest = sum(group.bytes_before for group in groups if group.scheme is None)
        counts = [sum(group.count for group in groups), sum(group.count for group in done)]
        cells = [name, f"`{type(model).__name__}`", *map(str, counts), *(f"{size / GIB:.2f}" for size in sizes)]
        rows.append([*cells, f"{rest / GIB:.2f}"])
    columns = ["model", "class", "linear layers", "quantized", "their GiB in bfloat16", "8 bit", "w4a16"]
    return table([*columns, "the other layers' GiB"], rows)


def schemes() -> str:
    rows = []
    for name, spec in SCHEMES.items():
        n, k = EXAMPLE
        share = spec.weight_bytes(n, k) / (2 * n * k)
        rows.append([f"`{name}`", _weights(spec), _activations(spec), f"{share:.3f}", _product(spec), SUMMARIES[name]])
    columns = ["scheme", "weights", "activations", "bytes, of bfloat16", "arithmetic", "what for"]
    return table(columns, rows)


def _weights(spec: LayerSpec) -> str:
    kind = "e4m3" if spec.weight == "fp8" else f"{spec.weight}{spec.w_bits}"
    where = f"a scale for {spec.group} inputs" if spec.group else "a scale for each output"
    zero = ", zero-point" if spec.zero != "none" else ""
    return f"{kind}, {where}{zero}{f', branch of rank {spec.rank}' if spec.rank else ''}"


def _activations(spec: LayerSpec) -> str:
    if spec.a_bits == 16:
        return "as they are"
    kind = "e4m3" if spec.weight == "fp8" else f"{spec.a_bits} bit{' unsigned' if spec.weight == 'uint' else ''}"
    return f"{kind}, a scale for {spec.a_group} inputs" if spec.a_group else f"{kind}, a scale for each token"


def _product(spec: LayerSpec) -> str:
    if spec.a_bits == 16:
        return "of the model's dtype, weights unpacked first"
    return "float8" if spec.weight == "fp8" else "int8, sums in int32"


def roofline() -> str:
    rows = []
    for name, (_, _, sizes) in MODELS.items():
        for frames, height, width in sizes:
            cost = forecast(on_meta(name), frames, height, width)
            gains = [cost.gain(linears=1.6), cost.gain(linears=2), cost.gain(linears=4), cost.gain(attention=2)]
            both = cost.gain(linears=2, attention=2)
            cells = [name, f"{height} x {width} x {frames}", f"{cost.tokens:,}", f"{cost.flops / 1e12:.0f}"]
            cells += [f"{cost.linear_share:.0%}", f"{cost.linear_time_share:.0%}"]
            rows.append([*cells, *(f"{gain:.2f}" for gain in (*gains, both))])
    columns = ["model", "video", "tokens", "TFLOP a forward", "linear layers, of operations", "of time"]
    columns += ["linears 1.6x", "linears 2x", "linears 4x", "attention 2x", "both 2x"]
    return table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(families(), schemes(), roofline(), sep="\n\n")


if __name__ == "__main__":
    main()
