"""Compile every Triton launch of ``cases_*.py`` to machine code for sm_80 and sm_90, without a GPU, and describe it.

    python tests/kernels/compile_gate.py [--write] [--only TEXT] cases_gather

Ops are called on meta tensors, so what is compiled is what the launchers of the package launch: same kernels, tiles and
specialisations. Prints one JSON object: launch -> {registers, stack, shared, instructions, wide_loads}. ``--write``
puts registers and shared memory into manifest/cases_NAME.json, against which test_compile_gate.py compares.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest"
ARCHITECTURES = (80, 90)
CAPABILITY = {80: (8, 0), 89: (8, 9), 90: (9, 0), 120: (12, 0)}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of an op, and what its machine code must show.

    ``instructions``: kernel name -> architecture -> regular expression that its SASS must contain.
    ``wide_loads``: kernels that must load 128 bits at a time from global memory (also into shared memory).
    """

    name: str
    call: Callable[[], object]
    instructions: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    wide_loads: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES


def launches_of(case: Case, architecture: int) -> list[Any]:
    from vlmeff_kernels import _launch

    from vlmeff import ops

    with _launch.recording(CAPABILITY[architecture]) as record, ops.backend("triton"), torch.no_grad():
        case.call()
    assert record.launches, f"{case.name}: nothing was launched"
    return record.launches


def specialisation(launch: Any) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, known alignment) of the arguments: a launch that differs in any of them is compiled anew.

    As Triton's own specialisation: ones are constants, multiples of 16 are known to be; neither of arguments that
    the kernel excepts from it."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = dict(zip(names, launch.arguments, strict=False)) | launch.constexprs
    for position, name in enumerate(names):
        value, parameter = given[name], launch.kernel.params[position]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[position,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if special and value.storage_offset() * value.element_size() % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
        else:
            assert type(value) is float, f"{launch.name}: {name} is {value!r}"
            signature[name] = "fp32"
    return signature, constants, attributes


def compiled(launch: Any, architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    source = ASTSource(launch.kernel, *specialisation(launch))
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    spilled = re.findall(r"\b(?:LDL|STL)\b", sass)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]) + len(spilled),
        "shared": binary.metadata.shared,
        "instructions": sorted(set(re.findall(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|FFMA|MUFU\.EX2)\b", sass))),
        "wide_loads": bool(re.search(r"\b(LDG|LDGSTS)\.E(\.[A-Z0-9]+)*\.128|UTMALDG", sass)),
    }


def jobs(module: str, only: str) -> Iterator[tuple[str, Case, Any, int]]:
    """(key, case, launch, architecture) of every launch that differs from those before it."""
    seen: set[str] = set()
    for case in importlib.import_module(module).CASES:
        for architecture in case.architectures if only in case.name else ():
            for launch in launches_of(case, architecture):
                key = f"{case.name} | {launch.name} | sm_{architecture}"
                while key in seen:
                    key += "'"
                seen.add(key)
                yield key, case, launch, architecture


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    work = list(jobs(options.module, options.only))
    with ThreadPoolExecutor(2) as pool:
        described = list(pool.map(lambda job: compiled(job[2], job[3]), work))
    results = {}
    for (key, case, launch, architecture), found in zip(work, described, strict=True):
        wanted = case.instructions.get(launch.name, {}).get(architecture)
        results[key] = {**found, "kernel": launch.name, "architecture": architecture, "wanted": wanted,
                        "wants_wide_loads": launch.name in case.wide_loads}  # fmt: skip
    if options.write:
        path = MANIFEST / f"{options.module}.json"
        manifest = json.loads(path.read_text()) if options.only else {}
        manifest |= {key: {name: found[name] for name in ("registers", "shared")} for key, found in results.items()}
        path.write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    # cases_*.py import this module by its name
    sys.modules["compile_gate"] = sys.modules["__main__"]
    main()
