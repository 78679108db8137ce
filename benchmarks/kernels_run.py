"""Every op of ``vlmeff.ops``: its back ends against the reference, PyTorch's and other libraries' ways, and the device.

    python benchmarks/kernels.py --json benchmarks/results/kernels_h200.json --markdown kernels_h200.md
    python benchmarks/kernels.py --accept benchmarks/results/kernels_h200.json
    python benchmarks/kernels.py --device cpu --threads 1 --json benchmarks/results/kernels_cpu.json
    python benchmarks/kernels.py --show benchmarks/results/kernels_cpu.json

On a GPU one call takes at most ten minutes, in this order: what the device is and reaches (a large copy, large
products); whether every back end gives the reference's numbers in every case; times; torch.compile of the references in
the time that is left. A case that did not get its turn is named in the file. Times are medians by CUDA events with an
empty L2 cache; where the least possible time is under 20 us, also of calls in a CUDA graph.

``roofline`` is the least time that bytes, products and exponentials take at the ceilings measured in the same run,
divided by the time. ``--accept`` writes the file by which ``vlmeff.ops`` takes a kernel by default: see
``kernels_accept.py``.

On a CPU: the reference against the expression that a user would write and torch.compile of the reference, in seconds
of the processor, settings taking turns. The figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch._inductor.config
import vlmeff_kernels
from kernels_accept import ACCEPTED, accepted_file, decisions, goals
from kernels_cases import Call, Case
from kernels_suite import on_cpu, on_gpu
from kernels_tables import decisions_table, markdown
from kernels_timing import ceilings, copies_of, device_report, device_times, graph_time, host_times
from kernels_work import Ceilings
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError
from vlmeff.ops import _dispatch

LIMIT_S = 570  # of one call
CHECKS_SHARE = 0.4  # of the time, to be left when the checks end
COMPILE_S = 45  # less than this left: no further torch.compile
LAUNCH_BOUND_US = 20
GRAPH_LONGEST_US = 200
REFERENCE, COMPILED, COMBINED = "reference", "torch.compile", "accelerated"
ON_CPU = ("torch",)  # back ends that are meant for CPU tensors too
Row: TypeAlias = dict[str, Any]
Timer = Callable[[Callable[[], Any]], dict[str, float]]


def function(case: Case) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(ops, case.op)
    return found


def back_ends(case: Case) -> list[str]:
    """Names to ask for. An op without kernels of its own may be made of ops that have some."""
    return list(vlmeff_kernels.OPS.get(case.op, {})) or ([COMBINED] if case.op == "text_to_vision_scores" else [])


def dispatched(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the back ends get them."""
    seen: list[dict[str, Any]] = []

    def choose(op: str, given: dict[str, Any]) -> Any:
        seen.append(given)
        return real(op, given)

    real = _dispatch._choose
    with mock.patch.object(_dispatch, "_choose", choose), ops.backend("reference"):
        ops.explain(case.op, **arguments)
    return dict(seen[0])


def bucket(case: Case, name: str, arguments: dict[str, Any]) -> str | None:
    """The range of sizes that is accepted as one, or None for what needs no acceptance."""
    later: Any = vlmeff_kernels.OPS.get(case.op, {}).get(name)
    back_end = None if later is None else later._back_end()
    return str(back_end.bucket(**dispatched(case, arguments))) if hasattr(back_end, "bucket") else None


# ---- correctness


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def difference(got: Any, expected: Any) -> tuple[float, float]:
    """(relative Frobenius error over the floats, share of integers that differ; above 1 if one is off by more than 1).

    Floats of equal bits count as equal, NaN included; a NaN anywhere else makes the error NaN.
    """
    worst, off = 0.0, 0.0
    for a, b in zip(flat(got), flat(expected), strict=True):
        if a.shape != b.shape:
            return float("nan"), float("nan")
        if a.dtype.is_floating_point and a.dtype.itemsize > 1:
            if a.dtype == b.dtype and torch.equal(a, b):
                continue
            distance, norm = (a.double() - b.double()).norm(), b.double().norm()
            worst = max(worst, float(distance / norm.clamp(min=1e-300)), key=lambda v: (v != v, v))
        elif a.numel():
            steps = (a.view(torch.uint8) if a.is_floating_point() else a).int()
            steps = (steps - (b.view(torch.uint8) if b.is_floating_point() else b).int()).abs()
            off = max(off, float((steps != 0).float().mean()), float(steps.max()) if int(steps.max()) > 1 else 0.0)
    return worst, off


def described(case: Case) -> Row:
    return {
        **{"op": case.op, "name": case.name, "dtype": case.dtype, "sizes": dict(case.sizes)},
        **{"bytes": case.work.bytes, "flops": case.work.flops, "arithmetic": case.work.arithmetic},
        **{"exps": case.work.exps, "tolerance": case.tolerance, "settings": {}, "left_out": {}},
    }


