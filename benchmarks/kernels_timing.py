"""How ``kernels.py`` measures: the device, what it reaches at best, and the time of a call."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from kernels_work import EXP_PER_CLOCK
from measuring import environment, interleaved, ratio, summary
from torch import Tensor

Run = Callable[[], Any]
SLOW_MS = 200.0  # from here on a few calls are enough
GRAPH_CALLS = 100
GRAPH_BYTES = 120e6  # inputs of the calls in a graph, in all: more than an L2 holds
MOST_SETS = 32
COPY_BYTES = 4_300_000_000  # read, and written again
PRODUCT = 8192
SHORT_S = 0.05  # on a CPU: shorter calls are repeated within a measurement
QUERIES = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu,driver_version"


def versions() -> dict[str, str | None]:
    names = ("triton", "torchao", "numpy")
    return {n: importlib.metadata.version(n) if importlib.util.find_spec(n) else None for n in names}


def commit() -> dict[str, Any]:
    """Hash of the checkout, and whether files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted_changes": None}


def device_report(device: torch.device) -> dict[str, Any]:
    report = environment(device) | versions() | commit()
    report["peak_memory"] = None
    report["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report |= {
            "capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "nvidia_smi": nvidia_smi(),
        }
    return report


def nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(QUERIES.split(","), values, strict=True))


def ceilings(device: torch.device) -> dict[str, Any]:
    """What the GPU reaches here: a large copy, and large products of random numbers. The rate of exponentials is
    computed from the clock."""
    copy = copy_rate(device)
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    products: dict[str, Run] = {"bf16": lambda: a @ b.T}
    a8, b8 = ((t * 25).round().clamp(-127, 127).to(torch.int8) for t in (a, b))
    products["int8"] = lambda: torch._int_mm(a8, b8.T)
    if torch.cuda.get_device_capability(device) >= (8, 9):
        af, bf = (t.to(torch.float8_e4m3fn) for t in (a, b))
        one = torch.ones((), device=device)
        products["fp8"] = lambda: torch._scaled_mm(af, bf.T, one, one, out_dtype=torch.bfloat16)
    rates = {name: 2 * PRODUCT**3 / (1e-6 * device_times(run)["median"]) for name, run in products.items()}
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    clock = max_clock_hz()
    return {
        "copy_bytes_s": copy,
        "products_flops_s": rates,
        "exp_s": EXP_PER_CLOCK * sms * clock,
        "exp_clock_hz": clock,
        "exp_how": f"{EXP_PER_CLOCK} a clock and SM, computed",
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-6 * device_times(lambda: target.copy_(source))["median"])


def max_clock_hz() -> float:
    with suppress(KeyError, ValueError, IndexError):
        return 1e6 * float(nvidia_smi()["clocks.max.sm"].split()[0])
    return 1.98e9  # of an H100 and H200


def device_times(run: Run) -> dict[str, float]:
    """Microseconds of a call by CUDA events, the L2 cache emptied before each: median, and the 20 % and 80 % marks."""
    from triton.testing import do_bench

    once = _by_events(run)
    if once > SLOW_MS:
        times = sorted([once, _by_events(run), _by_events(run)])
    else:
        times = sorted(do_bench(run, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8]))
    low, median, high = (1e3 * t for t in times)
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _by_events(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def graph_time(runs: list[Run]) -> float:
    """Microseconds of one call in a CUDA graph of ``GRAPH_CALLS``, which take turns among ``runs``: without the time
    that it takes to launch them from Python.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(GRAPH_CALLS):
            runs[i % len(runs)]()
    graph.replay()
    return round(1e3 * statistics.median(_by_events(graph.replay) for _ in range(7)) / GRAPH_CALLS, 3)


def copies_of(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments, and as many copies as keep the caches from holding all of them."""
    size = max(1, sum(t.numel() * t.element_size() for t in _tensors(arguments)))
    sets = min(MOST_SETS, max(1, -(-int(GRAPH_BYTES) // size)))
    return [dict(arguments), *({name: _copied(value) for name, value in arguments.items()} for _ in range(sets - 1))]


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    values = [item for v in arguments.values() for item in (v if isinstance(v, list | tuple) else [v])]
    return [v for v in values if isinstance(v, Tensor)]


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, tuple):
        items = [_copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.clone() if isinstance(value, Tensor) else value


def host_times(runs: Mapping[str, Callable[[int], None]], rounds: int, what: str) -> dict[str, dict[str, Any]]:
    """Microseconds of the processor for each, which take turns, and how many times faster each is than the others (the
    median over the rounds of the ratio within a round). A run makes as many calls as it is told."""
    for run in runs.values():
        run(1)
    calls = {name: enough(run) for name, run in runs.items()}
    cases = {name: lambda name=name: 1e6 * _process_time(runs[name], calls[name]) for name in runs}
    times = interleaved(cases, rounds, what)
    return {
        name: {
            "us": _named(summary(values)),
            "times_faster_than": {other: ratio(times[other], values) for other in runs if other != name},
        }
        for name, values in times.items()
    }


def enough(run: Callable[[int], None], clock: Callable[[], float] = time.process_time) -> int:
    """Calls that take ``SHORT_S``. Found by doubling: the clock of a process may stand still for ten milliseconds."""
    count = 1
    while True:
        start = clock()
        run(count)
        if clock() - start >= SHORT_S:
            return count
        count *= 2


def _named(found: dict[str, float]) -> dict[str, float]:
    return {"median": found["median"], "low": found["min"], "high": found["max"]}


def _process_time(run: Callable[[int], None], calls: int) -> float:
    start = time.process_time()
    run(calls)
    return (time.process_time() - start) / calls
