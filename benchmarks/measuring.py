"""What the benchmarks measure with: times of settings that take turns, and peak memory of a call.

Peak memory is measured three ways:

* On CUDA: ``torch.cuda.max_memory_allocated`` less what was allocated before.
* On the CPU: torch's own ledger. The profiler (``profile_memory=True``) notes every allocation and release of torch's
  CPU allocator; the peak of their running sum is the extra memory of the call. It is exact, repeatable on a busy
  machine and the counterpart of the CUDA figure. It does not see scratch memory that oneDNN, MKL or OpenMP get from the
  system.
* ``ProcessPeak``, for a call in a fresh process on Linux: peak resident memory (VmHWM) less resident memory before. It
  sees everything, scratch included. Not ``ru_maxrss``: that survives exec, so in a child it begins at its parent's peak
  and hides any growth below it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import vlmeff

HOW = {
    "cuda": "torch.cuda.max_memory_allocated less memory_allocated before",
    "cpu": "running sum of the allocations and releases that torch.profiler (profile_memory) notes; library scratch "
    "memory is not in it",
}


def extra_peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Call ``run`` once; the most memory that torch held during it, beyond what it held before.

    Call ``run`` before, unmeasured, so that one-time allocations of the libraries do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


class ProcessPeak:
    """``with ProcessPeak() as peak: ...``, then ``peak.extra_bytes``; None where /proc does not tell (not Linux).

    Memory that the process has freed but not given back is reused unseen: measure in a fresh process that has freed
    nothing large.
    """

    extra_bytes: int | None = None

    def __enter__(self) -> ProcessPeak:
        with suppress(OSError):  # where it is not allowed the figure is an upper bound
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        peak = _status_bytes("VmHWM")
        if peak is not None and self._before is not None:
            self.extra_bytes = peak - self._before


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(name + ":")), None)
    return None if line is None else 1024 * int(line.split()[1])


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(cases: Mapping[str, Callable[[], float]], repeats: int, what: str) -> dict[str, list[float]]:
    """What each case returns in each round; every round starts with another case."""
    names = list(cases)
    out: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(repeats), description=what):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            out[name].append(cases[name]())
    return out


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def ratio(values: list[float], reference: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(values, reference, strict=True)), 4)


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was measured: device, threads, load, versions, date, and how peak memory is measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_cpu_name()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(n, 2) for n in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "vlmeff": vlmeff.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "peak_memory": HOW[device.type],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
