"""What KV retention costs and saves: prefill, scoring, decode tokens/s and memory against a plain ``DynamicCache``.

    python benchmarks/kv.py --out benchmarks/results/kv_cpu.json --kvpress-python kvpress/bin/python
    python benchmarks/kv.py --device cuda --out benchmarks/results/kv_cuda.json

Language models with random weights, over prompt length and batch; every row of a batch is another text, none is padded.
A *request* is one greedy ``generate``: the prompt, then ``STEPS`` tokens without headroom, then ``STEPS`` more for
which the retained layers get ``HEADROOM`` spare columns (their allocation included), so that a step copies no cache.
``DynamicCache`` has no headroom; "keep all" is the retained cache with nothing evicted, which has.

On the CPU times are CPU seconds of one thread (``--threads 1``), which other processes disturb least.
Settings that are compared take turns in one process; ratios are medians over the rounds of the ratio within a round.
Milliseconds of two result files must not be compared. kvpress pins an older transformers: its SnapKV runs in a process
and an environment of its own (``kv_kvpress.py``), against the DynamicCache there. A cell whose memory run and one round
are foreseen to take more than ``--cell-seconds`` is measured with fewer settings (``TIERS``) or left out; the file says
which and why. ``docs/kv-cost.md`` is made of the file by ``kv_tables.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from generating import GEOMETRIES, Forecast, Request, Stopwatch, build, clock_name, now, peaks, prompt, request, rounds
from kv_tables import markdown
from measuring import environment, ratio, summary
from transformers import DynamicCache

import kvcache.controller
import vlmeff
from kvcache import PrefixKV, RetentionPolicy, SnapKV
from kvcache.cache import RetainedCache

KEEP_RATIO = 0.3
STEPS, HEADROOM = 32, 64
MEMORY_STEPS = 4  # of the request whose memory is measured: every step allocates alike
FULL = "prefixkv full"
SETTINGS: dict[str, RetentionPolicy | None] = {
    "dynamic": None,
    "keep all": PrefixKV(keep_ratio=1.0),
    FULL: PrefixKV(keep_ratio=KEEP_RATIO, metric="full"),
    "prefixkv window": PrefixKV(keep_ratio=KEEP_RATIO, metric="window", window=32),
    "snapkv": SnapKV(keep_ratio=KEEP_RATIO, window=32),
}
TIERS = [list(SETTINGS), [n for n in SETTINGS if n != FULL], ["dynamic", "prefixkv window", "snapkv"]]
LENGTHS, BATCHES = (512, 1024, 2048, 4096, 8192, 16384), (1, 4, 16)
CELLS = [(length, batch) for batch in BATCHES for length in LENGTHS]
SPOT = [(length, batch) for length, batch in CELLS if length == 2048 and batch < 16]
PLANS: dict[str, dict[str, list[tuple[int, int]]]] = {  # geometry -> cells
    "cpu": {"llama-small": CELLS, "qwen2.5-vl-small": SPOT},
    "cuda": {"llava-1.5-7b": CELLS, "qwen2.5-vl-7b": CELLS},
    "smoke": {"llama-small": [(128, 1), (192, 2)]},
}
NOTES = [
    "Random weights with attention that is sharper in later layers: time and memory only. How much budgets differ "
    "between layers and rows, and so what a batch spends on fillers, is another matter on a trained model.",
    "Ratios hold within this file; milliseconds and tokens/s depend on the machine's load.",
    "scoring_ms is the time inside the scoring of the prompt, measured within the prefill; eviction_ms that of "
    "budgets, selection and gathering. Shares are of the DynamicCache's prefill in the same round.",
    "cache_bytes: storages at the end of the first decode part, headroom's at the end of the second, spare columns "
    "included. Peaks are what torch held beyond what it held before the request, without headroom: until the first "
    "token, and after it.",
    "Every ratio of speed is in tokens/s, so more than 1 is faster; every other ratio is smaller for less.",
]


class Case:
    """One setting in one cell: ``run`` makes a request and returns what it measured."""

    def __init__(self, model: Any, name: str, ids: torch.Tensor) -> None:
        self.model, self.name, self.ids, self.policy = model, name, ids, SETTINGS[name]
        self.kept: dict[str, Any] = {}

    @contextlib.contextmanager
    def _wrapped(self) -> Iterator[None]:
        if self.policy is None:
            yield
            return
        vlmeff.wrap(self.model, None, kv=self.policy)
        try:
            yield
        finally:
            vlmeff.unwrap(self.model)

    def run(
        self, steps: int = STEPS, at_end: Callable[[int], None] | None = None, *, headroom: int = HEADROOM
    ) -> tuple[Request, float, float]:
        """The request, and milliseconds of its prefill that went into scoring and eviction."""
        scoring, eviction = Stopwatch(self.ids.device), Stopwatch(self.ids.device)
        spent: list[float] = []
        config = self.model.config
        cache: Any = DynamicCache(config=config) if self.policy is None else RetainedCache(config, self.policy)

        def end(part: int) -> None:
            if part == 0:
                spent.extend((scoring.milliseconds(), eviction.milliseconds()))
            elif part == 1 and self.policy is not None:
                self._look(cache)
                for layer in cache.layers:
                    layer.headroom = headroom
            if at_end is not None:
                at_end(part)

        measure, evict = kvcache.controller.measure_kernel, RetainedCache._evict_prompt
        with (
            mock.patch.object(kvcache.controller, "measure_kernel", scoring.around(measure)),
            mock.patch.object(RetainedCache, "_evict_prompt", eviction.around(evict)),
            self._wrapped(),
        ):
            done = request(self.model, self.ids, cache, steps=steps, at_end=end)
        return done, spent[0], spent[1]

    def _look(self, cache: RetainedCache) -> None:
        if self.kept:
            return
        report = cache.report()
        held = [layer.columns - (layer.seen - self.ids.shape[1]) for layer in report.layers]  # fillers included
        self.kept = {
            "keep_ratio": round(report.keep_ratio or 0.0, 4),
            "columns_per_layer": held,
            "columns_to_prompt": round(statistics.mean(held) / self.ids.shape[1], 4),
        }


def measure_cell(
    model: Any,
    names: list[str],
    length: int,
    batch: int,
    *,
    forecast: Forecast,
    geometry: str,
    seconds: float,
    most: int,
) -> dict[str, Any]:
    """The memory of each setting, which warms it up, and as many rounds as fit into half of ``seconds``, or one."""
    ids = prompt(model, length, batch)
    cases = {name: Case(model, name, ids) for name in names}
    memory, spent = {}, 0.0
    for name, case in cases.items():
        start = now(ids.device)
        memory[name] = peaks(lambda at_end, case=case: case.run(MEMORY_STEPS, at_end, headroom=0), ids.device)  # type: ignore[misc]
        took = now(ids.device) - start
        forecast.note(f"{geometry} {name}", length, batch, took)
        spent += took
    repeats = max(1, min(most, int((seconds / 2 - spent) / spent)))
    runs: dict[str, list[tuple[Request, float, float]]] = {name: [] for name in names}
    for name in rounds(names, repeats):
        runs[name].append(cases[name].run())
    rows = {name: _row(name, runs, memory, cases[name].kept, batch) for name in names}
    return {"model": geometry, "prompt_tokens": length, "batch": batch, "repeats": repeats, "settings": rows}


def _row(
    name: str,
    runs: dict[str, list[tuple[Request, float, float]]],
    memory: dict[str, tuple[int, int]],
    kept: dict[str, Any],
    batch: int,
) -> dict[str, Any]:
    own, full, snapkv = ([request for request, _, _ in runs[n]] for n in (name, "dynamic", "snapkv"))
    prefill = [r.prefill_ms for r in full]
    bytes_held = own[0].bytes

    def speed(requests: list[Request], part: str) -> list[float]:
        return [1000 * batch * STEPS / getattr(r, part) for r in requests]

    row: dict[str, Any] = {
        "policy": str(SETTINGS[name] or "DynamicCache"),
        "prefill_ms": summary([r.prefill_ms for r in own]),
        "prefill_to_dynamic": ratio([r.prefill_ms for r in own], prefill),
        "decode_tokens_per_s": summary(speed(own, "first_ms")),
        "decode_to_dynamic": ratio(speed(own, "first_ms"), speed(full, "first_ms")),
        "decode_to_snapkv": ratio(speed(own, "first_ms"), speed(snapkv, "first_ms")),
        "cache_bytes": bytes_held[1],
        "cache_to_dynamic": round(bytes_held[1] / full[0].bytes[1], 4),
        "prefill_peak_bytes": memory[name][0],
        "prefill_peak_to_dynamic": round(memory[name][0] / memory["dynamic"][0], 4),
        "decode_peak_bytes": memory[name][1],
        "decode_peak_to_dynamic": round(memory[name][1] / memory["dynamic"][1], 4),
    }
    if name == "dynamic":
        return row
    scoring, eviction = [s for _, s, _ in runs[name]], [e for _, _, e in runs[name]]
    row |= kept
    row |= {
        "scoring_ms": summary(scoring),
        "scoring_to_dynamic_prefill": ratio(scoring, prefill),
        "eviction_ms": summary(eviction),
        "eviction_to_dynamic_prefill": ratio(eviction, prefill),
        "headroom": {
            "decode_tokens_per_s": summary(speed(own, "second_ms")),
            "decode_to_dynamic": ratio(speed(own, "second_ms"), speed(full, "second_ms")),
            "decode_to_snapkv": ratio(speed(own, "second_ms"), speed(snapkv, "second_ms")),
            "cache_bytes": bytes_held[2],
            "cache_to_dynamic": round(bytes_held[2] / full[0].bytes[2], 4),
        },
    }
    return row


def memory_needed(model: Any, length: int, batch: int) -> int:
    """Bytes foreseen: the full cache twice (a step copies a layer, an eviction another), window rows, one MLP."""
    config = model.config.get_text_config()
    size, tokens = model.dtype.itemsize, length * batch
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size * tokens
    window = config.num_hidden_layers * config.num_attention_heads * 32 * 4 * tokens
    return 2 * cache + window + tokens * size * (3 * config.intermediate_size + 8 * config.hidden_size)


def memory_free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def obstacle(
    model: Any, names: list[str], length: int, batch: int, *, forecast: Forecast, geometry: str, seconds: float
) -> str | None:
    """Why these settings cannot be measured in this cell."""
    free, needed = memory_free(model.device), memory_needed(model, length, batch)
    if free is not None and needed > 0.9 * free:
        return f"memory: {needed / 1e9:.1f} GB foreseen, {free / 1e9:.1f} GB free"
    foreseen = 2 * sum(forecast.seconds(f"{geometry} {name}", length, batch) for name in names)
    if foreseen > seconds:
        return f"time: {foreseen:.0f} s foreseen for the memory run and one round, more than {seconds:g} s"
    return None


def resumed(result: dict[str, Any], earlier: dict[str, Any], refuse: Callable[[str], Any]) -> dict[str, Any]:
    """The earlier result to go on with: every cell was measured in one process, so cells of two runs may stand side
    by side. ``refuse`` when they would not be alike."""
    for name in ("device", "torch", "transformers", "dtype", "clock", "keep_ratio", "steps", "headroom_columns"):
        if earlier[name] != result[name]:
            refuse(f"--resume: the file has {name} {earlier[name]}, this run {result[name]}; write to another file.")
    earlier.setdefault("resumed", []).append({"date": result["date"], "load_average": result["load_average"]})
    return earlier


def places(cells: list[str]) -> set[tuple[int, int]]:
    """(prompt tokens, batch) of "16384x1"."""
    return {(int(length), int(batch)) for length, batch in (cell.split("x") for cell in cells)}


def seen_before(cells: list[dict[str, Any]]) -> Forecast:
    forecast = Forecast()
    for cell in cells:
        for name, row in cell["settings"].items():
            decode = 2 * cell["batch"] * STEPS / row["decode_tokens_per_s"]["median"]
            seconds = row["prefill_ms"]["median"] / 1000 + decode
            forecast.note(f"{cell['model']} {name}", cell["prompt_tokens"], cell["batch"], seconds)
    return forecast


def run_kvpress(python: str, settings: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("kv_kvpress.py")
    out = subprocess.run([python, str(script), json.dumps(settings)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(GEOMETRIES), help="default: those of the device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float16 on CUDA, float32")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU (default 1); with one, times are CPU seconds"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a cell at most")
    parser.add_argument("--cell-seconds", type=float, default=100.0, help="for a cell: its memory run and one round")
    parser.add_argument("--kvpress-python", help="of an environment with kvpress==0.5.5 and transformers==5.2.0")
    parser.add_argument("--cells", nargs="+", metavar="TOKENSxBATCH", help="only these, for example 16384x1")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the file has, try those left out")
    parser.add_argument("--kvpress-cells", nargs="+", metavar="TOKENSxBATCH", help="default: all that were measured")
    parser.add_argument("--smoke", action="store_true", help="two small cells, one round: does it run?")
    args = parser.parse_args()

    start = time.perf_counter()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    plan = PLANS["smoke" if args.smoke else args.device]
    if args.models:
        plan = {name: plan.get(name, CELLS) for name in args.models}
    dtype, most = args.dtype or ("float16" if args.device == "cuda" else "float32"), 1 if args.smoke else args.repeats
    result: dict[str, Any] = {
        "benchmark": "kv",
        **environment(device),
        "clock": clock_name(device),
        "dtype": dtype,
        "keep_ratio": KEEP_RATIO,
        "steps": STEPS,
        "headroom_columns": HEADROOM,
        "repeats_at_most": most,
        "cell_seconds": args.cell_seconds,
        "notes": NOTES,
        "geometries": {},
        "cells": [],
        "left_out": [],
        "kvpress": None,
    }

    if args.resume and args.out.exists():
        result = resumed(result, json.loads(args.out.read_text()), parser.error)
    if args.cells:
        wanted = places(args.cells)
        plan = {geometry: [cell for cell in cells if cell in wanted] for geometry, cells in plan.items()}

    spent = result.get("seconds", 0.0)

    def save() -> None:
        result["seconds"] = round(spent + time.perf_counter() - start, 1)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    forecast = seen_before(result["cells"])
    measured = {(cell["model"], cell["prompt_tokens"], cell["batch"]) for cell in result["cells"]}
    for geometry, cells in plan.items():
        model, result["geometries"][geometry] = build(geometry, device=device, dtype=getattr(torch, dtype))
        for name in SETTINGS:  # what the libraries do once
            Case(model, name, prompt(model, 64, 1)).run(MEMORY_STEPS)
        for length, batch in cells:
            if (geometry, length, batch) in measured:
                continue
            known: dict[str, Any] = {"forecast": forecast, "geometry": geometry, "seconds": args.cell_seconds}
            place = {"model": geometry, "prompt_tokens": length, "batch": batch}
            result["left_out"] = [gap for gap in result["left_out"] if {**gap, **place} != gap]
            for names in TIERS:
                why = obstacle(model, names, length, batch, **known)
                if why is None:
                    print(f"{geometry}: {length} tokens x {batch}, {', '.join(names)}", flush=True)
                    try:
                        result["cells"].append(measure_cell(model, names, length, batch, **known, most=most))
                        break
                    except torch.cuda.OutOfMemoryError:
                        torch.cuda.empty_cache()
                        why = "memory: an allocation failed"
                result["left_out"] = [gap for gap in result["left_out"] if {**gap, **place} != gap]
                smaller = TIERS[TIERS.index(names) + 1 :]
                which = [name for name in SETTINGS if not smaller or name not in smaller[0]]
                result["left_out"].append({**place, "settings": which, "why": why})
            save()
        del model
    if args.kvpress_python:
        print("kvpress in its own environment", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # it needs the room
        geometry = next(name for name in plan if GEOMETRIES[name][0] == "llama")  # kvpress knows no Qwen2.5-VL
        there = {(c["prompt_tokens"], c["batch"]) for c in result["cells"] if c["model"] == geometry}
        asked = there & places(args.kvpress_cells) if args.kvpress_cells else there
        settings = {
            "model": geometry,
            "cells": sorted(asked, key=lambda cell: cell[::-1]),
            "device": args.device,
            "dtype": dtype,
            "steps": STEPS,
        }
        limits = {"repeats": most, "cell_seconds": args.cell_seconds / 4, "threads": torch.get_num_threads()}
        result["kvpress"] = run_kvpress(args.kvpress_python, {**settings, **limits, "keep_ratio": KEEP_RATIO})
        for length, batch in sorted(there - asked):
            gap = {"prompt_tokens": length, "batch": batch, "why": "not asked for"}
            result["kvpress"]["left_out"].append(gap)
    order = {place: i for i, place in enumerate((g, *c) for g in result["geometries"] for c in CELLS)}
    result["cells"].sort(key=lambda c: order.get((c["model"], c["prompt_tokens"], c["batch"]), 0))
    result["load_average_at_the_end"] = environment(device)["load_average"]
    save()
    print(markdown(result))


if __name__ == "__main__":
    main()
