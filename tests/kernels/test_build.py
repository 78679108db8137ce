"""``python -m vlmeff_kernels.build``, with a compiler that only pretends, and what is said of a library that is missing
or broken."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vlmeff_kernels import build, cuda_ops

ROOT = Path(__file__).resolve().parents[2]
# Writes its arguments to what follows -o.
PRETENDS = '#!/bin/sh\nall="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$all" > "$2"\n'
FAILS = "#!/bin/sh\necho this is wrong >&2\nexit 3\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for remembered in (cuda_ops._load, cuda_ops._library):
        remembered.cache_clear()
    yield tmp_path / "cache"
    for remembered in (cuda_ops._load, cuda_ops._library):
        remembered.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return a_compiler(tmp_path, monkeypatch, PRETENDS)


def a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return path


def test_the_library_is_built_once_into_the_users_cache(compiler: Path, cache: Path) -> None:
    assert build.built() is None
    path = build.build()
    assert path == build.built() == build.library_path()
    assert path.is_relative_to(cache / "vlmeff" / "kernels")
    assert path.parent.name.endswith("-torch2.10")
    said = path.read_text()
    for wanted in ("code=sm_80", "code=sm_90", "code=compute_90", "-DTORCH_TARGET_VERSION=0x020a000000000000"):
        assert wanted in said
    path.write_text("kept")
    assert build.build().read_text() == "kept"
    assert "code=sm_80" in build.build(force=True).read_text()
    assert [file.name for file in path.parent.iterdir()] == ["sm80-sm90.so"]


def test_other_sources_and_other_architectures_are_other_libraries(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = build.build(), build.build(architectures=("120",))
    assert first.parent == second.parent
    assert first != second
    assert "code=compute_120" in second.read_text()
    changed = tmp_path / "csrc"
    changed.mkdir()
    for file in build.FOLDER.iterdir():
        (changed / file.name).write_bytes(file.read_bytes() + b"\n")
    monkeypatch.setattr(build, "FOLDER", changed)
    assert build.built() is None
    assert build.library_path() != first


def test_the_command_prints_where_the_library_is(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--arch", "9.0, 80", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(build.library_path(("80", "90")))
    assert "-Xptxas -v" in said


def test_a_failing_compiler_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_compiler(tmp_path, monkeypatch, FAILS)
    assert build.main([]) == 1
    said = capsys.readouterr().err
    assert "failed with 3" in said
    assert "this is wrong" in said
    assert build.built() is None
    assert not list(build.library_path().parent.iterdir())


@pytest.mark.parametrize("architecture", ["", "hopper", "sm_90"])
def test_an_architecture_that_is_none_is_refused(architecture: str, compiler: Path) -> None:
    assert build.main(["--arch", architecture]) == 1


def test_nvcc_is_found_in_cuda_home_and_its_absence_has_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_compiler(tmp_path, monkeypatch, PRETENDS)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == path
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(build.BuildError, match=r"PATH.*CUDA_HOME.*pip install nvidia-cuda-nvcc"):
        build.find_nvcc()


def test_importing_the_build_step_does_not_import_torch() -> None:
    code = "import sys, vlmeff_kernels.build; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "kernels", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_library_that_was_not_built_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_ops.load() == "not built: run python -m vlmeff_kernels.build"


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_ops.load() == "this torch is built without CUDA"


def test_a_library_that_does_not_load_is_warned_of_and_refused(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    path = build.build()  # a text
    with pytest.warns(RuntimeWarning, match="does not load"):
        reason = cuda_ops.load()
    assert reason is not None
    assert str(path) in reason
    assert "--force" in reason
    assert cuda_ops.load() == reason


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (("80", "90"), [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),  # PTX of 9.0 for what is newer
        (("90",), [(9, 0), (10, 3)], [(8, 0), (8, 9)]),
        (("86",), [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        (("80", "90a"), [(8, 0), (8, 9), (9, 0)], [(10, 0), (12, 0)]),
        (("120",), [(12, 0), (12, 1)], [(9, 0), (10, 0)]),
        (("100f",), [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
    ids=str,
)
def test_a_library_runs_where_it_has_code(
    architectures: tuple[str, ...], runs: list[tuple[int, int]], does_not: list[tuple[int, int]], compiler: Path
) -> None:
    path = build.build(architectures=architectures)
    assert build.architectures_of(path) == architectures
    assert [capability for capability in [*runs, *does_not] if build.built(capability) == path] == runs


def test_a_gpu_that_the_library_was_not_compiled_for_is_refused_with_the_command(compiler: Path) -> None:
    build.build(architectures=("90",))
    assert cuda_ops.architecture_refusal((9, 0)) is None
    reason = "compiled for sm_90, the GPU has 8.6: run python -m vlmeff_kernels.build --arch 86"
    assert reason in str(cuda_ops.architecture_refusal((8, 6)))
    cuda_ops._library.cache_clear()
    build.build(architectures=("86",))  # the newest
    assert build.built((8, 0)) is None
    assert build.built((8, 9)) == build.library_path(("86",))


def test_tensors_elsewhere_are_refused_before_anything_is_loaded() -> None:
    x = torch.zeros(2, 4)
    assert cuda_ops.ACT_QUANT_INT8.supports(x=x, smooth=None, bits=8, group=0) == "it runs on cuda, not on cpu"
    assert cuda_ops.GATHER_KV.supports(keys=[], values=[], index=[]) == "there is no tensor to work on"


def test_what_the_quantizer_cannot_do_is_refused() -> None:
    x, kernel = torch.zeros(2, 4), cuda_ops.ACT_QUANT_INT8
    assert kernel.refuses(x=x, smooth=None, bits=8, group=0) is None
    assert kernel.refuses(x=x, smooth=torch.ones(4), bits=2, group=4) is None
    for reason, arguments in {
        "float64": {"x": x.double(), "smooth": None, "group": 0},
        "one scale a token": {"x": x, "smooth": None, "group": 2},
        "smooth must be float32": {"x": x, "smooth": torch.ones(4).half(), "group": 0},
    }.items():
        assert reason in str(kernel.refuses(bits=8, **arguments))


def test_the_sources_travel_with_the_wheel() -> None:
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    carried = {file.distribution_path for file in builder.recurse_included_files()}
    wanted = {f"vlmeff_kernels/csrc/{file.name}" for file in build.FOLDER.iterdir()} | {"vlmeff_kernels/build.py"}
    assert wanted <= carried
    assert {Path(name).name for name in wanted} >= {*build.SOURCES, "host_emulation.h", "launch.h", "entry_points.h"}
