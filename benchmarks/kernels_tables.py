"""The tables of a result file of ``kernels.py``. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
REPORT = ("device", "capability", "sms", "torch", "triton", "cuda", "commit", "uncommitted_changes", "date", "threads",
          "load_average", "load_average_at_the_end", "seconds", "quick")  # fmt: skip


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def markdown(result: Row) -> str:
    parts = [_report(result), _ceilings(result), _gpu(result) if result["ceilings"] else _cpu(result)]
    if result.get("goals"):
        parts.append(goals_table(result["goals"]))
    parts.append(_left_out(result))
    return "\n\n".join(part for part in parts if part)


def goals_table(goals: list[Row]) -> str:
    columns = ["goal", "op", "case", "back end", "value", "limit", ""]
    rows = [
        [g["goal"], f"`{g['op']}`", g["case"], g["backend"], f"{g['value']:.2f}", str(g["limit"]),
         "met" if g["met"] else "missed"]
        for g in goals
    ]  # fmt: skip
    return "**Goals**\n\n" + table(columns, rows)


def decisions_table(decisions: Iterable[Any]) -> str:
    rows = [
        [f"`{d.op}`", d.backend, d.capability, d.bucket, "accepted" if d.accepted else "refused", d.why]
        for d in decisions
    ]
    return table(["op", "back end", "compute capability", "sizes", "", "why"], rows)


def _report(result: Row) -> str:
    facts = [f"{name.replace('_', ' ')} {result[name]}" for name in REPORT if result.get(name) is not None]
    smi = result.get("nvidia_smi") or {}
    return ", ".join([*facts, *(f"{name} {value}" for name, value in smi.items())]) + "."


def _ceilings(result: Row) -> str:
    found = result["ceilings"]
    if not found:
        return ""
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in found["products_flops_s"].items())
    copied = f"copy {found['copy_bytes_s'] / 1e12:.2f} TB/s"
    return f"Ceilings: {copied}; products {rates}; {found['exp_s'] / 1e12:.2f}e12 exponentials/s ({found['exp_how']})."


def _gpu(result: Row) -> str:
    columns = ["op", "case", "dtype", "MB", "GFLOP", "floor us", "bound", "setting", "median us", "20-80 %"]
    columns += ["in a graph", "roofline", "times faster than the reference", "right"]
    rows = []
    for case in result["cases"]:
        for i, (name, setting) in enumerate(case["settings"].items()):
            head = _head(case) if not i else [""] * 7
            rows.append([*head, name, *_times(setting), *_shares(setting)])
    return "**Times**\n\n" + table(columns, rows)


def _head(case: Row) -> list[str]:
    work = [f"{case['bytes'] / 1e6:.1f}", f"{case['flops'] / 1e9:.1f}", f"{case['floor_us']:.1f}", case["bound"]]
    return [f"`{case['op']}`", case["name"], case["dtype"], *work]


def _times(setting: Row) -> list[str]:
    if "us" not in setting:
        return ["-", "-", "-"]
    us, graph = setting["us"], setting.get("graph_us")
    return [f"{us['median']:.1f}", f"{us['low']:.1f}-{us['high']:.1f}", "-" if graph is None else f"{graph:.1f}"]


def _shares(setting: Row) -> list[str]:
    roofline = setting.get("graph_roofline", setting.get("roofline")) if setting["kind"] == "backend" else None
    faster = setting.get("times_faster_than", {}).get("reference")
    right = {True: "yes", False: "NO", None: ""}[setting.get("correct")]
    return ["-" if roofline is None else f"{roofline:.2f}", "-" if faster is None else f"{faster:.2f}", right]


def _cpu(result: Row) -> str:
    """How many times faster the reference is than the others."""
    columns = ["op", "case", "dtype", "reference, ms of the processor", "times faster than plain PyTorch"]
    columns += ["than torch.compile of it (which took, s)", "than other ways"]
    columns += ["back ends, times faster than the reference"]
    rows = []
    for case in result["cases"]:
        settings = case["settings"]
        if "us" not in settings.get("reference", {}):
            continue
        faster = settings["reference"]["times_faster_than"]
        compiled = settings.get("torch.compile", {})
        others = [f"{name} {faster[name]:.2f}" for name, s in settings.items()
                  if s["kind"] in ("peer", "yardstick") and name != "plain PyTorch" and name in faster]  # fmt: skip
        ours = [f"{name} {s['times_faster_than']['reference']:.2f}" for name, s in settings.items()
                if s["kind"] == "backend" and "times_faster_than" in s]  # fmt: skip
        rows.append([
            f"`{case['op']}`", case["name"], case["dtype"], f"{settings['reference']['us']['median'] / 1e3:.2f}",
            f"{faster['plain PyTorch']:.2f}" if "plain PyTorch" in faster else "-",
            f"{faster['torch.compile']:.2f} ({compiled['first_call_s']:.0f})" if "torch.compile" in faster else "-",
            ", ".join(others) or "-", ", ".join(ours) or "-",
        ])  # fmt: skip
    return "**The references on a CPU**\n\n" + table(columns, rows)


def _left_out(result: Row) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for name, why in case["left_out"].items():
            found.setdefault((name, why), []).append(f"{case['op']} ({case['name']})")
    lines = [f"- {name}: {why}. {len(cases)} cases: {', '.join(cases[:4])}{', ...' if len(cases) > 4 else ''}"
             for (name, why), cases in found.items()]  # fmt: skip
    return "**Left out**\n\n" + "\n".join(lines) if lines else ""
