"""Which kernels a result of the kernel benchmark lets dispatch take, on invented results."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmeff import ops

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
MASS = "attention_column_mass"
OPERATIONS = set(ops.__all__) - {"backend", "counters", "explain", "StoredStates"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("kernels_accept", "kernels_run", "kernels_tables")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def row(
    op: str = "act_quant_int8", name: str = "a case", *, floor: float = 100.0, bound: str = "memory",
    sizes: dict[str, Any] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Settings: name=(kind, median) and for back ends (kind, median, bucket, correct)."""
    rows: dict[str, Any] = {}
    for setting, (kind, median, *more) in settings.items():
        rows[setting] = {"kind": kind} | ({} if median is None else {"us": {"median": median}})
        if kind == "backend":
            rows[setting] |= {"bucket": more[0], "correct": more[1], "error": 0.5, "integers_off": 0}
        if median is not None:
            rows[setting]["roofline"] = floor / median
    timed = {n: s["us"]["median"] for n, s in rows.items() if "us" in s}
    for n, mine in timed.items():
        rows[n]["times_faster_than"] = {other: theirs / mine for other, theirs in timed.items() if other != n}
    return {"op": op, "name": name, "sizes": sizes or {"m": 5, "k": 5}, "floor_us": floor, "bound": bound,
            "tolerance": 0.0, "settings": rows, "left_out": {}}  # fmt: skip


def found(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"capability": "9.0", "quick": False, "device": "H200", "torch": "2.11", "triton": "3.6", "commit": "abc",
            "date": "2026", "cases": list(rows)} | more  # fmt: skip


REFERENCE = ("reference", 900.0)


@pytest.mark.parametrize(
    ("case", "accepted", "why"),
    [
        (row(reference=REFERENCE, triton=("backend", 190.0, "all", True)), True, "1 of 1 cases pass"),
        (row(reference=REFERENCE, triton=("backend", 210.0, "all", True)), False, "0.48 of the roofline, 0.5"),
        (row(reference=REFERENCE, triton=("backend", 190.0, "all", False)), False, "wrong numbers (error 0.5"),
        (row(reference=("reference", 190.0), triton=("backend", 190.0, "all", True)), False, "no faster than ref"),
        (row(reference=REFERENCE, plain=("peer", 150.0), triton=("backend", 160.0, "all", True)), False,
         "no faster than plain (0.94 times)"),
        (row(reference=REFERENCE, dense=("yardstick", 1.0), compiled=("compiled", 1.0),
             triton=("backend", 160.0, "all", True)), True, "pass"),
        (row(reference=REFERENCE, triton=("backend", None, "all", True)), False, "not timed"),
        # Where launching is what takes the time there is no share to reach.
        (row(floor=2.0, reference=REFERENCE, triton=("backend", 15.0, "all", True)), True, "pass"),
        # A library behind dispatch is a rival; one that gives wrong numbers is not.
        (row(reference=REFERENCE, triton=("backend", 160.0, "all", True), torch=("backend", 150.0, None, True)), False,
         "no faster than torch"),
        (row(reference=REFERENCE, triton=("backend", 160.0, "all", True), torch=("backend", 150.0, None, False)), True,
         "pass"),
    ],
)  # fmt: skip
def test_what_one_case_decides(scripts: SimpleNamespace, case: dict[str, Any], accepted: bool, why: str) -> None:
    (decision,) = scripts.kernels_accept.decisions(found(case))
    assert (decision.op, decision.backend, decision.capability) == ("act_quant_int8", "triton", "9.0")
    assert decision.accepted == accepted
    assert why in decision.why


@pytest.mark.parametrize(
    ("op", "sizes", "bound", "floor", "share"),
    [
        (MASS, {"keys": 16384}, "products", 19.0, 0.4),
        (MASS, {"keys": 65536}, "exp", 16400.0, 0.4),
        (MASS, {"keys": 4096}, "exp", 128.0, None),
        ("linear_w8a8_int8", {"m": 32760}, "products", 1090.0, 0.6),
        ("linear_w8a8_int8", {"m": 4096}, "products", 136.0, None),
        ("linear_w8a8_fp8", {"m": 32760}, "products", 1090.0, None),
        ("gather_kv", {}, "memory", 20.1, 0.5),
        ("gather_kv", {}, "memory", 20.0, None),
    ],
)
def test_shares_of_the_roofline_that_are_demanded(
    scripts: SimpleNamespace, op: str, sizes: dict[str, Any], bound: str, floor: float, share: float | None
) -> None:
    assert scripts.kernels_accept.least_share(row(op, sizes=sizes, bound=bound, floor=floor)) == share


def test_all_cases_of_a_bucket_must_pass_and_buckets_are_apart(scripts: SimpleNamespace) -> None:
    good = row(name="good", reference=REFERENCE, triton=("backend", 150.0, "wide", True))
    bad = row(name="bad", reference=REFERENCE, triton=("backend", 950.0, "wide", True))
    other = row(name="other", reference=REFERENCE, triton=("backend", 150.0, "narrow", True))
    wide, narrow = scripts.kernels_accept.decisions(found(good, bad, other))
    assert (wide.bucket, wide.accepted, wide.cases) == ("wide", False, ("good", "bad"))
    assert wide.why.startswith("bad: ")
    assert (narrow.bucket, narrow.accepted) == ("narrow", True)


