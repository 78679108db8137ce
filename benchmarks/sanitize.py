"""Run compute-sanitizer over small calls of every kernel: memcheck, racecheck, initcheck.

    python benchmarks/sanitize.py --out benchmarks/results/sanitize_h200.json
    python benchmarks/sanitize.py --tool memcheck --op 'gather*' --out out.json

Each (tool, op, back end) is a process of its own, without PyTorch's caching allocator, so that a tensor ends where its
memory ends. Needs a GPU and compute-sanitizer, which comes with the CUDA toolkit; where either is missing the file says
"not run" and why. Exit code 1 if a tool found an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import vlmeff_kernels
from kernels_suite import small
from kernels_timing import device_report

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND, REFUSED = 9, 10  # exit codes of a child: the tool's for errors, ours for a back end that is not to be had
LONGEST_S = 300


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    return None if shutil.which(SANITIZER) else f"{SANITIZER} is not on PATH (it comes with the CUDA toolkit)"


def targets(pattern: list[str] | None) -> list[tuple[str, str]]:
    """(op, back end) of all kernels of ours; products of PyTorch's own are not ours to check."""
    every = [(op, name) for op, back_ends in vlmeff_kernels.OPS.items() for name in back_ends if name != "torch"]
    return [pair for pair in every if pattern is None or any(fnmatch.fnmatch(pair[0], p) for p in pattern)]


def child(op: str, name: str) -> int:
    """The calls that the tool watches."""
    device, refused = torch.device("cuda"), 0
    cases = [case for case in small() if case.op == op]
    for case in cases:
        call = case.make(device)
        try:
            with ops.backend(name), torch.no_grad():
                getattr(ops, op)(**call.arguments)
        except BackendUnavailableError as error:
            print(f"refused: {error.reason}")
            refused += 1
    torch.cuda.synchronize()
    return REFUSED if refused == len(cases) else 0


def watched(tool: str, op: str, name: str) -> dict[str, Any]:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    command += [sys.executable, str(Path(__file__).resolve()), "--child", op, name]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    row: dict[str, Any] = {"tool": tool, "op": op, "backend": name}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return {**row, "result": "not run", "why": f"took longer than {LONGEST_S} s"}
    return {**row, **verdict(done.returncode, done.stdout + done.stderr)}


def verdict(code: int, output: str) -> dict[str, Any]:
    """What a child's exit code and the tool's words mean."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    count = int(summary[1] or summary[2]) if summary else None
    if count:
        lines = [line for line in output.splitlines() if line.startswith("=========")]
        return {"result": "errors", "errors": count, "report": lines[:40]}
    if code == REFUSED:
        why = re.search(r"^refused: (.*)$", output, re.MULTILINE)
        return {"result": "not run", "why": why[1] if why else "the back end refuses"}
    if code or count is None:  # it ended before the tool could sum up
        return {"result": "not run", "why": f"exit code {code}", "report": output.splitlines()[-10:]}
    return {"result": "clean"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (.json)")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated; all when left out")
    parser.add_argument("--op", action="append", help="an op, or a pattern; may be repeated")
    parser.add_argument("--child", nargs=2, metavar=("OP", "BACKEND"), help="what the tool starts")
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    if args.out is None:
        parser.error("--out is missing")
    why = missing()
    report: dict[str, Any] = {"not_run": why} if why else device_report(torch.device("cuda"))
    report["runs"] = []
    print(f"not run: {why}" if why else f"{report['device']}, {len(targets(args.op))} kernels")
    for tool in args.tool or TOOLS:
        for op, name in targets(args.op):
            row = watched(tool, op, name) if not why else {"tool": tool, "op": op, "backend": name, "result": "not run"}
            report["runs"].append(row)
            if not why:
                print(f"{tool} {op} {name}: {row['result']} {row.get('why', row.get('errors', ''))}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["result"] == "errors" for row in report["runs"]))


if __name__ == "__main__":
    sys.exit(main())
