"""The tables of ``docs/kv-cost.md`` from a result file of ``kv.py``:

    python benchmarks/kv_tables.py benchmarks/results/kv_cpu.json

Nothing is computed here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL, WINDOW = "prefixkv full", "prefixkv window"
MB = 1e6


def markdown(result: dict[str, Any]) -> str:
    parts = []
    for geometry in result["geometries"]:
        cells = [cell for cell in result["cells"] if cell["model"] == geometry]
        if cells:
            parts += [_scoring(geometry, cells), _decode(geometry, cells), _memory(geometry, cells)]
    if result["kvpress"]:
        parts.append(_kvpress(result["kvpress"], result["cells"]))
    if result["left_out"]:
        parts.append(_left_out(result["left_out"]))
    return "\n\n".join(parts)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([f"**{title}**", "", *lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _place(cell: dict[str, Any]) -> list[str]:
    return [str(cell["prompt_tokens"]), str(cell["batch"]), str(cell["repeats"])]


def _of(cell: dict[str, Any], name: str, form: str, read: Callable[[dict[str, Any]], float]) -> str:
    row = cell["settings"].get(name)
    return "left out" if row is None else format(read(row), form)


def _scoring(geometry: str, cells: list[dict[str, Any]]) -> str:
    columns = [
        *("prompt", "batch", "rounds"),
        *("scoring, full", "whole prefill, full", "scoring, window", "whole prefill, window"),
        *("scoring, SnapKV", "whole prefill, SnapKV"),
    ]
    rows = [
        _place(cell)
        + [
            _of(cell, name, form, lambda row, key=key: row[key])  # type: ignore[misc]
            for name in (FULL, WINDOW, "snapkv")
            for key, form in (("scoring_to_dynamic_prefill", ".3f"), ("prefill_to_dynamic", ".2f"))
        ]
        for cell in cells
    ]
    return _table(f"{geometry}: prefill, as a share of DynamicCache's", columns, rows)


def _decode(geometry: str, cells: list[dict[str, Any]]) -> str:
    columns = ["prompt", "batch", "rounds", "DynamicCache, tokens/s", FULL, WINDOW, "SnapKV", "keep all"]
    columns += [f"{name}, headroom" for name in (FULL, WINDOW, "SnapKV", "keep all")]
    rows = []
    for cell in cells:
        row = [*_place(cell), f"{cell['settings']['dynamic']['decode_tokens_per_s']['median']:.0f}"]
        names = (FULL, WINDOW, "snapkv", "keep all")
        row += [_of(cell, name, ".2f", lambda r: r["decode_to_dynamic"]) for name in names]
        row += [_of(cell, name, ".2f", lambda r: r["headroom"]["decode_to_dynamic"]) for name in names]
        rows.append(row)
    return _table(f"{geometry}: decode tokens/s, as a multiple of DynamicCache's", columns, rows)


def _memory(geometry: str, cells: list[dict[str, Any]]) -> str:
    columns = ["prompt", "batch", "DynamicCache, MB"]
    columns += [
        f"{what}, {name}" for what in ("cache", "decode peak", "prefill peak") for name in (FULL, WINDOW, "SnapKV")
    ]
    keys = ("cache_to_dynamic", "decode_peak_to_dynamic", "prefill_peak_to_dynamic")
    rows = [
        _place(cell)[:2]
        + [f"{cell['settings']['dynamic']['cache_bytes'] / MB:.1f}"]
        + [
            _of(cell, name, ".2f", lambda row, key=key: row[key])  # type: ignore[misc]
            for key in keys
            for name in (FULL, WINDOW, "snapkv")
        ]
        for cell in cells
    ]
    return _table(f"{geometry}: memory, as a share of DynamicCache's", columns, rows)


def _kvpress(kvpress: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    ours = {(c["prompt_tokens"], c["batch"]): c["settings"]["snapkv"] for c in cells if c["model"] == kvpress["model"]}
    columns = ["prompt", "batch", "rounds"]
    columns += [f"{what}, {who}" for what in ("prefill", "decode tokens/s", "cache") for who in ("kvpress", "vlmeff")]
    rows = []
    for cell in kvpress["cells"]:
        theirs, own = cell["snapkv_to_dynamic"], ours[cell["prompt_tokens"], cell["batch"]]
        figures = [
            *(theirs["prefill"], own["prefill_to_dynamic"]),
            *(theirs["decode_tokens_per_s"], own["decode_to_dynamic"]),
            *(theirs["cache_bytes"], own["cache_to_dynamic"]),
        ]
        rows.append(_place(cell) + [f"{figure:.2f}" for figure in figures])
    versions = f"kvpress {kvpress['kvpress']}, transformers {kvpress['transformers']}"
    return _table(f"SnapKV, each to the DynamicCache of its own environment ({versions})", columns, rows)


def _left_out(gaps: list[dict[str, Any]]) -> str:
    rows = [
        [
            g["model"],
            str(g["prompt_tokens"]),
            str(g["batch"]),
            ", ".join(g["settings"]) if "dynamic" not in g["settings"] else "all",
            g["why"],
        ]
        for g in gaps
    ]
    return _table("Left out", ["model", "prompt", "batch", "settings", "why"], rows)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
