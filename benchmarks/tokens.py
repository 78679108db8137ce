"""Time and peak memory of token reduction: scoring, selection and the whole prefill, per method, on random weights.

    python benchmarks/tokens.py --out benchmarks/results/tokens_cpu.json
    python benchmarks/tokens.py --device cuda --out benchmarks/results/tokens_cuda.json

Four sections. *prefill*: ``generate`` up to the first token, unwrapped and with each method at about a third of the
tokens. *scoring*: the vision encoder alone, with vlmeff's scores, and with attention maps from eager attention (all of
them through ``output_attentions``, or those of the two layers only). *selection*: each method's choice on recorded
scores and features. *patches*: the scores of 16384 patches in the geometry of Qwen2.5-VL's tower.

Settings that are compared run interleaved, in rotating order, in one process; ratios are medians over the rounds of
the ratio within a round (of scores alone: the ratio of medians). Milliseconds of two result files must not be compared.
Warm-up is the call that measures peak memory; ``measuring.py`` says how that is done.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from encoding import Setup, maps_of
from measuring import environment, extra_peak_bytes, interleaved, ratio, summary, timed
from random_models import GEOMETRIES, build
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import vlmeff
from tokenpruning import AdaptInfer, Fourier, Method, Resampler, Schedule, Segment, Selector, methods, tokens_to_keep
from vlmeff.reporting import Report, measure
from vlmeff.vlm.probe import column_mean

METHODS = "hiprune hiprune++ divprune scope visionzip downsample random text fourier adaptinfer".split()
SECTIONS = ("prefill", "scoring", "selection", "patches")
SHARE = 1 / 3
SELECTIONS_PER_ROUND = 5  # a selection takes milliseconds
NOTES = [
    "Random weights: time and memory only. Ratios hold within this file; milliseconds depend on the machine's load.",
    "prefill_ms runs from the call of generate to the first logits and includes the vision encoder; encode_ms is its "
    "part up to the chosen tokens (encoder, scores, selection).",
    "adaptinfer scores and drops inside the language model: it has no selection before it, and its tokens are the mean "
    "over the layers.",
    'added_ms is a difference of two encodes and as noisy as they are; "alone" times the same work by itself.',
]


def methods_for(names: list[str], *, grid: tuple[int, int], layers: int) -> dict[str, Method]:
    """The methods, each set to process about ``SHARE`` of the tokens of a grid, in a language model of ``layers``."""
    out: dict[str, Method] = {}
    for name in names:
        if name == "fourier":
            out[name] = Fourier(side=max(1, round(math.sqrt(SHARE) * max(grid))))
        elif name == "adaptinfer":
            out[name] = AdaptInfer(schedule=schedule_for(layers))
        else:
            cls: Any = methods.get(name)
            out[name] = cls(keep=SHARE)
    return out


def schedule_for(layers: int) -> Schedule:
    """The paper's layers 1, 10 and 20 of 32, at this depth, with the one ratio that processes ``SHARE`` on average."""
    places = tuple(sorted({min(layers - 2, round(n * layers / 32)) for n in (1, 10, 20)}))

    def mean(r: float) -> float:
        return sum(r ** sum(place < layer for place in places) for layer in range(layers)) / layers

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < SHARE else (low, middle)
    return Schedule(layers=places, ratios=(round(high, 4),) * len(places), name=f"ratio {high:.3f} x {len(places)}")


def prefill_section(setup: Setup, chosen: dict[str, Method], repeats: int) -> dict[str, Any]:
    model, inputs = setup.model, setup.inputs
    reports: dict[str, Report] = {}
    encode_ms: dict[str, list[float]] = {name: [] for name in chosen}

    def run(name: str) -> float:
        arguments = {**inputs, "max_new_tokens": 1, "do_sample": False}
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        if name == "unwrapped":
            with measure(model, inputs) as measured:
                model.generate(**arguments)
            reports[name] = measured.report
        else:
            vlmeff.wrap(model, None, tokens=chosen[name])
            try:
                model.generate(**arguments)
                reports[name] = vlmeff.report(model)
            finally:
                vlmeff.unwrap(model)
            encoded = reports[name].encode_ms
            if encoded is not None:
                encode_ms[name].append(encoded)
        elapsed = reports[name].prefill_ms
        assert elapsed is not None
        return elapsed

    names = ["unwrapped", *chosen]
    if setup.device.type == "cuda":
        for name in names:  # the workspaces of the libraries come from torch's allocator
            run(name)
    peaks = {
        name: extra_peak_bytes(lambda name=name: run(name), setup.device)  # type: ignore[misc]
        for name in track(names, description="prefill: peak memory")
    }
    for values in encode_ms.values():
        values.clear()
    times = interleaved({n: lambda n=n: run(n) for n in names}, repeats, "prefill: time")  # type: ignore[misc]
    out = {}
    for name in names:
        report = reports[name]
        kept = report.visual_tokens_after if report.visual_tokens_processed is None else report.visual_tokens_processed
        out[name] = {
            "method": str(chosen.get(name, "")),
            "visual_tokens": round(kept, 1),
            "prefill_ms": summary(times[name]),
            "to_unwrapped": ratio(times[name], times["unwrapped"]),
            "encode_ms": summary(encode_ms[name]) if encode_ms.get(name) else None,
            "encode_to_unwrapped_prefill": ratio(encode_ms[name], times["unwrapped"]) if encode_ms.get(name) else None,
            "llm_prefill_gflops_counted": report.prefill_gflops_after,
            "kv_bytes": report.kv_bytes if name != "unwrapped" else report.kv_bytes_full,
            "extra_peak_bytes": peaks[name],
            "peak_to_unwrapped": round(peaks[name] / peaks["unwrapped"], 4),
        }
    return out


