"""Builds the CUDA sources for the CPU: the kernels over host_emulation.h, under the binding of the GPU library."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from vlmeff_kernels import build

ALREADY_BUILT = "VLMEFF_EMULATED_LIBRARY"  # a library for the tests of this process
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# -fno-strict-aliasing: a GPU loads 16 bytes of any type as four integers.
KERNELS = (
    "-x", "c++", "-std=c++20", "-O1", "-g", "-DVLMEFF_HOST_EMULATION", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread", "-I", str(build.FOLDER),
)  # fmt: skip


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    return None if shutil.which("g++") else "g++ is not on PATH"


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="vlmeff-emulation-"))


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def source(name: str, change: tuple[str, str] | None = None) -> str:
    """Path of a source, or of a copy in which one thing is changed."""
    path = build.FOLDER / name
    if change is None:
        return str(path)
    text = path.read_text(encoding="utf-8")
    assert text.count(change[0]) == 1, f"{change[0]!r} must occur once in {name}"
    changed = Path(tempfile.mkdtemp(dir=folder())) / name
    changed.write_text(text.replace(*change), encoding="utf-8")
    return str(changed)


@functools.cache
def kernels(name: str, change: tuple[str, str] | None = None) -> Path:
    """One source as a library with nothing but its C entry point."""
    output = folder() / f"{Path(name).stem}-{abs(hash(change))}.so"
    run("g++", *KERNELS, "-O0", "-g0", "-shared", source(name, change), "-o", str(output))
    return output


@functools.cache
def binding() -> Path:
    output = folder() / "binding.o"
    major, minor = build.TORCH_TARGET
    run(
        "g++", "-c", "-std=c++20", "-O1", "-fPIC", "-DVLMEFF_HOST_EMULATION", "-Wall", "-Wextra", "-Werror",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000", "-isystem", str(torch_folder() / "include"),
        source("binding.cpp"), "-o", str(output),
    )  # fmt: skip
    return output


@functools.cache
def library(sanitized: bool = False) -> Path:
    """All kernels and their registration for CPU tensors."""
    if ALREADY_BUILT in os.environ and not sanitized:
        return Path(os.environ[ALREADY_BUILT])
    output = folder() / f"library{'-sanitized' * sanitized}.so"
    run(
        "g++", *KERNELS, *(SANITIZED if sanitized else ()), "-shared", source("gather_kv.cu"), source("act_quant.cu"),
        "-x", "none", str(binding()), "-L", str(torch_folder() / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu",
        "-o", str(output),
    )  # fmt: skip
    return output


def torch_folder() -> Path:
    return Path(torch.__file__).parent
