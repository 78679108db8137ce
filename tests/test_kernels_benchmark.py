"""The kernel benchmark: what it counts, when it accepts, and that its parts run. No time is asserted anywhere."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from vlmeff import ops

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULT, TABLES = BENCHMARKS / "results" / "kernels_cpu.json", BENCHMARKS / "results" / "kernels_cpu.md"
CPU = torch.device("cpu")
NAMES = ("kernels_run", "kernels_accept", "kernels_cases", "kernels_linear_cases", "kernels_suite", "kernels_tables",
         "kernels_timing", "kernels_work")  # fmt: skip
H200 = {"copy_bytes_s": 4.3e12, "products_flops_s": {"bf16": 788e12, "int8": 1576e12, "fp8": 1576e12},
        "exp_s": 132 * 16 * 1.98e9, "exp_how": "computed"}  # fmt: skip
OPERATIONS = set(ops.__all__) - {"backend", "counters", "explain", "StoredStates"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def named(cases: list[Any], op: str, name: str) -> Any:
    (found,) = [case for case in cases if (case.op, case.name) == (op, name)]
    return found


# ---- counting: figures of the specification, section 9.1, counted by hand for one H200

MASS = "attention_column_mass"
FLOORS = [  # op, case, MB, GFLOP, floor us, bound
    (MASS, "LLaVA, last 64 queries of 640", 5.8, 0.64, 1.4, "memory"),
    (MASS, "LLaVA, all 640 queries", 10.5, 3.4, 4.3, "products"),
    (MASS, "CLIP-L layer", 2.37, 1.36, 2.5, "exp"),
    (MASS, "Qwen, last 64 queries of 16384", 17.5, 15.0, 19, "products"),
    (MASS, "Qwen, last 64 queries of 16384, lse given", 17.5, 7.5, 9.5, "products"),
    (MASS, "Qwen, all 16384 queries", 134, 1924, 2440, "products"),
    (MASS, "Qwen vision layer, 4096 patches", 21, 86, 128, "exp"),
    (MASS, "Qwen vision layer, 65536 patches, lse given", 340, 10995, 16400, "exp"),
    ("gather_kv", "LLaVA, 32 layers, half of 640", 336, 0, 78, "memory"),
    ("gather_kv", "Qwen, 28 layers, a fifth of 16384", 376, 0, 87, "memory"),
    ("dct_resample", "24 x 24 to 12 x 12", 6, 0.085, 1.4, "memory"),
    ("dct_resample", "128 x 128 to 64 x 64", 264, 11.3, 61, "memory"),
    ("act_quant_int8", "Wan-14B, 32760 x 5120", 503, 0, 117, "memory"),
    ("act_quant_fp8", "Wan-14B, 32760 x 13824", 1359, 0, 316, "memory"),
    ("linear_w8a8_int8", "Wan-14B, 32760 x 5120 x 5120", 530, 1718, 1090, "products"),
    ("linear_w8a8_int8", "Wan-14B, 32760 x 13824 x 5120", 1144, 4637, 2943, "products"),
    ("linear_w8a8_fp8", "Wan-14B, 32760 x 5120 x 5120", 530, 1718, 1090, "products"),
    ("linear_w4a8_int8", "Wan-14B, 32760 x 5120 x 5120", 517, 1718, 1090, "products"),
    ("linear_wna16", "1 x 4096 x 11008, 4 bits", 23.2, 0.09, 5.4, "memory"),
]


@pytest.mark.parametrize(("op", "name", "megabytes", "gigaflop", "floor", "bound"), FLOORS)
def test_work_and_floors_are_those_counted_by_hand(
    scripts: SimpleNamespace, op: str, name: str, megabytes: float, gigaflop: float, floor: float, bound: str
) -> None:
    counted = named(scripts.kernels_suite.on_gpu(), op, name).work
    limits = scripts.kernels_work.Ceilings.of(H200)
    assert counted.bytes / 1e6 == pytest.approx(megabytes, rel=0.025)
    assert counted.flops / 1e9 == pytest.approx(gigaflop, rel=0.02)
    found, on = limits.floor(counted)
    assert found == pytest.approx(floor, rel=0.025, abs=0.05)
    assert on == bound


def test_counts_of_small_calls_are_exact(scripts: SimpleNamespace) -> None:
    work = scripts.kernels_work
    assert work.pairs(4, 4, causal=True) == 1 + 2 + 3 + 4
    assert work.pairs(2, 5, causal=True) == 4 + 5
    assert work.pairs(2, 5, causal=False) == 10
    found = work.attention_statistics(
        heads=4, kv_heads=2, rows=2, keys=5, dim=8, itemsize=2, out=10, causal=True, passes=2
    )
    assert found == work.Work(2 * 8 * (4 * 2 + 2 * 5) + 4 * 10, 2 * 8 * 4 * 9 * 2, exps=4 * 9 * 2)
    packed = work.attention_statistics(
        heads=1, kv_heads=1, rows=5, keys=5, dim=2, itemsize=4, out=5, causal=False, passes=1, segments=(2, 3)
    )
    assert packed.exps == 4 + 9
    assert work.gather(entries=3, width=10, itemsize=2, index=3).bytes == 2 * 3 * 20 + 24
    assert work.act_quant(2, 10, vectors=1).bytes == 40 + 20 + 8 + 40
    assert work.linear(2, 3, 4, x_bytes=1, w_bytes=0.5, y_bytes=4, arithmetic="int8") == work.Work(
        8 + 6 + 24, 48, "int8"
    )


def test_bytes_are_those_of_the_tensors(scripts: SimpleNamespace) -> None:
    """Of the cases for a CPU, which are small enough to be made: inputs and outputs, but for masks and positions."""
    for case in scripts.kernels_suite.on_cpu():
        if case.op in ("dct_resample", "text_to_vision_scores"):  # these count what goes on between
            continue
        call = case.make(CPU)
        with ops.backend("reference"):
            out = scripts.kernels_run.flat(getattr(ops, case.op)(**call.arguments))
        given = scripts.kernels_timing._tensors(call.arguments)
        if "gather" in case.op:  # reads what it keeps
            index = [t for t in given if t.dtype == torch.int64]
            size = 2 * sum(t.nbytes for t in out) + sum(t.nbytes for t in index)
        else:
            size = sum(t.nbytes for t in given) + sum(t.nbytes for t in out)
        assert case.work.bytes == pytest.approx(size, rel=0.03), case.key


# ---- the suite


def test_every_op_is_measured_on_both_devices(scripts: SimpleNamespace) -> None:
    for cases in (scripts.kernels_suite.on_gpu(), scripts.kernels_suite.on_cpu()):
        assert {case.op for case in cases} == OPERATIONS
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys)


def test_kernels_take_the_sizes_and_name_their_buckets(scripts: SimpleNamespace) -> None:
    """On tensors without values, launches recorded as for an H200: what a GPU would be asked for first."""
    pytest.importorskip("triton")
    from vlmeff_kernels import _launch

    meta = torch.device("meta")
    targets = [op for op, back_ends in scripts.kernels_run.vlmeff_kernels.OPS.items() if "triton" in back_ends]
    for case in [*scripts.kernels_suite.on_gpu(), *scripts.kernels_suite.small()]:
        if case.op in targets:
            arguments = case.make(meta).arguments
            with _launch.recording((9, 0)) as record, ops.backend("triton"):
                getattr(ops, case.op)(**arguments)
            assert record.launches, case.key
            assert scripts.kernels_run.bucket(case, "triton", arguments), case.key


def test_other_ways_give_the_numbers_of_the_op(scripts: SimpleNamespace) -> None:
    for case in scripts.kernels_suite.on_cpu():
        call = case.make(CPU)
        with ops.backend("reference"):
            expected = getattr(ops, case.op)(**call.arguments)
            accurate = expected if call.accurate is None else call.accurate()
        assert call.peers, case.key
        for run in [lambda e=expected: e, *call.peers.values()]:
            got = run()
            error, off = scripts.kernels_run.difference(regrouped(case.op, got), accurate)
            # Weights are expanded and multiplied in another order; scales are rounded differently.
            assert error < max(1e-4, case.tolerance), case.key
            assert off <= (1e-3 if "quant" in case.op else 0), case.key


def regrouped(op: str, got: Any) -> Any:
    """[(key, value), ...] as the op gives it: (keys, values)."""
    return tuple(map(list, zip(*got, strict=True))) if op == "gather_kv" and isinstance(got, list) else got


def test_the_first_of_each_op_and_patterns(scripts: SimpleNamespace) -> None:
    chosen, cases = scripts.kernels_run.chosen, scripts.kernels_suite.on_gpu()
    quick = chosen(cases, None, True)
    assert [case.op for case in quick] == list(dict.fromkeys(case.op for case in cases))
    assert quick[0] is cases[0]
    assert {case.op for case in chosen(cases, ["linear_w8*"], False)} == {"linear_w8a8_int8", "linear_w8a8_fp8"}


# ---- checks


def test_differences_of_results(scripts: SimpleNamespace) -> None:
    difference = scripts.kernels_run.difference
    x = torch.tensor([3.0, 4.0])
    assert difference(x, x.clone()) == (0, 0)
    assert difference(x + torch.tensor([0.0, 0.5]), x)[0] == pytest.approx(0.1)
    assert difference(x * torch.nan, x)[0] != difference(x * torch.nan, x)[0]
    codes = torch.arange(4, dtype=torch.int8)
    assert difference((codes, x), (codes + torch.tensor([0, 1, 0, 0], dtype=torch.int8), x)) == (0, 0.25)
    assert difference(codes, codes.flip(0))[1] == 3
    eighth = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert difference(eighth, eighth.clone()) == (0, 0)
    assert difference(x, x[:1])[0] != 0


class Fake:
    """A back end that is the reference, or as much off as it is told."""

    def __init__(self, times: float = 1.0, fails: bool = False) -> None:
        self.times, self.fails = times, fails

    def _back_end(self) -> Fake:
        return self

    def supports(self, **arguments: Any) -> str | None:
        return None

    def bucket(self, **arguments: Any) -> str:
        assert set(arguments) == {"x", "smooth", "bits", "group"}  # as dispatch passes them on
        return "wide" if arguments["x"].shape[1] > 100 else "narrow"

    def run(self, **arguments: Any) -> Any:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal instruction\nmore")
        with ops.backend("reference"):
            codes, scale = ops.act_quant_int8(**arguments)
        return codes, scale * self.times


@pytest.fixture
def run_as_if_on_a_gpu(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything but the clock and the device."""

    def run(back_ends: dict[str, Fake], seconds: float = 1e9, medians: dict[str, float] | None = None) -> Any:
        monkeypatch.setattr(scripts.kernels_run.vlmeff_kernels, "OPS", MappingProxyType({"act_quant_int8": back_ends}))
        monkeypatch.setattr(scripts.kernels_run, "ceilings", lambda device: H200)
        clock = iter(range(1, 10**6))

        def times(run: Any) -> dict[str, float]:
            return {"median": float(next(clock)), "low": 1.0, "high": 9.0}

        timed, compiled = scripts.kernels_run.time_on_gpu, scripts.kernels_run.compile_on_gpu
        monkeypatch.setattr(scripts.kernels_run, "time_on_gpu", partial(timed, timer=times, graphed=lambda runs: 0.5))
        monkeypatch.setattr(scripts.kernels_run, "compile_on_gpu", partial(compiled, timer=times))
        quantizer = scripts.kernels_linear_cases.quantizer_case
        cases = [quantizer("act_quant_int8", f"3 x {k}", 3, k, torch.float32) for k in (8, 200)]
        report = {"capability": "9.0", "quick": False, "device": "a GPU", "torch": "2", "triton": "3", "commit": "c"}
        result = {**report, "date": "today", "ceilings": None, "cases": []}
        saves: list[int] = []
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        scripts.kernels_run.on_device(cases, CPU, result, lambda: saves.append(1), seconds)
        assert len(saves) >= len(cases)
        return json.loads(json.dumps(result))  # what a file would hold

    return run