def scoring_section(setup: Setup, repeats: int) -> dict[str, Any]:
    """The encoder with and without scores; then the scores alone, on the recorded inputs of the two layers."""
    runs: dict[str, Callable[[], object]] = {
        "encode": setup.encode,
        "encode + object and deep": lambda: setup.encode("object", "deep"),
        "encode + deep": lambda: setup.encode("deep"),
    }
    out: dict[str, Any] = {"agreement": None, "eager_maps": None}
    if setup.model.config.model_type == "llava":
        runs["encode, eager, all maps"] = setup.encode_eagerly
        ours, theirs = setup.encode("object", "deep"), setup.encode_eagerly()
        # Where the weights are in half precision, the maps' softmax is rounded and the hidden states differ too.
        difference = max(float(((ours[n] - theirs[n]) / theirs[n]).abs().max()) for n in ours)
        out["agreement"] = {"largest_relative_difference": difference, "kept_alike_at_share": _alike(ours, theirs)}
    else:
        out["eager_maps"] = "not run: this tower returns no attention maps"
    encodes = _measured(runs, setup.device, repeats, "encode", per_round=1)
    for row in encodes.values():
        row["to_encode"] = ratio(row["ms"], encodes["encode"]["ms"])
        row["added_ms"] = summary([a - b for a, b in zip(row["ms"], encodes["encode"]["ms"], strict=True)])
        row["added_peak_bytes"] = row["extra_peak_bytes"] - encodes["encode"]["extra_peak_bytes"]
    del encodes["encode"]["added_ms"], encodes["encode"]["added_peak_bytes"]

    seen = setup.hidden_states()
    key = setup.family.query_key
    alone: dict[str, Callable[[], object]] = {
        "object and deep": lambda: [column_mean(key(*seen[n])) for n in seen],
        "deep": lambda: column_mean(key(*seen["deep"])),
        "object and deep, two maps": lambda: [maps_of(key(*seen[n])) for n in seen],
        "text": setup.text_scores,
    }
    hooks = _measured(alone, setup.device, repeats, "scores alone", per_round=SELECTIONS_PER_ROUND)
    for name, row in hooks.items():
        row["ms"] = summary(row["ms"])
        row["to_encode"] = round(row["ms"]["median"] / statistics.median(encodes["encode"]["ms"]), 4)
        row["how"] = "full map per layer, softmax, mean" if "maps" in name else "vlmeff"
    for row in encodes.values():
        row["ms"] = summary(row["ms"])
    return {**out, "encoder": encodes, "alone": hooks}


def _alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Share of the top ``SHARE`` by the deep score that both have."""
    k = max(1, round(SHARE * len(ours["deep"])))
    a, b = (set(s["deep"].topk(k).indices.tolist()) for s in (ours, theirs))
    return round(len(a & b) / k, 4)


def _measured(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, what: str, *, per_round: int
) -> dict[str, dict[str, Any]]:
    """Per run its milliseconds ("ms", one per call) and peak."""
    for run in runs.values():
        run()
    peaks = {name: extra_peak_bytes(run, device) for name, run in runs.items()}
    cases = {name: lambda run=run: timed(run, device) for name, run in runs.items()}  # type: ignore[misc]
    times = interleaved(cases, repeats * per_round, what)
    return {name: {"ms": times[name], "extra_peak_bytes": peaks[name]} for name in runs}


def selection_section(setup: Setup, chosen: dict[str, Method], repeats: int) -> dict[str, Any]:
    """Each method's own work on recorded scores and features; of a resampler, the resampling."""
    scores = setup.encode("object", "deep")
    scores["text"] = setup.text_scores()
    features = setup.encoded.items[0]
    size, grid = features.shape[0], setup.grid
    k = tokens_to_keep(SHARE, size)
    runs: dict[str, Callable[[], object]] = {}
    for name, method in chosen.items():
        if isinstance(method, Resampler):
            before_projector = _resampled_input(setup)
            runs[name] = lambda m=method, x=before_projector: m.resample(x, grid)  # type: ignore[misc]
        elif isinstance(method, Selector):
            of_method = {n: scores[n] for n in method.needs if n in scores}
            tokens = features if "features" in method.needs else None
            segment = Segment(grid=grid, scores=of_method, features=tokens, device=features.device)
            runs[name] = lambda m=method, s=segment: m.select(s, k)  # type: ignore[misc]
    rows = _measured(runs, setup.device, repeats, "selection", per_round=SELECTIONS_PER_ROUND)
    for row in rows.values():
        row["ms"] = summary(row["ms"])
    return {"tokens": size, "kept": k, "methods": rows}


