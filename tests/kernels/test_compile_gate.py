"""Every production launch compiles ahead of time to sm_80 and sm_90: tensor instructions, wide loads, no spills, and no
more registers than the manifest says. This stands in for a GPU; after a change that is meant to alter the figures run
``python tests/kernels/compile_gate.py --write cases_NAME``."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAMILIES = sorted(path.stem for path in HERE.glob("cases_*.py"))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@functools.cache
def results(family: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_gate.py"), family]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def manifest(family: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((HERE / f"manifest/{family}.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_launches_compile_to_what_they_are_meant_to_be(family: str) -> None:
    wrong = []
    for key, found in results(family).items():
        if found["stack"]:
            wrong.append(f"{key}: spills ({found['stack']} bytes of stack or local accesses)")
        if found["shared"] > SHARED_LIMIT[found["architecture"]]:
            wrong.append(f"{key}: {found['shared']} bytes of shared memory")
        if found["wanted"] and not any(re.fullmatch(found["wanted"], name) for name in found["instructions"]):
            wrong.append(f"{key}: no {found['wanted']}, only {found['instructions']}")
        if found["wants_wide_loads"] and not found["wide_loads"]:
            wrong.append(f"{key}: no 128-bit loads from global memory")
        bound = manifest(family).get(key)
        if bound is None:
            wrong.append(f"{key}: not in the manifest")
        elif found["registers"] > 1.1 * bound["registers"]:
            wrong.append(f"{key}: {found['registers']} registers, {bound['registers']} in the manifest")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_names_nothing_that_is_gone(family: str) -> None:
    assert set(manifest(family)) <= set(results(family))