def test_a_back_end_must_beat_those_that_are_asked_after_it_only(scripts: SimpleNamespace) -> None:
    case = row(reference=REFERENCE, cuda=("backend", 150.0, "all", True), triton=("backend", 120.0, "all", True))
    cuda, triton = scripts.kernels_accept.decisions(found(case))
    assert (cuda.accepted, triton.accepted) == (False, True)
    swapped = row(reference=REFERENCE, cuda=("backend", 120.0, "all", True), triton=("backend", 150.0, "all", True))
    cuda, triton = scripts.kernels_accept.decisions(found(swapped))
    assert (cuda.accepted, triton.accepted) == (True, True)  # triton serves where the library was not built


def test_the_file_is_what_dispatch_reads_and_keeps_other_gpus(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from vlmeff_kernels import _backend

    def entry(op: str, capability: str) -> dict[str, Any]:
        return {"op": op, "backend": "triton", "capability": capability, "bucket": "old"}

    before = {
        "note": "",
        "accepted": [entry("act_quant_int8", "8.0"), entry("act_quant_int8", "9.0"), entry("x", "9.0")],
    }
    path = tmp_path / "accepted.json"
    path.write_text(json.dumps(before))
    result = found(row(reference=REFERENCE, triton=("backend", 150.0, "all", True)))
    scripts.kernels_run.accept(result, path)
    written = json.loads(path.read_text())
    assert [(r["op"], r["capability"], r["bucket"]) for r in written["accepted"]] == [
        ("act_quant_int8", "8.0", "old"), ("act_quant_int8", "9.0", "all"), ("x", "9.0", "old"),
    ]  # fmt: skip
    assert written["accepted"][1] | {"device": "H200", "commit": "abc", "cases": ["a case"]} == written["accepted"][1]
    printed = capsys.readouterr().out
    assert "| `act_quant_int8` | triton | 9.0 | all | accepted |" in printed
    (tmp_path / "vlmeff_kernels").mkdir()
    monkeypatch.setattr(_backend.resources, "files", lambda package: tmp_path)
    _backend.accepted.cache_clear()
    try:
        assert ("act_quant_int8", "triton", "9.0", "all") in _backend.accepted()
    finally:
        monkeypatch.undo()
        _backend.accepted.cache_clear()


def test_a_kernel_that_got_worse_loses_its_place(scripts: SimpleNamespace) -> None:
    good = found(row(reference=REFERENCE, triton=("backend", 150.0, "all", True)))
    first = scripts.kernels_accept.accepted_file(good, {"accepted": []})
    worse = found(row(reference=REFERENCE, triton=("backend", 950.0, "all", True)))
    assert scripts.kernels_accept.accepted_file(worse, first)["accepted"] == []
    gone = found(row(reference=REFERENCE))  # the back end is no more
    assert scripts.kernels_accept.accepted_file(gone, first)["accepted"] == []


def test_neither_quick_runs_nor_cpus_are_accepted(scripts: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="--quick"):
        scripts.kernels_accept.decisions(found(quick=True))
    of_cpu = found()
    del of_cpu["capability"]
    with pytest.raises(ValueError, match="only a GPU's"):
        scripts.kernels_accept.decisions(of_cpu)


def test_goals(scripts: SimpleNamespace) -> None:
    mass = row(MASS, bound="exp", sizes={"keys": 4096, "lse_given": True}, **{"SDPA forward": ("yardstick", 100.0)},
               triton=("backend", 125.0, "all", True))  # fmt: skip
    product = row("linear_w8a8_int8", bound="products", sizes={"m": 5}, **{"torch._int_mm alone": ("yardstick", 70.0)},
                  triton=("backend", 100.0, "all", True), torch=("backend", 80.0, None, True))  # fmt: skip
    moved = row("gather_kv", floor=79.0, reference=REFERENCE, cuda=("backend", 100.0, "all", True))
    rows = scripts.kernels_accept.goals(found(mass, product, moved))
    assert [(g["op"], g["backend"], g["value"], g["limit"], g["met"]) for g in rows] == [
        (MASS, "triton", 1.25, 1.3, True),
        ("linear_w8a8_int8", "triton", 0.7, 0.8, False),
        ("gather_kv", "cuda", 0.79, 0.8, False),
    ]
    text = scripts.kernels_tables.goals_table(rows)
    assert "| of the copy bandwidth | `gather_kv` | a case | cuda | 0.79 | 0.8 | missed |" in text
    assert not scripts.kernels_accept.goals(found(row(MASS, bound="exp", sizes={"keys": 5, "lse_given": False},
                                                      triton=("backend", 1.0, "all", True))))  # fmt: skip


# ---- what is committed


def test_what_is_accepted_names_ops_and_back_ends_that_exist() -> None:
    import vlmeff_kernels

    path = ROOT / "kernels" / "vlmeff_kernels" / "accepted.json"
    for entry in json.loads(path.read_text())["accepted"]:
        assert entry["backend"] in vlmeff_kernels.OPS[entry["op"]]
        assert entry["commit"]
        assert entry["cases"]


def test_the_page_names_every_op_its_back_ends_and_whether_it_was_measured() -> None:
    import vlmeff_kernels

    entries = json.loads((ROOT / "kernels" / "vlmeff_kernels" / "accepted.json").read_text())["accepted"]
    table = (ROOT / "docs" / "kernels.md").read_text().split("<!-- kernel table -->\n")[1].split("\n\n")[0]
    rows = {cells[1].strip(" `"): cells for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert set(rows) == OPERATIONS
    for op, (_, _, _, back_ends, measured, _) in rows.items():
        there = vlmeff_kernels.OPS.get(op, {})
        assert back_ends.strip() == (", ".join(there) or "-"), op
        if set(there) - {"torch"} and not [entry for entry in entries if entry["op"] == op]:
            assert measured.strip() == "not yet measured", op