def _resampled_input(setup: Setup) -> Tensor:
    """What a resampler gets: the projector's input, or the tokens where it resamples behind the encoder."""
    projector = setup.family.projector(setup.model)
    if projector is None:
        return setup.encoded.items[0]
    seen: list[Tensor] = []
    handle = projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        setup.encode()
    finally:
        handle.remove()
    return seen[0]


def patches_section(device: torch.device, dtype: str, options: list[str]) -> dict[str, Any]:
    """``patches.py`` in a process of its own."""
    script = Path(__file__).with_name("patches.py")
    command = [sys.executable, str(script), "--device", str(device), "--dtype", dtype, *options]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(out.splitlines()[-1])
    del result["environment"]
    return result


# The script.


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a reader wants first; the file has the rest."""
    mb = 1e6
    out = []
    if "prefill" in result:
        table = Table(
            "method", "tokens", "prefill ms", "/ unwrapped", "encode ms", "select ms", "peak MB", title="Prefill"
        )
        selections = result.get("selection", {}).get("methods", {})
        for name, row in result["prefill"].items():
            encode, select = row["encode_ms"], selections.get(name)
            table.add_row(
                name,
                f"{row['visual_tokens']:g}",
                f"{row['prefill_ms']['median']:.1f}",
                f"{row['to_unwrapped']:.2f}",
                f"{encode['median']:.1f}" if encode else "",
                f"{select['ms']['median']:.2f}" if select else "",
                f"{row['extra_peak_bytes'] / mb:.1f}",
            )
        out.append(table)
    if "scoring" in result:
        table = Table("what", "ms", "/ encode", "peak MB", title="Vision encoder and scores")
        for part in ("encoder", "alone"):
            for name, row in result["scoring"][part].items():
                label = name if part == "encoder" else f"alone: {name}"
                peak = f"{row['extra_peak_bytes'] / mb:.1f}"
                table.add_row(label, f"{row['ms']['median']:.2f}", f"{row['to_encode']:.4f}", peak)
        out.append(table)
    if "patches" in result:
        part = result["patches"]
        table = Table("what", "ms", "peak MB", "of the process MB", title=f"{part['patches']} patches")
        for name in ("op", "hook", "attention_module_sdpa"):
            if name in part:
                row, process = part[name], part[name]["process_extra_peak_bytes"]
                peaks = f"{row['extra_peak_bytes'] / mb:.1f}", f"{process / mb:.1f}" if process is not None else ""
                table.add_row(name, f"{row['ms']:.0f}", *peaks)
        table.add_row("eager map, computed", "", f"{part['eager_map_bytes_computed'] / mb:.0f}", "")
        out.append(table)
    return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=list(GEOMETRIES), help="default: llava-7b on CUDA, llava-0.5b on the CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float16 on CUDA, float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, help="measured rounds; default: 10 on CUDA, 3 on the CPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 256 patches: does it run?")
    args = parser.parse_args()

    start = time.perf_counter()
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    name = args.model or ("smoke" if args.smoke else "llava-7b" if cuda else "llava-0.5b")
    dtype = args.dtype or ("float16" if cuda else "float32")
    repeats = args.repeats or (1 if args.smoke else 10 if cuda else 3)
    result: dict[str, Any] = {
        "benchmark": "tokens",
        "model": name,
        "dtype": dtype,
        "share": round(SHARE, 4),
        "repeats": repeats,
        **environment(device),
        "notes": NOTES,
    }

    def save(section: str, value: object) -> None:
        result[section] = value
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")

    if "patches" in args.sections:  # first, while this process holds nothing
        save("patches", patches_section(device, dtype, ["--patches", "256", "--heads", "2"] if args.smoke else []))
    if set(args.sections) - {"patches"}:
        model, inputs, geometry = build(name, device=device, dtype=getattr(torch, dtype))
        save("geometry", geometry)
        setup = Setup(model, inputs)
        chosen = methods_for(args.methods, grid=setup.grid, layers=model.config.get_text_config().num_hidden_layers)
        if "selection" in args.sections:
            save("selection", selection_section(setup, chosen, repeats))
        if "scoring" in args.sections:
            save("scoring", scoring_section(setup, repeats))
        if "prefill" in args.sections:
            save("prefill", prefill_section(setup, chosen, repeats))
    save("seconds", round(time.perf_counter() - start, 1))
    save("load_average_at_the_end", environment(device)["load_average"])
    for table in tables(result):
        Console().print(table)


if __name__ == "__main__":
    main()
