"""``vlmeff doctor``: it tells what is there, what is broken and how to mend it, and never breaks itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import types
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmeff import doctor, ops
from vlmeff.ops import _dispatch

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = sorted(_dispatch._operators)


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def command(
    *arguments: str, path: Path = ROOT / "kernels", first: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, after the Python statements ``first``, with ``path`` before everything else."""
    code = f"import sys\n{first}\nfrom vlmeff.cli import main\nsys.argv[1:] = {['doctor', *arguments]!r}\nmain()"
    environment = {name: value for name, value in os.environ.items() if name not in doctor.VARIABLES}
    environment |= {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_table_says_what_is_here_and_where_every_op_runs() -> None:
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (torch.__version__.split("+")[0], "fits torch", "diffusers", "vlmeff[diffusion]", "VLMEFF_DEBUG"):
        assert words in done.stdout
    for op in OPERATORS:
        assert f" {op} " in done.stdout
    assert "problem" not in done.stdout


def test_json_holds_all_of_it() -> None:
    done = command("--json", VLMEFF_BACKEND="reference")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert {choice["op"]: choice["chosen"] for choice in found["ops"]} == dict.fromkeys(OPERATORS, "reference")
    assert {choice["why"] for choice in found["ops"]} == {"asked for in VLMEFF_BACKEND"}
    assert found["environment"] == {"VLMEFF_BACKEND": "reference", "TRITON_INTERPRET": None, "VLMEFF_DEBUG": None}
    packages = {package["name"]: package for package in found["packages"]}
    for name in ("torch", "torchvision", "transformers"):
        assert packages[name]["version"] == importlib.metadata.version(name)
        assert packages[name]["core"]
    assert found["torchvision_matches"] is True
    assert found["torch_cuda"] == torch.version.cuda
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["problems"] == []


# What is broken.


def test_a_torchvision_of_another_torch_is_a_problem_that_names_both_versions(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    done = command("--json", path=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    (problem,) = found["problems"]
    assert problem["what"].startswith("E-ENV-03: torchvision ")
    for name in ("torch", "torchvision"):
        assert f"{name} {importlib.metadata.version(name)}" in problem["what"]
    assert problem["remedy"] == "pip install --force-reinstall torch torchvision"
    assert found["torchvision_matches"] is False
    assert len(found["ops"]) == len(OPERATORS)


def test_without_torch_it_still_says_what_is_missing() -> None:
    done = command(first="sys.modules['torch'] = None")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "torch cannot be imported" in done.stdout
    assert "remedy: pip install" in done.stdout


def test_a_wrong_choice_of_back_end_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMEFF_BACKEND", "trito")
    found = doctor.diagnose()
    (problem,) = found.problems
    assert "unknown back end 'trito'" in problem.what
    assert "unset VLMEFF_BACKEND" in problem.remedy
    assert found.ops == ()


def test_missing_and_old_dependencies_of_the_core_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"einops": None, "timm": "0.9"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    problems: list[doctor.Problem] = []
    packages, _ = doctor._packages(problems)
    missing, old = problems
    assert missing.what == "the package einops is not installed."
    assert missing.remedy.startswith('pip install "einops>=')
    assert old.what.startswith("E-ENV-02: timm 0.9 is outside the range")
    assert [package.name for package in packages if not package.fits] == ["timm"]


def test_a_broken_vlmeff_kernels_is_a_problem_and_a_missing_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vlmeff_kernels").mkdir()
    (tmp_path / "vlmeff_kernels" / "__init__.py").write_text("import a_library_that_is_not_there\n")
    forget_kernels(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = doctor.diagnose().problems
    assert "vlmeff_kernels cannot be imported" in problem.what
    assert "a_library_that_is_not_there" in problem.what

    monkeypatch.setitem(sys.modules, "vlmeff_kernels", None)
    found = doctor.diagnose()
    assert not found.problems
    assert any("vlmeff_kernels is not installed" in note for note in found.notes)
    assert all(choice.back_ends == () and choice.chosen == "reference" for choice in found.ops)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeff_kernels"]:
        monkeypatch.delitem(sys.modules, name)


# What is told.


def test_a_choice_that_cannot_be_honoured_is_told_and_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMEFF_BACKEND", "gather_tokens=cuda")
    found = doctor.diagnose()
    assert not found.problems
    (refused,) = [choice for choice in found.ops if choice.chosen is None]
    assert refused.op == "gather_tokens"
    assert "no such implementation" in refused.why
    assert "VLMEFF_BACKEND=gather_tokens=cuda cannot serve such calls of gather_tokens." in found.notes


def test_every_op_has_a_sample_call_that_the_op_accepts() -> None:
    calls = doctor.sample_calls("cpu")
    assert sorted(calls) == OPERATORS
    for op, (args, kwargs) in calls.items():
        assert ops.explain(op, *args, **kwargs).op == op


def test_on_a_gpu_it_says_which_kernel_runs_and_why_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def back_end(refusal: str | None, unproven: str | None = None) -> Any:
        return types.SimpleNamespace(supports=lambda **_: refusal, unproven=lambda **_: unproven)

    kernels: Any = types.ModuleType("vlmeff_kernels")
    kernels.OPS = {
        "gather_kv": {"cuda": back_end("not built"), "triton": back_end(None)},
        "row_logsumexp": {"triton": back_end(None, "not measured here")},
    }
    monkeypatch.setitem(sys.modules, "vlmeff_kernels", kernels)
    problems: list[doctor.Problem] = []
    with FakeTensorMode():
        choices = {choice.op: choice for choice in doctor._choices("cuda", problems, [])}
    assert not problems
    assert choices["gather_kv"].chosen == "triton"
    assert choices["gather_kv"].back_ends == ("cuda", "triton")
    assert choices["gather_kv"].passed_over == {"cuda": "not built"}
    assert choices["row_logsumexp"].chosen == "reference"
    assert choices["row_logsumexp"].passed_over == {"triton": "not measured here"}
    assert choices["top_indices"].passed_over == {}


def test_what_measurements_accept_and_where_the_library_lies_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, library = tmp_path / "vlmeff_kernels", tmp_path / "sm_90.so"
    folder.mkdir()
    row = {"op": "gather_kv", "backend": "cuda", "capability": "9.0", "bucket": "all"}
    (folder / "accepted.json").write_text(json.dumps({"accepted": [row]}))
    (folder / "__init__.py").write_text("OPS = {}\n")
    (folder / "build.py").write_text(
        "from pathlib import Path\nclass BuildError(RuntimeError): pass\n"
        f"def built(): return Path({str(library)!r})\ndef find_nvcc(): raise BuildError\n"
    )
    forget_kernels(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    notes: list[str] = []
    assert doctor._kernels((), [], notes) == ((row,), str(library), None)
    assert notes == []


def test_a_library_that_does_not_load_on_a_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_ops: Any = types.ModuleType("vlmeff_kernels.cuda_ops")
    cuda_ops.load = lambda: "its library does not load: undefined symbol"
    package: Any = types.ModuleType("vlmeff_kernels")
    package.cuda_ops = cuda_ops
    monkeypatch.setitem(sys.modules, "vlmeff_kernels", package)
    problems: list[doctor.Problem] = []
    doctor._try_library(problems)
    assert [problem.remedy for problem in problems] == ["python -m vlmeff_kernels.build --force"]
    assert "undefined symbol" in problems[0].what


def test_an_installed_copy_reads_the_same_requirements_from_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    core, extras = doctor._requirements()
    assert "serve" in extras
    assert not set(doctor.FOR_DEVELOPMENT) & set(extras)
    assert {r.name for r in extras["serve"]} < {r.name for r in extras["replicas"]}  # replicas contains vlmeff[serve]

    metadata = Message()
    for requirement in core:
        metadata["Requires-Dist"] = str(requirement)
    for name, requirements in extras.items():
        metadata["Provides-Extra"] = name
        for requirement in requirements:
            metadata["Requires-Dist"] = f'{requirement}; extra == "{name}"'
    monkeypatch.setattr(doctor, "PYPROJECT", ROOT / "no-such-file.toml")
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    again, of_extras = doctor._requirements()
    assert [str(r) for r in again] == [str(r) for r in core]
    assert {name: [r.name for r in rows] for name, rows in of_extras.items()} == {
        name: [r.name for r in rows] for name, rows in extras.items()
    }


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('Cuda compilation tools, release 13.0, V13.0.88')", "13.0.88"),
        ("print('something else')", None),
        ("raise SystemExit(9)", None),
    ],
)
def test_programs_are_asked_for_their_version(code: str, expected: str | None) -> None:
    assert doctor._said([sys.executable, "-c", code], r"release [\d.]+, V([\d.]+)") == expected
    assert doctor._said(["a-program-that-is-not-there"], "(.)") is None


def test_a_gpu_that_does_not_answer_is_a_problem_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def dead(index: int) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")

    monkeypatch.setattr(torch.cuda, "get_device_properties", dead)
    found = doctor.diagnose()
    assert any("device-side assert" in problem.what and "more" not in problem.what for problem in found.problems)
    assert {choice.op for choice in found.ops} == set(OPERATORS)