def check(case: Case, device: torch.device, names: Iterable[str] | None = None) -> Row:
    """Run the back ends, all when left out, once, compare, and note how long the first call took (it compiles)."""
    call, row = case.make(device), described(case)
    with ops.backend(REFERENCE):
        expected = function(case)(**call.arguments) if call.accurate is None else call.accurate()
    for name in back_ends(case) if names is None else names:
        start = time.perf_counter()
        try:
            with ops.backend(name):
                got = function(case)(**call.arguments)
            settle(device)
            first = time.perf_counter() - start
            error, off = difference(got, expected)
        except BackendUnavailableError as refused:
            row["left_out"][name] = refused.reason
            continue
        except Exception as failed:  # a kernel that fails must not end the run, nor hide
            row["settings"][name] = {"kind": "backend", "correct": False, "failed": first_line(failed),
                                     "bucket": None}  # fmt: skip
            with suppress(Exception):
                row["settings"][name]["bucket"] = bucket(case, name, call.arguments)
            continue
        row["settings"][name] = {
            **{"kind": "backend", "bucket": bucket(case, name, call.arguments), "first_call_s": round(first, 3)},
            **{"error": error, "integers_off": off, "correct": error <= case.tolerance and off <= case.codes_off},
        }
    return row


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- times


def within(name: str, kind: str) -> AbstractContextManager[Any]:
    """Where the call of a setting is to be made: once around many calls, so that choosing costs none of their time."""
    if kind == "compiled":
        return ops.backend(REFERENCE)
    return ops.backend(name) if kind in ("reference", "backend") else nullcontext()


