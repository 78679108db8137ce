"""Which kernels a result of ``kernels.py`` lets ``vlmeff.ops`` take by default, and how far its goals are met.

Accepted is a range of sizes (what the back end calls a bucket) on one compute capability, if in every case measured in
it the back end

* gave the reference's numbers;
* reached its share of the roofline: 0.5 where memory is the bound and the least time is above 20 us, 0.6 for W8A8 int8
  at the 32,760 tokens of a video, 0.4 for column mass over 16,384 keys and more; other cases have none;
* was faster than the reference, than every peer and than every back end that dispatch would look at later.

Yardsticks (an unquantized layer, SDPA, a product without its epilogue) compute something else and torch.compile is not
what dispatch would run instead: neither decides, both are in the tables.

The goals are about single cases and decide nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmeff.ops._dispatch import ACCELERATED

ACCEPTED = Path(__file__).resolve().parents[1] / "kernels" / "vlmeff_kernels" / "accepted.json"
NOTE = "Written by benchmarks/kernels.py --accept from a result file."
Row = dict[str, Any]

MEMORY_SHARE, MEMORY_FLOOR_US = 0.5, 20.0
INT8_SHARE, INT8_ROWS = 0.6, 32760
COLUMN_SHARE, COLUMN_KEYS = 0.4, 16384

# Goals beyond acceptance.
SDPA_TIMES, INT8_OF_LIBRARY, COPY_SHARE = 1.3, 0.8, 0.8


@dataclass(frozen=True)
class Decision:
    op: str
    backend: str
    capability: str
    bucket: str
    accepted: bool
    why: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Goal:
    goal: str
    op: str
    case: str
    backend: str
    value: float
    limit: float
    met: bool


def least_share(row: Row) -> float | None:
    """The share of the roofline that a case demands."""
    sizes = row["sizes"]
    if row["op"] == "attention_column_mass" and sizes["keys"] >= COLUMN_KEYS:
        return COLUMN_SHARE
    if row["op"] == "linear_w8a8_int8" and sizes["m"] == INT8_ROWS:
        return INT8_SHARE
    if row["bound"] == "memory" and row["floor_us"] > MEMORY_FLOOR_US:
        return MEMORY_SHARE
    return None


def complaint(row: Row, name: str) -> str | None:
    """Why this case speaks against the back end, or None."""
    setting = row["settings"][name]
    if "failed" in setting:
        return f"it failed ({setting['failed']})"
    if not setting["correct"]:
        return f"wrong numbers (error {setting['error']:.2g}, allowed {row['tolerance']:.2g})"
    if "us" not in setting:
        return f"not timed ({row['left_out'].get('times', 'the run ended before')})"
    share = least_share(row)
    if share is not None and setting["roofline"] < share:
        return f"{setting['roofline']:.2f} of the roofline, {share} are needed"
    faster = setting["times_faster_than"]
    for other in rivals(row, name):
        if other in faster and not faster[other] > 1:
            return f"no faster than {other} ({faster[other]:.2f} times)"
    return None


def rivals(row: Row, name: str) -> Iterator[str]:
    """The settings that a back end must beat. Of the other back ends, those that dispatch would look at after it and
    that are right; an earlier one is left to be decided for itself."""
    after = ACCELERATED[ACCELERATED.index(name) + 1 :]
    for other, setting in row["settings"].items():
        if setting["kind"] in ("reference", "peer") or (other in after and setting["correct"]):
            yield other


def decisions(result: Row) -> list[Decision]:
    """One for each (op, back end, bucket) of a result.

    Raises:
        ValueError: the result is of a quick run or of a CPU.
    """
    if result["quick"]:
        raise ValueError("kernels: a --quick run measures one case of an op; measure all before accepting")
    if "capability" not in result:
        raise ValueError(f"kernels: only a GPU's result can be accepted, this is of {result['device']}")
    grouped: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in result["cases"]:
        for name, setting in row["settings"].items():
            if setting["kind"] == "backend" and setting["bucket"] is not None:
                grouped[row["op"], name, setting["bucket"]].append(row)
    found = []
    for (op, name, bucket), rows in grouped.items():
        wrong = [f"{row['name']}: {why}" for row in rows if (why := complaint(row, name)) is not None]
        # Which bucket such a case belongs to is not known.
        wrong += [f"{row['name']}: not checked ({row['unchecked']})" for row in result["cases"]
                  if row["op"] == op and "unchecked" in row]  # fmt: skip
        why = "; ".join(wrong) if wrong else f"{len(rows)} of {len(rows)} cases pass"
        cases = tuple(row["name"] for row in rows)
        found.append(Decision(op, name, result["capability"], bucket, not wrong, why, cases))
    return found


def accepted_file(result: Row, before: Row) -> Row:
    """The new contents of accepted.json. Earlier entries stay if they are about other GPUs or ops."""
    made = decisions(result)
    again = {(d.op, d.capability) for d in made} | {(row["op"], result["capability"]) for row in result["cases"]}
    kept = [row for row in before["accepted"] if (row["op"], row["capability"]) not in again]
    evidence = {name: result[name] for name in ("device", "torch", "triton", "commit", "date")}
    new = [
        {"op": d.op, "backend": d.backend, "capability": d.capability, "bucket": d.bucket, "cases": list(d.cases),
         **evidence}
        for d in made if d.accepted
    ]  # fmt: skip
    order = sorted([*kept, *new], key=lambda row: (row["op"], row["backend"], row["capability"], row["bucket"]))
    return {"note": NOTE + ("" if order else " Empty: nothing was accepted."), "accepted": order}


def goals(result: Row) -> list[Row]:
    """The speed goals, case by case and for each of our back ends that was timed."""
    return [asdict(goal) for row in result["cases"] for goal in _goals_of(row)]


def _goals_of(row: Row) -> Iterator[Goal]:
    for name, setting in row["settings"].items():
        # A back end with a bucket is of ours; the others are a library's.
        if setting["kind"] != "backend" or setting["bucket"] is None or "us" not in setting:
            continue
        mine = setting["us"]["median"]

        def goal(what: str, value: float, limit: float, met: bool, name: str = name) -> Goal:
            return Goal(what, row["op"], row["name"], name, round(value, 3), limit, met)

        times = {other: s["us"]["median"] for other, s in row["settings"].items() if "us" in s}
        if row["op"] == "attention_column_mass" and row["sizes"].get("lse_given") and "SDPA forward" in times:
            value = mine / times["SDPA forward"]
            yield goal("times SDPA's forward, at most", value, SDPA_TIMES, value <= SDPA_TIMES)
        if row["op"] == "linear_w8a8_int8" and "torch._int_mm alone" in times:
            value = times["torch._int_mm alone"] / mine
            yield goal("of torch._int_mm's rate, epilogue included", value, INT8_OF_LIBRARY, value >= INT8_OF_LIBRARY)
        if row["bound"] == "memory" and row["floor_us"] > MEMORY_FLOOR_US:
            share = setting["roofline"]
            yield goal("of the copy bandwidth", share, COPY_SHARE, share >= COPY_SHARE)
