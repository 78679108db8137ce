"""What quantized linear layers, a block and a whole video transformer cost in time and memory, scheme by scheme.

    python benchmarks/dit.py --threads 1 --out benchmarks/results/dit_cpu.json
    python benchmarks/dit.py --device cuda --out benchmarks/results/dit_h200.json
    python benchmarks/dit.py --show benchmarks/results/dit_cpu.json

* ``linears``: the matrix shapes of Wan2.1's 1.3B and 14B transformers. On CUDA at M = 32,760 tokens (480 x 832 pixels,
  81 frames), on the CPU at few tokens. Codes and scales are random: the time does not depend on them.
* ``block``: one block of Wan-1.3B's widths, weights random and quantized by rounding.
* ``end_to_end``: on the CPU the shipped tiny-wan through its pipeline, on CUDA the transformer of Wan-1.3B with random
  weights, two forward passes a step as with guidance; without text encoder and VAE.

Settings take turns; each is compared with the dense layer (float32 and bfloat16 on the CPU, bfloat16 on CUDA) and with
torchao's dynamic int8 and float8 layers of the same round. CPU times are seconds of the processor in one process, so
that other programs on the machine hardly count. Figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dit_cases import (
    TORCHAO,
    Layer,
    Run,
    bytes_of,
    collect,
    dense_dtypes,
    in_dtype,
    measured,
    milliseconds,
    random_layer,
    variants,
    with_torchao,
)
from dit_tables import markdown
from measuring import environment, extra_peak_bytes, summary
from torch import Tensor, nn

import vlmeff
from vlmeff.diffusion.schemes import SCHEMES

# (outputs N, inputs K) of the layers of a block; q, k, v and o of both attentions are alike.
SHAPES = {
    "Wan-1.3B": {"attention": (1536, 1536), "ffn.net.0.proj": (8960, 1536), "ffn.net.2": (1536, 8960)},
    "Wan-14B": {"attention": (5120, 5120), "ffn.net.0.proj": (13824, 5120), "ffn.net.2": (5120, 13824)},
}
WAN_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
# (latent frames, rows, columns) and text tokens.
SIZES = {"cuda": ((21, 60, 104), 512), "cpu": ((4, 16, 16), 64)}
TOKENS = {"cuda": 32760, "cpu": 256}
CPU_NOTE = "measured on a CPU with the reference operations: the figures say nothing about a GPU"


def linears(
    shapes: dict[str, dict[str, tuple[int, int]]], tokens: int, rounds: int, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    left_out: dict[str, str] = {}
    dtypes, rows = dense_dtypes(device), []
    first = next(iter(dtypes.values()))
    for model, layers in shapes.items():
        for layer, (n, k) in layers.items():
            generator = torch.Generator(device=device).manual_seed(1)
            x = torch.randn(tokens, k, generator=generator, device=device, dtype=first)

            def dense(dtype: torch.dtype, n: int = n, k: int = k) -> nn.Module:
                return nn.Linear(k, n, dtype=dtype, device=device).requires_grad_(False)

            makers: dict[str, Callable[[], Run]] = {
                name: lambda dtype=dtype, dense=dense, x=x: Layer(dense(dtype), x.to(dtype))
                for name, dtype in dtypes.items()
            }
            for name, spec in SCHEMES.items():
                makers[name] = lambda spec=spec, n=n, k=k, x=x: Layer(random_layer(spec, n, k, first, device), x)
            for name in TORCHAO:
                makers[name] = lambda name=name, dense=dense, x=x: Layer(
                    with_torchao(nn.Sequential(dense(torch.bfloat16)), name), x.bfloat16()
                )
            cases, held = collect(makers, left_out, device)
            what = f"{model} {layer}"
            rows.append(
                {
                    **{"model": model, "layer": layer, "m": tokens, "n": n, "k": k, "rounds": rounds},
                    "cases": measured(cases, held, rounds, device, what),
                }
            )
    return rows, left_out


def block_call(transformer: nn.Module, size: tuple[tuple[int, int, int], int]) -> tuple[tuple[Any, ...], int]:
    """(arguments that the transformer gives its first block, video tokens)."""
    caught: list[tuple[Any, ...]] = []
    handle = transformer.blocks[0].register_forward_pre_hook(lambda module, args: caught.append(args))
    transformer(**transformer_inputs(transformer, size), return_dict=False)
    handle.remove()
    return caught[0], caught[0][0].shape[1]


def transformer_inputs(transformer: nn.Module, size: tuple[tuple[int, int, int], int]) -> dict[str, Tensor]:
    (frames, height, width), text = size
    config: Any = transformer.config
    p = transformer.patch_embedding.weight  # norms may be in float32
    generator = torch.Generator(device=p.device).manual_seed(2)
    shape = (1, config.in_channels, frames, height, width)
    return {
        "hidden_states": torch.randn(shape, generator=generator, device=p.device, dtype=p.dtype),
        "timestep": torch.full((1,), 500, device=p.device),
        "encoder_hidden_states": torch.randn(
            (1, text, config.text_dim), generator=generator, device=p.device, dtype=p.dtype
        ),
    }


def random_transformer(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**config)
    return in_dtype(transformer, dtype).eval().requires_grad_(False)


def block(
    config: dict[str, Any], size: tuple[tuple[int, int, int], int], rounds: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    left_out: dict[str, str] = {}
    first = next(iter(dense_dtypes(device).values()))
    plain = random_transformer(config | {"num_layers": 1}, first, device)

    def maker(make: Callable[[], nn.Module]) -> Callable[[], Run]:
        def made() -> Run:
            transformer = make()
            arguments, _ = block_call(transformer, size)
            return Layer(transformer.blocks[0], *arguments)

        return made

    tokens = block_call(plain, size)[1]
    cases, held = collect({name: maker(make) for name, make in variants(plain, device).items()}, left_out, device)
    row = {"model": "Wan-1.3B", "tokens": tokens, "text_tokens": size[1], "rounds": rounds}
    return {**row, "cases": measured(cases, held, rounds, device, "one block")}, left_out


def pipelines(weights: Path, call: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Run]]:
    """Calls of tiny-wan's pipeline up to its latents."""
    from vlmeff.models.tiny_wan.architecture import load_pipeline

    plain = load_pipeline(weights).transformer

    def maker(make: Callable[[], nn.Module] | None) -> Callable[[], Run]:
        def made() -> Run:
            pipe = load_pipeline(weights)
            if make is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    vlmeff.wrap(pipe, "fast")
            else:
                pipe.transformer = make()

            def run() -> object:
                noise = torch.Generator().manual_seed(0)
                return pipe("a red circle moving left", generator=noise, output_type="latent", **call)

            run.bytes = bytes_of(pipe.transformer)  # type: ignore[attr-defined]
            return run

        return made

    return {name: maker(make) for name, make in [*variants(plain, device).items(), ("preset fast", None)]}


