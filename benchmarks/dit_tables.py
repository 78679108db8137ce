"""The tables of ``docs/diffusion.md`` from a result file of ``dit.py``. Nothing is computed here."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def markdown(result: dict[str, Any]) -> str:
    parts = [_linears(result, model) for model in dict.fromkeys(row["model"] for row in result["linears"])]
    parts += [_block(result), _end_to_end(result)]
    if result["left_out"]:
        parts.append("\n".join(f"Left out: {name} ({why})." for name, why in result["left_out"].items()))
    return "\n\n".join(parts)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([f"**{title}**", "", *lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _faster(case: dict[str, Any], base: str) -> str:
    return f"{case['times_faster_than'][base]:.2f}" if base in case["times_faster_than"] else "-"


def _bases(cases: dict[str, Any]) -> list[str]:
    return list(next(iter(cases.values()))["times_faster_than"])


def _linears(result: dict[str, Any], model: str) -> str:
    rows = [row for row in result["linears"] if row["model"] == model]
    reference = result["dtype"]
    columns = ["setting"]
    for row in rows:
        columns += [f"{row['layer']} {row['n']} x {row['k']}, ms", f"times faster than {reference}"]
    lines = []
    for name in rows[0]["cases"]:
        cells = [name]
        for row in rows:
            case = row["cases"].get(name)
            cells += ["-", "-"] if case is None else [f"{case['ms']['median']:.1f}", _faster(case, reference)]
        lines.append(cells)
    return _table(f"Linear layers of {model}, M = {rows[0]['m']}", columns, lines)


def _block(result: dict[str, Any]) -> str:
    block = result["block"]
    bases = _bases(block["cases"])
    columns = ["setting", "MiB", "ms", *(f"times faster than {base}" for base in bases)]
    rows = [
        [name, f"{case['bytes'] / MIB:.0f}", f"{case['ms']['median']:.0f}", *(_faster(case, base) for base in bases)]
        for name, case in block["cases"].items()
    ]
    return _table(f"One block of {block['model']}, {block['tokens']} video tokens", columns, rows)


def _end_to_end(result: dict[str, Any]) -> str:
    whole = result["end_to_end"]
    bases = _bases(whole["cases"])
    columns = [
        "setting",
        "weights, MiB",
        "peak beyond them, MiB",
        "steps/s",
        *(f"times faster than {b}" for b in bases),
    ]
    rows = [
        [
            name,
            f"{case['bytes'] / MIB:.2f}",
            f"{case['peak_bytes'] / MIB:.2f}",
            f"{case['steps_per_s']:.2f}",
            *(_faster(case, base) for base in bases),
        ]
        for name, case in whole["cases"].items()
    ]
    return _table(f"Whole denoising steps, {whole['model']}", columns, rows)