def test_a_run_checks_all_then_times_all(run_as_if_on_a_gpu: Any, scripts: SimpleNamespace) -> None:
    result = run_as_if_on_a_gpu({"cuda": Fake(), "triton": Fake(times=2.0), "torch": Fake(fails=True)})
    first, second = result["cases"]
    assert (first["op"], first["name"], first["bound"]) == ("act_quant_int8", "3 x 8", "memory")
    assert set(first["settings"]) == {"reference", "plain PyTorch", "cuda", "triton", "torch", "torch.compile"}
    assert [first["settings"][n]["correct"] for n in ("cuda", "triton", "torch")] == [True, False, False]
    assert first["settings"]["triton"]["error"] == pytest.approx(1)
    assert first["settings"]["torch"]["failed"] == "RuntimeError: CUDA error: an illegal instruction"
    assert "us" not in first["settings"]["torch"]
    assert [row["settings"]["cuda"]["bucket"] for row in result["cases"]] == ["narrow", "wide"]
    cuda = first["settings"]["cuda"]
    assert cuda["roofline"] == pytest.approx(first["floor_us"] / cuda["us"]["median"], abs=1e-4)
    assert cuda["graph_roofline"] == pytest.approx(first["floor_us"] / 0.5, abs=1e-4)
    reference = first["settings"]["reference"]["us"]["median"]
    assert cuda["times_faster_than"]["reference"] == pytest.approx(reference / cuda["us"]["median"], abs=1e-4)
    assert second["settings"]["torch.compile"]["kind"] == "compiled"
    text = scripts.kernels_tables.markdown(result)
    assert "| `act_quant_int8` | 3 x 8 | float32 |" in text
    assert "NO" in text
    assert "copy 4.30 TB/s" in text