def steps_of(transformer: nn.Module, size: tuple[tuple[int, int, int], int]) -> Run:
    """One denoising step with guidance: two forward passes."""
    inputs = transformer_inputs(transformer, size)

    def run() -> object:
        return [transformer(**inputs, return_dict=False) for _ in range(2)]

    run.bytes = bytes_of(transformer)  # type: ignore[attr-defined]
    return run


def end_to_end(
    makers: dict[str, Callable[[], Run]], steps: int, rounds: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """Steps per second and the most memory that a call takes beyond the weights. On CUDA one case at a time is held."""
    left_out: dict[str, str] = {}
    cases: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    if device.type == "cuda":
        for name, make in makers.items():
            one, held = collect({name: make}, left_out, device)
            if name in one:
                peaks[name] = extra_peak_bytes(one[name], device)
                times = [milliseconds(one[name], device) for _ in range(rounds)]
                cases[name] = {"ms": summary(times), "bytes": held[name]}
            del one
            torch.cuda.empty_cache()
        for row in cases.values():
            here = row["ms"]["median"]
            bases = [base for base in (*dense_dtypes(device), *TORCHAO) if base in cases]
            row["times_faster_than"] = {base: round(cases[base]["ms"]["median"] / here, 4) for base in bases}
    else:
        made, held = collect(makers, left_out, device)
        cases = measured(made, held, rounds, device, "end to end")
        peaks = {name: extra_peak_bytes(run, device) for name, run in made.items()}
    for name, row in cases.items():
        row["steps_per_s"] = round(1000 * steps / row["ms"]["median"], 3)
        row["peak_bytes"] = peaks[name]
    return {"steps": steps, "rounds": rounds, "cases": cases}, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (.json)")
    parser.add_argument("--show", type=Path, help="print the tables of a result file, and end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of a CPU; as torch has it when left out")
    parser.add_argument("--tokens", type=int, help="rows of the linear layers' inputs")
    args = parser.parse_args()
    if args.show is not None:
        print(markdown(json.loads(args.show.read_text())))
        return
    if args.out is None:
        parser.error("--out is missing")
    from vlmeff.loading import embedded_folder
    from vlmeff.models.tiny_wan.architecture import CALL, digests

    torch.set_grad_enabled(False)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, kind = torch.device(args.device), torch.device(args.device).type
    start = time.perf_counter()
    weights = embedded_folder("tiny_wan")
    result: dict[str, Any] = environment(device)
    result["notes"] = [CPU_NOTE] if kind == "cpu" else []
    result["dtype"] = next(iter(dense_dtypes(device)))
    result["torchao"] = importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None
    result["times"] = "milliseconds of the processor" if kind == "cpu" else "milliseconds by the clock"
    result["left_out"] = {}

    def save(part: str, found: Any, missing: dict[str, str]) -> None:
        """After every part, so that a run that is interrupted leaves what it has measured."""
        result[part] = found
        result["left_out"] |= missing
        result["seconds"] = round(time.perf_counter() - start)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")

    if kind == "cpu":
        what = {"model": "tiny-wan", "weights_sha256": digests(weights), "call": CALL}
        whole, missing = end_to_end(pipelines(weights, CALL, device), CALL["num_inference_steps"], args.rounds, device)
    else:
        what = {"model": "Wan-1.3B, random weights", "latents": SIZES[kind][0]}
        plain = random_transformer(WAN_1_3B, torch.bfloat16, device)
        makers = {
            name: lambda make=make: steps_of(make(), SIZES["cuda"]) for name, make in variants(plain, device).items()
        }
        whole, missing = end_to_end(makers, 1, args.rounds, device)
    save("end_to_end", {**what, **whole}, missing)
    save("block", *block(WAN_1_3B, SIZES[kind], args.rounds, device))
    save("linears", *linears(SHAPES, args.tokens or TOKENS[kind], args.rounds, device))
    print(markdown(result))


if __name__ == "__main__":
    main()
