"""kvpress' SnapKV against the DynamicCache of its own environment. ``kv.py --kvpress-python`` runs it; by hand:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0
    kvpress/bin/python benchmarks/kv_kvpress.py '{"model": "llama-small", "cells": [[512, 1]]}'

kvpress 0.5.5 pins transformers below 5.3, so it cannot run beside vlmeff. Prints one line of JSON. Both settings take
turns in one process; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from typing import Any

import torch
from generating import Forecast, Request, build, clock_name, now, peaks, prompt, request, rounds
from kvpress import SnapKVPress
from transformers import DynamicCache

NAMES = ("dynamic", "snapkv")
DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "keep_ratio": 0.3,
    "window": 32,
    "kernel": 5,
    "steps": 32,
    "repeats": 5,
    "cell_seconds": 30.0,
    "threads": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="JSON: model, cells [[prompt tokens, batch], ...] and any of DEFAULTS")
    settings = {**DEFAULTS, **json.loads(parser.parse_args().settings)}
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    model, geometry = build(settings["model"], device=device, dtype=getattr(torch, settings["dtype"]))
    press = SnapKVPress(
        compression_ratio=1 - settings["keep_ratio"], window_size=settings["window"], kernel_size=settings["kernel"]
    )
    result: dict[str, Any] = {
        **environment(),
        "clock": clock_name(device),
        "model": settings["model"],
        "geometry": geometry,
        "settings": {name: settings[name] for name in ("dtype", "keep_ratio", "window", "kernel", "steps")},
        "cells": [],
        "left_out": [],
    }
    forecast = Forecast()
    cell(model, press, Forecast(), 64, 1, {**settings, "repeats": 1})  # what the libraries do once
    for length, batch in settings["cells"]:
        predicted = sum(2 * forecast.seconds(name, length, batch) for name in NAMES)
        if predicted > settings["cell_seconds"]:
            why = f"time: {predicted:.0f} s foreseen for one round, more than {settings['cell_seconds']:g} s"
            result["left_out"].append({"prompt_tokens": length, "batch": batch, "why": why})
            continue
        print(f"kvpress: {length} tokens x {batch}", file=sys.stderr)
        try:
            result["cells"].append(cell(model, press, forecast, length, batch, settings))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            result["left_out"].append({"prompt_tokens": length, "batch": batch, "why": "memory: allocation failed"})
    result["load_average_at_the_end"] = [round(n, 2) for n in os.getloadavg()]
    print(json.dumps(result))


@torch.no_grad()
def cell(
    model: Any, press: SnapKVPress, forecast: Forecast, length: int, batch: int, settings: dict[str, Any]
) -> dict[str, Any]:
    ids = prompt(model, length, batch)

    def run(name: str, steps: int, at_end: Any = None) -> Request:
        with press(model) if name == "snapkv" else contextlib.nullcontext():
            return request(model, ids, DynamicCache(config=model.config), steps=steps, at_end=at_end)

    most, spent = {}, 0.0
    for name in NAMES:
        start = now(ids.device)
        most[name] = peaks(lambda at_end, name=name: run(name, 4, at_end), ids.device)  # type: ignore[misc]
        forecast.note(name, length, batch, now(ids.device) - start)
        spent += now(ids.device) - start
    repeats = max(1, min(settings["repeats"], int(settings["cell_seconds"] / 3 / spent)))
    seen: dict[str, list[Request]] = {name: [] for name in NAMES}
    for name in rounds(NAMES, repeats):
        seen[name].append(run(name, settings["steps"]))
    full, kept = seen["dynamic"], seen["snapkv"]
    return {
        "prompt_tokens": length,
        "batch": batch,
        "repeats": repeats,
        "dynamic": {
            "prefill_ms": round(statistics.median(r.prefill_ms for r in full), 3),
            "decode_tokens_per_s": round(
                statistics.median(1000 * batch * settings["steps"] / r.first_ms for r in full), 3
            ),
        },
        "snapkv_to_dynamic": {
            "prefill": middle(a.prefill_ms / b.prefill_ms for a, b in zip(kept, full, strict=True)),
            "decode_tokens_per_s": middle(b.first_ms / a.first_ms for a, b in zip(kept, full, strict=True)),
            "cache_bytes": middle([kept[0].bytes[1] / full[0].bytes[1]]),
            "prefill_peak": middle([most["snapkv"][0] / most["dynamic"][0]]),
            "decode_peak": middle([most["snapkv"][1] / most["dynamic"][1]]),
        },
    }


def middle(values: Any) -> float:
    return round(statistics.median(values), 4)


def environment() -> dict[str, Any]:
    return {
        "kvpress": version("kvpress"),
        "transformers": version("transformers"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": [round(n, 2) for n in os.getloadavg()],
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