def test_when_the_time_is_up_the_rest_is_named(run_as_if_on_a_gpu: Any, scripts: SimpleNamespace) -> None:
    result = run_as_if_on_a_gpu({"triton": Fake()}, seconds=1.0)
    for row in result["cases"]:
        assert "used up" in row["left_out"]["times"]
        assert "us" not in row["settings"]["triton"]
    (narrow, wide) = scripts.kernels_accept.decisions(result)
    assert not narrow.accepted
    assert not wide.accepted
    assert "not timed" in wide.why
    assert "used up" in scripts.kernels_tables.markdown(result)


def test_a_case_that_cannot_be_made_ends_neither_the_run_nor_goes_unseen(
    run_as_if_on_a_gpu: Any, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scripts.kernels_run.check

    def check(case: Any, device: torch.device) -> Any:
        if case.name == "3 x 8":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(case, device)

    monkeypatch.setattr(scripts.kernels_run, "check", check)
    result = run_as_if_on_a_gpu({"triton": Fake()})
    first, second = result["cases"]
    assert "out of memory" in first["unchecked"]
    assert second["settings"]["triton"]["us"]
    (wide,) = scripts.kernels_accept.decisions(result)
    assert not wide.accepted
    assert "3 x 8: not checked (OutOfMemoryError" in wide.why
    assert "out of memory" in scripts.kernels_tables.markdown(result)


# ---- the script


@pytest.mark.parametrize("package", [False, True])
def test_the_script_does_not_stand_in_the_way_of_the_package_of_its_name(tmp_path: Path, package: bool) -> None:
    """The folder of a script that runs comes first on sys.path."""
    if package:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '7'\nfrom kernels import inner\n")
        (tmp_path / "kernels" / "inner.py").write_text("here = 1\n")
    code = "import kernels; print(getattr(kernels, '__version__', None), getattr(kernels, '__file__', None) is None)\n"
    code += "from transformers.utils import is_kernels_available; print(is_kernels_available())\n"
    path = os.pathsep.join([str(BENCHMARKS), str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == (["7 False", "False"] if package else ["None True", "False"])


def test_calls_are_repeated_until_a_coarse_clock_moves(scripts: SimpleNamespace) -> None:
    made: list[int] = []
    count = scripts.kernels_timing.enough(made.append, clock=lambda: sum(made) * 80e-6 // 0.01 * 0.01)
    assert made == [2**i for i in range(len(made))]
    assert count == made[-1] == 1024  # of 80 us each; in steps of 10 ms, 512 of them show as 40


def test_inputs_of_a_graph_do_not_fit_into_a_cache(scripts: SimpleNamespace) -> None:
    timing = scripts.kernels_timing
    arguments = {"keys": [torch.zeros(1000, 1000)], "scale": 2.0, "states": (torch.ones(5), 3)}
    sets = timing.copies_of(arguments)
    assert len(sets) == 30
    assert sets[0] == arguments
    assert len({s["keys"][0].data_ptr() for s in sets}) == len(sets)
    assert sets[7]["states"][1] == 3
    assert torch.equal(sets[7]["states"][0], torch.ones(5))
    assert len(timing.copies_of({"x": torch.zeros(1)})) == timing.MOST_SETS


def test_a_cpu_run_writes_what_it_measured(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, page = tmp_path / "deep" / "k.json", tmp_path / "k.md"
    options = ["--device", "cpu", "--op", "act_quant_uint", "--op", "top_indices", "--rounds", "1"]
    command = ["kernels.py", *options, "--json", str(out), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # compiling would take long
    scripts.kernels_run.main()
    result = json.loads(out.read_text())
    assert {case["op"] for case in result["cases"]} == {"act_quant_uint", "top_indices"}
    assert result["device"].startswith("CPU, ")
    for case in result["cases"]:
        reference = case["settings"]["reference"]
        assert reference["us"]["median"] > 0
        assert reference["times_faster_than"]["plain PyTorch"] > 0
    assert page.read_text() == scripts.kernels_tables.markdown(result) + "\n"
    assert str(ROOT) not in out.read_text()
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--accept", str(out)])
    with pytest.raises(ValueError, match="only a GPU's result can be accepted"):
        scripts.kernels_run.main()
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--show", str(out)])
    capsys.readouterr()
    scripts.kernels_run.main()
    assert capsys.readouterr().out == page.read_text()


def test_the_help_names_the_script() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "benchmarks/kernels.py" in done.stdout


def test_the_committed_result_is_complete_and_its_tables_are_its_own(scripts: SimpleNamespace) -> None:
    result = json.loads(RESULT.read_text())
    assert {case["op"] for case in result["cases"]} == OPERATIONS
    assert result["load_average"]
    assert not result["quick"]
    assert TABLES.read_text() == scripts.kernels_tables.markdown(result) + "\n"
    for text in (RESULT.read_text(), TABLES.read_text()):
        assert "/tmp" not in text
        assert str(ROOT) not in text


def test_a_result_survives_its_file(scripts: SimpleNamespace, run_as_if_on_a_gpu: Any) -> None:
    result = run_as_if_on_a_gpu({"triton": Fake()})
    again = json.loads(json.dumps(copy.deepcopy(result)))
    assert scripts.kernels_accept.decisions(again) == scripts.kernels_accept.decisions(result)
    assert scripts.kernels_tables.markdown(again) == scripts.kernels_tables.markdown(result)