def settings_of(case: Case, call: Call, row: Row) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name -> (kind, call), of what can run here; what cannot goes to ``left_out``."""
    own = partial(function(case), **call.arguments)
    found: dict[str, tuple[str, Callable[[], Any]]] = {REFERENCE: ("reference", own)}
    for name, setting in row["settings"].items():
        if setting["kind"] == "backend" and "failed" not in setting:
            found[name] = ("backend", own)
    for kind, runs in (("peer", call.peers), ("yardstick", call.yardsticks)):
        for name, run in runs.items():
            try:
                run()
            except Exception as refused:  # another library, another device: not ours to judge
                row["left_out"][name] = first_line(refused)
            else:
                found[name] = (kind, run)
    return found


def time_on_gpu(
    case: Case, row: Row, device: torch.device, timer: Timer = device_times, graphed: Any = graph_time
) -> None:
    call = case.make(device)
    for name, (kind, run) in settings_of(case, call, row).items():
        setting = row["settings"].setdefault(name, {"kind": kind})
        with within(name, kind):
            setting["us"] = timer(run)
            if row["floor_us"] < LAUNCH_BOUND_US and setting["us"]["median"] < GRAPH_LONGEST_US:
                own = kind in ("reference", "backend")
                runs = [partial(function(case), **a) for a in copies_of(call.arguments)] if own else [run]
                try:
                    setting["graph_us"] = graphed(runs)
                except RuntimeError as refused:
                    setting["graph_us"] = None
                    setting["graph_refused"] = first_line(refused)
    row["measured"] = True


def compile_on_gpu(case: Case, row: Row, device: torch.device, timer: Timer = device_times) -> None:
    run, seconds = compiled(case, case.make(device))
    with within(COMPILED, "compiled"):
        row["settings"][COMPILED] = {"kind": "compiled", "first_call_s": seconds, "us": timer(run)}


def compiled(case: Case, call: Call) -> tuple[Callable[[], Any], float]:
    """torch.compile of the reference, called once, and the seconds that took."""
    torch._dynamo.reset()
    run = partial(torch.compile(function(case), dynamic=False), **call.arguments)
    start = time.perf_counter()
    with within(COMPILED, "compiled"), torch._inductor.config.patch(force_disable_caches=True):
        run()
    return run, round(time.perf_counter() - start, 2)


def time_on_cpu(case: Case, row: Row, rounds: int) -> None:
    call = case.make(torch.device("cpu"))
    found = settings_of(case, call, row)
    if case.compiled:
        run, seconds = compiled(case, call)
        found[COMPILED] = ("compiled", run)
        row["settings"][COMPILED] = {"kind": "compiled", "first_call_s": seconds}
    else:
        row["left_out"][COMPILED] = "the blocks of queries are unrolled: too long to compile"
    kinds = {name: kind for name, (kind, _) in found.items()}
    runs = {name: inside(name, *setting) for name, setting in found.items()}
    for name, times in host_times(runs, rounds, case.key).items():
        row["settings"].setdefault(name, {"kind": kinds[name]}).update(times)
    row["measured"] = True


def inside(name: str, kind: str, run: Callable[[], Any]) -> Callable[[int], None]:
    """Make a number of calls."""

    def calls(count: int) -> None:
        with within(name, kind):
            for _ in range(count):
                run()

    return calls


def finish(row: Row) -> None:
    """What follows from the medians: shares of the roofline and how many times faster than each other setting."""
    timed = {name: s["us"]["median"] for name, s in row["settings"].items() if "us" in s}
    for name, mine in timed.items():
        setting = row["settings"][name]
        setting.setdefault("times_faster_than", {})
        setting["times_faster_than"] |= {
            other: round(theirs / mine, 4) for other, theirs in timed.items()
            if other != name and other not in setting["times_faster_than"]
        }  # fmt: skip
        if row.get("floor_us"):
            setting["roofline"] = round(row["floor_us"] / mine, 4)
            if setting.get("graph_us"):
                setting["graph_roofline"] = round(row["floor_us"] / setting["graph_us"], 4)


# ---- the whole


def chosen(cases: Iterable[Case], patterns: list[str] | None, quick: bool) -> list[Case]:
    some = [c for c in cases if patterns is None or any(fnmatch.fnmatch(c.op, p) for p in patterns)]
    if quick:  # the first of each op
        first: dict[str, Case] = {}
        for case in some:
            first.setdefault(case.op, case)
        some = list(first.values())
    return some


def on_device(cases: list[Case], device: torch.device, result: Row, save: Callable[[], None], limit_s: float) -> None:
    start = time.monotonic()

    def left() -> float:
        return limit_s - (time.monotonic() - start)

    result["ceilings"] = ceilings(device)
    limits = Ceilings.of(result["ceilings"])
    rows = []
    for case in cases:
        try:
            if left() < CHECKS_SHARE * limit_s:
                raise TimeoutError(f"the checks took more than {1 - CHECKS_SHARE:.0%} of the {limit_s:.0f} s")
            row = check(case, device)
        except Exception as failed:  # the reference or a library, for want of memory say
            row = {**described(case), "unchecked": first_line(failed)}
            row["left_out"]["times"] = row["unchecked"]
        row["floor_us"], row["bound"] = limits.floor(case.work)
        rows.append(row)
        result["cases"] = rows
        save()
        torch.cuda.empty_cache()
    for what, least_s, phase in (("times", 5, time_on_gpu), (COMPILED, COMPILE_S, compile_on_gpu)):
        for case, row in zip(cases, rows, strict=True):
            if "unchecked" in row:
                continue
            if what == COMPILED and not case.compiled:
                row["left_out"][what] = "its loops are unrolled: too long to compile"
            elif left() < least_s:
                row["left_out"][what] = f"the {limit_s:.0f} s of the call were used up"
            else:
                try:
                    phase(case, row, device)
                except Exception as failed:  # the others are still to be measured
                    row["left_out"][what] = first_line(failed)
            finish(row)
            save()
            torch.cuda.empty_cache()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="an op, or a pattern such as 'linear_*'; may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case of each op; such a result cannot be accepted")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--markdown", type=Path, help="its tables")
    about = "write accepted.json from this run, or from a result file and measure nothing"
    parser.add_argument("--accept", nargs="?", const=True, default=False, metavar="FILE", help=about)
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a result file, and end")
    parser.add_argument("--rounds", type=int, default=7, help="on a CPU")
    parser.add_argument("--threads", type=int, help="of a CPU; as torch has it when left out")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="on a GPU: the longest that the call may take")
    return parser.parse_args()


def accept(result: Row, path: Path = ACCEPTED) -> None:
    before = json.loads(path.read_text())
    path.write_text(json.dumps(accepted_file(result, before), indent=2) + "\n")
    print(decisions_table(decisions(result)))


def main() -> None:
    args = parsed()
    if args.show is not None:
        print(markdown(json.loads(args.show.read_text())))
        return
    if isinstance(args.accept, str):
        accept(json.loads(Path(args.accept).read_text()))
        return
    torch.set_grad_enabled(False)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, start = torch.device(args.device), time.perf_counter()
    result: Row = {**device_report(device), "quick": args.quick, "ops": args.op, "ceilings": None, "cases": []}
    result["times"] = "microseconds of the processor" if device.type == "cpu" else "microseconds by CUDA events"

    def save() -> None:
        """After every case, so that a run that is interrupted leaves what it has measured."""
        result["seconds"] = round(time.perf_counter() - start)
        if hasattr(os, "getloadavg"):
            result["load_average_at_the_end"] = [round(n, 2) for n in os.getloadavg()]
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    if device.type == "cuda":
        on_device(chosen(on_gpu(), args.op, args.quick), device, result, save, args.seconds)
        result["goals"] = goals(result)
        save()
    else:
        for case in chosen(on_cpu(), args.op, args.quick):
            # Not the kernels for a GPU: where they are interpreted they would take CPU tensors, and hours.
            names = [name for name in back_ends(case) if name in ON_CPU]
            row = check(case, device, names)
            time_on_cpu(case, row, args.rounds)
            finish(row)
            result["cases"].append(row)
            save()
    text = markdown(result)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n")
    print(text)
    if args.accept:
        accept(result)
