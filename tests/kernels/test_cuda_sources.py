"""The CUDA sources: machine code for sm_80 and sm_90 without spills, the library for real, and the emulated kernels
under sanitizers, where breaking a kernel must show."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vlmeff_kernels import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))
emulation = importlib.import_module("emulation")

emulates = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
# Registers of any kernel in the file (nvcc 13.0: 64 and 72), with room for another compiler.
MOST_REGISTERS = {"gather_kv.cu": 72, "act_quant.cu": 80}
WIDE = {"gather_kv.cu": r"LDG\.E\.128.*STG\.E\.128", "act_quant.cu": r"LDG\.E\.128.*STG\.E\.64"}


def nvcc() -> str:
    try:
        return str(build.find_nvcc())
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("name", list(MOST_REGISTERS))
def test_machine_code_has_no_spills_and_wide_accesses(name: str, architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    command = [nvcc(), "-cubin", *build.LANGUAGE, f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += ["-o", str(cubin), str(build.FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert registers
    assert max(registers) <= MOST_REGISTERS[name]
    lost = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert set(lost) == {("0", "0", "0")}
    for line in sass(cubin):
        assert re.search(WIDE[name], line, re.DOTALL) or "Float32" in line  # float32 stores four codes at once
        assert not re.search(r"\b(LDL|STL)\b", line)


def sass(cubin: Path) -> list[str]:
    """The machine code of each kernel, where Triton's copy of the disassembler is."""
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin or "").parent / "backends/nvidia/bin/cuobjdump" if triton else Path("/nowhere")
    if not tool.is_file():
        return []
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return text.split("Function : ")[1:]


@pytest.fixture(scope="module")
def gpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc()
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    try:
        path = build.build()
        assert build.built() == path
    finally:
        patch.undo()
    return path


@pytest.mark.slow
def test_the_library_has_its_entry_points_and_only_the_stable_abi(gpu_library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    names = subprocess.run(["nm", "-D", str(gpu_library)], capture_output=True, text=True, check=True).stdout
    assert {"vlmeff_gather_kv", "vlmeff_act_quant_int8"} == set(re.findall(r" T (\w+)", names))
    undefined = re.findall(r" U (\w+)", names)
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if name.startswith("_Z") and re.search("2at|3c10|5torch", name)]


LOADED = """
import ctypes, sys, torch
from vlmeff_kernels import build, cuda_ops
assert cuda_ops.load() is None, cuda_ops.load()
for op in cuda_ops.OPS:
    assert cuda_ops.has_kernel(op, "cuda") and not cuda_ops.has_kernel(op, "cpu")
print(cuda_ops.GATHER_KV.supports(keys=[torch.zeros(1, 1, 2, 4)], values=[], index=[]))
if not torch.cuda.is_available():
    row = ctypes.create_string_buffer(64)
    entry = ctypes.CDLL(str(build.built())).vlmeff_act_quant_int8
    entry.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int32] * 3 + [ctypes.c_void_p]
    assert entry(row, None, row, row, 1, 16, 16, 0, 127, None) != 0  # an error of CUDA, not a crash
"""


