"""What only a GPU can show of the kernels: the sizes of the benchmark, repeatability, graphs, streams, other devices.

The small sizes, dtypes, strides and masks are tested in the other files of this folder, natively where there is a GPU.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("kernels_run", "kernels_suite", "sanitize")
REPEATS = 20
SLEEP_CYCLES = 20_000_000  # some ten milliseconds: what is enqueued behind has not run yet when Python goes on
GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


def scripts() -> SimpleNamespace:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))


def each(which: str) -> list[Any]:
    """Cases with kernels of ours, as parameters; without a GPU one that stands for all, to be skipped."""
    if not GPU:
        return [pytest.param(None, "", id="all")]
    loaded = scripts()
    targets = loaded.sanitize.targets(None)
    cases = getattr(loaded.kernels_suite, which)()
    return [pytest.param(c, name, id=f"{c.key} | {name}") for c in cases for op, name in targets if op == c.op]


def every(which: str) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        for marker in (*gpu, pytest.mark.parametrize(("case", "name"), each(which))):
            function = marker(function)
        return function

    return mark


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    if GPU:
        torch.cuda.empty_cache()


class Runs:
    """A call of a back end that has been made once."""

    def __init__(self, case: Any, name: str, device: str = "cuda") -> None:
        self.name, self.function = name, getattr(ops, case.op)
        self.arguments = case.make(torch.device(device)).arguments
        try:
            self.first = self()
        except BackendUnavailableError as refused:
            pytest.skip(refused.reason)

    def __call__(self, **other: Any) -> list[Tensor]:
        with ops.backend(self.name), ops.counters() as ran:
            result = self.function(**{**self.arguments, **other})
        assert sum(ran.values()) == ran[self.function.__name__, self.name]
        return scripts().kernels_run.flat(result)


def same_bits(got: list[Tensor], expected: list[Tensor]) -> bool:
    def bits(x: Tensor) -> Tensor:
        return x.contiguous().view(torch.uint8)

    pairs = list(zip(got, expected, strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def moved(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor changed, those in lists and named tuples included."""
    if isinstance(value, dict):
        return {name: moved(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [moved(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value) if isinstance(value, Tensor) else value


@every("on_gpu")
def test_the_numbers_at_the_sizes_of_the_benchmark(case: Any, name: str) -> None:
    row = scripts().kernels_run.check(case, torch.device("cuda"))
    if name in row["left_out"]:
        pytest.skip(row["left_out"][name])
    assert row["settings"][name]["correct"], row["settings"][name]


@every("on_gpu")
def test_twenty_runs_are_equal_bit_by_bit(case: Any, name: str) -> None:
    run = Runs(case, name)
    assert all(same_bits(run(), run.first) for _ in range(REPEATS - 1))


@every("small")
def test_a_call_is_captured_in_a_graph_and_follows_its_inputs(case: Any, name: str) -> None:
    run = Runs(case, name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    for out in held:
        out.view(torch.uint8).fill_(0x7B)
    graph.replay()
    assert same_bits(held, run.first)
    for x in scripts().kernels_run.flat([v for v in run.arguments.values() if isinstance(v, Tensor)]):
        if x.is_floating_point() and x.dtype.itemsize > 1:
            x.mul_(-0.5)  # also scales: any numbers will do
    graph.replay()
    assert same_bits(held, run())


@every("small")
def test_a_call_runs_on_the_stream_that_is_current(case: Any, name: str) -> None:
    run = Runs(case, name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = moved(run.arguments, torch.empty_like)
        torch.cuda._sleep(SLEEP_CYCLES)
        copy_all(late, run.arguments)  # a kernel on another stream would read what was there before
        got = run(**late)
    side.synchronize()
    assert same_bits(got, run.first)


def copy_all(target: Any, source: Any) -> None:
    if isinstance(target, dict):
        target, source = list(target.values()), list(source.values())
    if isinstance(target, list | tuple):
        for a, b in zip(target, source, strict=True):
            copy_all(a, b)
    elif isinstance(target, Tensor):
        target.view(torch.uint8).copy_(source.contiguous().view(torch.uint8))


@every("small")
def test_nothing_waits_for_the_device(case: Any, name: str) -> None:
    run = Runs(case, name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(got, run.first)


@every("small")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_call_runs_where_its_tensors_are(case: Any, name: str) -> None:
    run = Runs(case, name)
    with torch.cuda.device(0):
        got = run(**moved(run.arguments, lambda x: x.to("cuda:1")))
    assert all(x.device == torch.device("cuda:1") for x in got)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert same_bits([x.to("cuda:0") for x in got], [x.to("cuda:0") for x in run.first])


@every("on_gpu")
def test_other_libraries_agree(case: Any, name: str) -> None:
    """What the benchmark compares times with computes the same: loosely, as it rounds elsewhere."""
    run = Runs(case, name)
    call = case.make(torch.device("cuda"))
    for peer, other in call.peers.items():
        if peer.startswith("torchao"):  # with weights of its own
            continue
        found = other()
        if case.op == "gather_kv":
            found = tuple(map(list, zip(*found, strict=True)))
        error, off = scripts().kernels_run.difference(run.first, found)
        assert error < 2e-2, peer
        assert off < 0.05, peer


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("op", ["gather_kv", "act_quant_int8"])
def test_the_memory_checker_finds_nothing(op: str) -> None:
    """One tool and two ops; ``benchmarks/sanitize.py`` runs all."""
    loaded = scripts()
    results = [loaded.sanitize.watched("memcheck", *target) for target in loaded.sanitize.targets([op])]
    assert not [row for row in results if row["result"] == "errors"]
