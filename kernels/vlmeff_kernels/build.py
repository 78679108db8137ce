"""Compile the CUDA C++ kernels: ``python -m vlmeff_kernels.build [--force] [--arch 80,90] [--verbose]``.

An optional step: without it the ops have their Triton back ends. nvcc is called directly, on the sources that the
package brings, and the library goes to the user's cache under a key of what it was made from, where ``cuda_ops`` finds
it. It uses LibTorch's stable ABI, so it serves every torch from ``TORCH_TARGET`` on, and needs no GPU to be built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH_TARGET = (2, 10)  # the oldest torch that loads the library
ARCHITECTURES = ("80", "90")  # machine code for these, and PTX of the last for newer GPUs
SOURCES = ("gather_kv.cu", "act_quant.cu", "binding.cpp")
FOLDER = Path(__file__).resolve().parent / "csrc"
LANGUAGE = ("-O3", "-std=c++20", "-Werror", "all-warnings")
FLAGS = ("-shared", *LANGUAGE, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden")
REMEDY = (
    "install the CUDA toolkit (12.6 or newer) and put its nvcc on PATH or its folder into CUDA_HOME, or "
    "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl of the CUDA "
    "version that torch was built with"
)


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do."""


def library_path(architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Where the library for these architectures is, or would be."""
    return _cache() / f"{'-'.join(f'sm{a}' for a in architectures)}.so"


def built(capability: tuple[int, int] | None = None) -> Path | None:
    """The library made of these very sources, the newest if there are several; None if there is none.

    capability: of a GPU; only libraries that it can run count.
    """
    found = sorted(_cache().glob("sm*.so"), key=lambda path: (path.stat().st_mtime, path.name))
    if capability is not None:
        found = [path for path in found if runs_on(architectures_of(path), capability)]
    return found[-1] if found else None


def architectures_of(path: Path) -> tuple[str, ...]:
    """What a library of ours was compiled for: its name says it (``library_path``)."""
    return tuple(part.removeprefix("sm") for part in path.stem.split("-"))


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a library for these architectures has code for a GPU of this compute capability.

    Machine code runs on the same major version from its minor version on, that of a letter on this capability alone
    (of an f on its family); the PTX of the last is compiled for any newer GPU, unless it is of a letter.
    """
    for architecture in architectures:
        number = int(re.sub(r"\D", "", architecture))
        same_major = number // 10 == capability[0] and number % 10 <= capability[1]
        if same_major and (not architecture.endswith("a") or number % 10 == capability[1]):
            return True
    newest = architectures[-1]
    return newest.isdigit() and (int(newest) // 10, int(newest) % 10) <= capability


def build(*, force: bool = False, architectures: tuple[str, ...] = ARCHITECTURES, verbose: bool = False) -> Path:
    """Compile the library unless it is there already.

    Args:
        force: compile it anew.
        architectures: compute capabilities without the dot, ascending: ("80", "90").
        verbose: print the command and what nvcc says, registers of each kernel included.
    Returns:
        Where it is.
    Raises:
        BuildError: there is no nvcc or no torch, or nvcc fails.
    """
    if not architectures or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in architectures):
        raise BuildError(f"architectures must be like 80 or 90, got {', '.join(architectures) or 'none'}")
    path = library_path(architectures)
    if path.is_file() and not force:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        _run(command(fresh, architectures), verbose=verbose)
        os.replace(fresh, path)  # whoever loads it sees the old one or the new one, whole
    return path


def command(output: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[str]:
    """The call of nvcc that compiles the library into ``output``."""
    torch = torch_folder()
    newest = architectures[-1]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    major, minor = TORCH_TARGET
    return [
        str(find_nvcc()),
        *FLAGS,
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        *targets,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        *("-isystem", str(torch / "include")),
        *(str(FOLDER / source) for source in SOURCES),
        # libtorch.so leads to libtorch_cuda.so where there is one: the symbols are found when the library is loaded.
        *("-L", str(torch / "lib"), "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"),
        *("-o", str(output)),
    ]


def find_nvcc() -> Path:
    """nvcc on PATH, in CUDA_HOME or CUDA_PATH, in NVIDIA's wheels, or in /usr/local/cuda.

    Raises:
        BuildError: none of them has it.
    """
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = importlib.util.find_spec("nvidia")
    for place in (wheels.submodule_search_locations or []) if wheels else []:
        folders += sorted(Path(place).glob("cu*"), reverse=True)
    folders.append(Path("/usr/local/cuda"))
    for folder in folders:
        if (folder / "bin" / "nvcc").is_file():
            return folder / "bin" / "nvcc"
    raise BuildError(f"nvcc was not found on PATH, in CUDA_HOME or in NVIDIA's Python packages; {REMEDY}")


def torch_folder() -> Path:
    """The folder of the package torch, which is not imported.

    Raises:
        BuildError: it is not installed, or without its headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("the package torch is not installed; its headers are needed")
    folder = Path(spec.origin).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"{folder} has no headers of the stable ABI; install torch >= 2.11 from a wheel")
    return folder


def _run(line: list[str], *, verbose: bool) -> None:
    if verbose:
        line = [line[0], "-Xptxas", "-v", *line[1:]]
        print(shlex.join(line), flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if verbose:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        raise BuildError(f"nvcc failed with {done.returncode}:\n{shlex.join(line)}\n{done.stdout[-8000:]}")


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vlmeff" / "kernels" / f"{_source_hash()}-torch{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"


def _source_hash() -> str:
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()} {FLAGS}".encode())
    for file in sorted(FOLDER.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlmeff_kernels.build", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--force", action="store_true", help="compile although the library is there")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="compute capabilities (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show the command and what nvcc says")
    given = parser.parse_args(arguments)
    architectures = tuple(sorted({a.strip().replace(".", "") for a in given.arch.split(",")} - {""}, key=_order))
    try:
        path = build(force=given.force, architectures=architectures, verbose=given.verbose)
    except BuildError as error:
        print(f"vlmeff_kernels.build: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _order(architecture: str) -> tuple[int, str]:
    return int("0" + re.sub(r"\D", "", architecture)), architecture


if __name__ == "__main__":
    raise SystemExit(main())