@pytest.mark.slow
def test_the_library_registers_its_kernels_for_cuda(gpu_library: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    cache = gpu_library.parents[3]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "it runs on cuda, not on cpu"


@emulates
@pytest.mark.slow
def test_emulated_kernels_are_clean_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    if not Path(libraries[0]).is_file():
        pytest.skip("g++ has no address sanitizer")
    environment = {
        **os.environ,
        emulation.ALREADY_BUILT: str(emulation.library(sanitized=True)),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    # Fakes and graphs are none of the kernels' business, and slow under the sanitizer.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not schemas and not compiled", str(HERE / "test_cuda_emulated.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


RACE = """
#include <vector>
#include "entry_points.h"
int main() {
  const int rows = 3, channels = 700;
  std::vector<float> x(rows * channels), scales(rows);
  for (int i = 0; i < rows * channels; i++) x[i] = (i * 37 % 101) - 50.0f;
  std::vector<int8_t> codes(x.size());
  const int error = vlmeff_act_quant_int8(
      x.data(), nullptr, codes.data(), scales.data(), rows, channels, channels, VLMEFF_FLOAT32, 127, nullptr);
  return error || codes[0] != -127;
}
"""


def races(tmp_path: Path, change: tuple[str, str] | None) -> bool:
    (tmp_path / "main.cpp").write_text(RACE, encoding="utf-8")
    program = tmp_path / "race"
    sources = [emulation.source("act_quant.cu", change), str(tmp_path / "main.cpp")]
    emulation.run("g++", *emulation.KERNELS, "-fsanitize=thread", *sources, "-o", str(program))
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    reported = "data race" in done.stderr
    assert reported or done.returncode == 0, done.stderr[-3000:]
    return reported


@emulates
def test_threads_of_the_quantizer_do_not_race(tmp_path: Path) -> None:
    assert not races(tmp_path, None)


@emulates
def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    assert races(tmp_path, ("  __syncthreads();\n", ""))


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("keys", "values", "index", "keys_out", "values_out")] + [
        (name, ctypes.c_int32)
        for name in (
            "kept", "key_batch", "key_head", "key_token", "value_batch", "value_head", "value_token", "index_batch",
            "index_head",
        )
    ]  # fmt: skip


def gathers_rightly(change: tuple[str, str] | None) -> bool:
    """Seven layers through the C entry point: float32, two pieces of 16 bytes a row."""
    entry = ctypes.CDLL(str(emulation.kernels("gather_kv.cu", change))).vlmeff_gather_kv
    entry.argtypes = [ctypes.c_void_p] + [ctypes.c_int32] * 5 + [ctypes.c_void_p]
    batch, heads, width = 2, 3, 8
    layers, right = (Layer * 7)(), []
    for n in range(len(layers)):
        tokens, kept = 300, (10, 0, 33, 290, 1, 7, 128)[n]
        keys, values = torch.randn(batch, heads, tokens, width), torch.randn(batch, heads, tokens, width)
        index = torch.stack([torch.randperm(tokens - 1)[:kept] for _ in range(batch * heads)]).view(batch, heads, kept)
        outs = [torch.full((batch, heads, kept, width), torch.nan) for _ in range(2)]
        right.append((keys, values, index, outs))
        pointers = (keys.data_ptr(), values.data_ptr(), index.data_ptr(), *(out.data_ptr() for out in outs))
        strides = [s // 4 for s in keys.stride()[:3]]
        layers[n] = Layer(*pointers, kept, *strides, *strides, *index.stride()[:2])
    assert entry(layers, len(layers), batch, heads, width // 4, width // 4, None) == 0
    return all(
        torch.equal(out, x.gather(2, index[..., None].expand(-1, -1, -1, width)))
        for keys, values, index, outs in right
        for x, out in zip((keys, values), outs, strict=True)
    )


@emulates
@pytest.mark.parametrize(
    "change", [None, ("LAYERS = 50", "LAYERS = 2"), ("MOST_PLANES = 65535", "MOST_PLANES = 4")], ids=str
)
def test_limits_of_a_launch_do_not_change_what_is_gathered(change: tuple[str, str] | None) -> None:
    assert gathers_rightly(change)


@emulates
@pytest.mark.parametrize(
    "change",
    [
        ("source[taken[r] * token_stride + column]", "source[(taken[r] + 1) * token_stride + column]"),
        ("if (i < kept) out[", "if (i < kept - 1) out["),
        ("batch * layer.index_batch", "batch * 0"),
        ("(most_kept(table, filled) - 1) / tile + 1", "(most_kept(table, filled) + 1) / tile"),
        ("keys ? layer.keys : layer.values", "layer.keys"),
    ],
    ids=str,
)
def test_a_broken_gather_is_seen(change: tuple[str, str]) -> None:
    assert not gathers_rightly(change)


def quantizes_rightly(change: tuple[str, str] | None) -> bool:
    """Two rows of 301 float32 channels against the formula in float64, rounded to float32 once."""
    entry = ctypes.CDLL(str(emulation.kernels("act_quant.cu", change))).vlmeff_act_quant_int8
    entry.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int32] * 3 + [ctypes.c_void_p]
    rows, channels, largest = 2, 301, 127
    room = torch.randn(rows, channels + 1)
    room[:, channels] = 1e6  # behind the last channel
    room[0, 0], room[0, 1:4] = 127.0, torch.tensor([0.5, 1.5, -2.5])  # ties: the scale of this row is 1
    room[0, 4:channels].clamp_(-100, 100)
    room[1, 200] = 50.0  # the greatest is one of the second warp's
    x = room[:, :channels]
    codes, scales = torch.zeros(rows, channels, dtype=torch.int8), torch.zeros(rows, 1)
    pointers = (room.data_ptr(), None, codes.data_ptr(), scales.data_ptr())
    assert entry(*pointers, rows, channels + 1, channels, 0, largest, None) == 0
    scale = (x.double().abs().amax(1, keepdim=True) / largest).float()
    return torch.equal(scales, scale) and torch.equal(codes, rounded(x.double() / scale.double()))


def rounded(x: Tensor) -> Tensor:
    return x.float().round().to(torch.int8)


@emulates
def test_the_quantizer_equals_its_formula() -> None:
    assert quantizes_rightly(None)


@emulates
@pytest.mark.parametrize(
    "change",
    [
        ("first + j < channels ? Float::widen", "first + j <= channels ? Float::widen"),
        ("static_cast<float>(largest)", "static_cast<float>(largest + 1)"),
        ("__float2int_rn(quotient)", "static_cast<int32_t>(quotient + 0.5f)"),
        ("row.x += at * row_stride", "row.x += at * (row_stride - 1)"),
        ("if (lane == 0) of_warp", "if (threadIdx.x == 0) of_warp"),
    ],
    ids=str,
)
def test_a_broken_quantizer_is_seen(change: tuple[str, str]) -> None:
    assert not quantizes_rightly(change)
