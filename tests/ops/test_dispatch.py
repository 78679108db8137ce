"""How an op chooses its back end. CUDA tensors are fake ones here, and so are the accelerated back ends."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError, ConfigError
from vlmeff.ops import _dispatch

ROOT = Path(__file__).parents[2]
SCALE = 0.5


class StubBackEnd:
    """Refuses for a given reason, or records the call and returns its own name."""

    def __init__(self, name: str, refusal: str | None = None) -> None:
        self.name, self.refusal = name, refusal
        self.unmeasured: str | None = None
        self.calls: list[dict[str, Any]] = []

    def supports(self, **arguments: Any) -> str | None:
        return self.refusal

    def unproven(self, **arguments: Any) -> str | None:
        return self.unmeasured

    def run(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        return self.name


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMEFF_BACKEND", raising=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a stub in the place of vlmeff_kernels: install(triton=None, cuda="needs sm_90") for row_logsumexp."""

    def install(**refusals: str | None) -> dict[str, StubBackEnd]:
        module: Any = types.ModuleType("vlmeff_kernels")
        stubs = {name: StubBackEnd(name, refusal) for name, refusal in refusals.items()}
        module.OPS = {"row_logsumexp": stubs}
        monkeypatch.setitem(sys.modules, "vlmeff_kernels", module)
        return stubs

    return install


@pytest.fixture
def cuda() -> Iterator[dict[str, Any]]:
    with FakeTensorMode():
        yield arguments(device="cuda")


def arguments(**options: Any) -> dict[str, Any]:
    return {"q": torch.ones(1, 2, 3, 4, **options), "k": torch.ones(1, 2, 5, 4, **options), "scale": SCALE}


# The rules, in their order.


def test_cpu_tensors_run_on_the_reference(install: Any) -> None:
    stubs = install(triton=None)
    assert isinstance(ops.row_logsumexp(**arguments()), Tensor)
    assert not stubs["triton"].calls
    explanation = ops.explain("row_logsumexp", **arguments())
    assert (explanation.backend, explanation.why) == ("reference", "the tensors are on cpu")
    assert set(explanation.refused) == {"cuda", "triton", "torch"}


def test_cuda_tensors_run_on_the_first_back_end_that_does_not_refuse(install: Any, cuda: dict[str, Any]) -> None:
    stubs = install(torch=None, triton=None, cuda="head dim 4 is not a multiple of 16")
    assert ops.row_logsumexp(**cuda) == "triton"
    assert stubs["triton"].calls[0]["q"] is cuda["q"]
    assert not stubs["torch"].calls
    assert not stubs["cuda"].calls
    explanation = ops.explain("row_logsumexp", **cuda)
    assert explanation.backend == "triton"
    assert explanation.refused == {"cuda": "head dim 4 is not a multiple of 16"}


def test_the_reference_serves_what_every_accelerator_refuses(install: Any, cuda: dict[str, Any]) -> None:
    install(triton="no", torch="neither")
    assert isinstance(ops.row_logsumexp(**cuda), Tensor)
    explanation = ops.explain("row_logsumexp", **cuda)
    assert explanation.backend == "reference"
    missing = "vlmeff_kernels has no such implementation of this op"
    assert explanation.refused == {"cuda": missing, "triton": "no", "torch": "neither"}


def test_what_no_measurement_accepts_runs_only_when_asked_for(install: Any, cuda: dict[str, Any]) -> None:
    stubs = install(triton=None, torch=None)
    stubs["triton"].unmeasured = "never measured here"
    assert ops.row_logsumexp(**cuda) == "torch"
    assert ops.explain("row_logsumexp", **cuda).refused["triton"] == "never measured here"
    with ops.backend("accelerated"):
        assert ops.row_logsumexp(**cuda) == "triton"
        assert isinstance(ops.row_logsumexp(**arguments()), Tensor)  # on CPU the reference, as ever
    with ops.backend("triton"):
        assert ops.row_logsumexp(**cuda) == "triton"


def test_an_input_that_requires_grad_runs_on_the_reference(install: Any, cuda: dict[str, Any]) -> None:
    install(triton=None)
    cuda["k"].requires_grad_()
    assert isinstance(ops.row_logsumexp(**cuda), Tensor)
    assert "requires grad" in ops.explain("row_logsumexp", **cuda).why
    with torch.no_grad():
        assert ops.row_logsumexp(**cuda) == "triton"


def test_the_accelerator_gets_the_arguments_checked_and_normalised(install: Any, cuda: dict[str, Any]) -> None:
    stubs = install(triton=None)
    cuda |= {"q_pos": torch.zeros(1, 3, dtype=torch.long, device="cuda"), "causal": True}
    cuda["q"] = torch.ones(1, 2, 3, 8, device="cuda")[..., ::2]
    ops.row_logsumexp(**cuda)
    (call,) = stubs["triton"].calls
    assert set(call) == {"q", "k", "scale", "causal", "q_pos", "k_pos", "key_valid", "softcap"}
    assert call["q"].stride(-1) == 1
    assert call["q"].shape == (1, 2, 3, 4)
    assert call["q_pos"].dtype == torch.int32
    with pytest.raises(ValueError, match="row_logsumexp: k must be"):
        ops.row_logsumexp(cuda["q"], cuda["k"][..., :2], scale=SCALE)


def test_a_failing_kernel_fails(install: Any, cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = install(triton=None)

    def explode(**arguments: Any) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(stubs["triton"], "run", explode)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        ops.row_logsumexp(**cuda)


# Explicit choices.


def test_an_explicit_choice_is_honoured(install: Any, cuda: dict[str, Any]) -> None:
    install(triton=None, torch=None)
    with ops.backend("torch"):
        assert ops.row_logsumexp(**cuda) == "torch"
    with ops.backend(row_logsumexp="torch"):
        assert ops.row_logsumexp(**cuda) == "torch"
        assert isinstance(ops.attention_column_mass(**cuda), Tensor)
    with ops.backend("reference"):
        assert isinstance(ops.row_logsumexp(**cuda), Tensor)
        assert ops.explain("row_logsumexp", **cuda).why == "asked for in vlmeff.ops.backend"
    assert ops.row_logsumexp(**cuda) == "triton"


def test_an_explicit_choice_may_take_cpu_tensors_if_it_supports_them(install: Any) -> None:
    install(triton=None, torch="tensors are on cpu")
    with ops.backend("triton"):
        assert ops.row_logsumexp(**arguments()) == "triton"
    with ops.backend("torch"), pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
        ops.row_logsumexp(**arguments())


def test_an_explicit_choice_that_cannot_be_honoured_raises(install: Any, cuda: dict[str, Any]) -> None:
    install(triton="needs compute capability 8.0")
    with ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match="needs compute capability") as caught:
            ops.row_logsumexp(**cuda)
        assert (caught.value.op, caught.value.backend) == ("row_logsumexp", "triton")
        with pytest.raises(BackendUnavailableError, match="needs compute capability"):
            ops.explain("row_logsumexp", **cuda)
    with (
        ops.backend(attention_column_mass="triton"),
        pytest.raises(BackendUnavailableError, match="no such implementation of this op"),
    ):
        ops.attention_column_mass(**cuda)


def test_a_kernel_never_gets_tensors_of_two_devices(install: Any) -> None:
    stubs = install(triton=None)
    x, smooth = torch.ones(2, 4), torch.ones(4, device="meta")
    sys.modules["vlmeff_kernels"].OPS["act_quant_int8"] = {"triton": stubs["triton"]}  # type: ignore[attr-defined]
    with ops.backend("triton"), pytest.raises(ValueError, match="act_quant_int8: all tensors must be on one device"):
        ops.act_quant_int8(x, smooth)
    with FakeTensorMode():
        x, smooth = torch.ones(2, 4, device="cuda:0"), torch.ones(4, device="cuda:1")
        with pytest.raises(ValueError, match="got cuda:0, cuda:1"):
            ops.act_quant_int8(x, smooth)
    assert not stubs["triton"].calls


def test_a_choice_for_all_ops_does_not_mean_those_that_have_no_kernels(install: Any, cuda: dict[str, Any]) -> None:
    install(triton=None)
    with ops.backend("triton"):
        assert ops.row_logsumexp(**cuda) == "triton"
        assert isinstance(ops.attention_column_mass(**cuda), Tensor)
        assert "no accelerated back end exists" in ops.explain("attention_column_mass", **cuda).why


def test_an_explicit_choice_without_backward_raises_instead_of_losing_gradients(install: Any) -> None:
    install(triton=None)
    inputs = arguments(requires_grad=True)
    with ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match="no backward"):
            ops.row_logsumexp(**inputs)
        with torch.no_grad():
            assert ops.row_logsumexp(**inputs) == "triton"


def test_blocks_nest_and_leave_nothing_behind(install: Any) -> None:
    install(triton=None, torch=None)

    def chosen() -> str:
        return ops.explain("row_logsumexp", **arguments()).backend

    with ops.backend("triton"):
        with ops.backend(gather_tokens="reference"):
            assert chosen() == "triton"
            with ops.backend(row_logsumexp="torch"):
                assert chosen() == "torch"
                assert ops.explain("gather_tokens", torch.ones(1, 2), torch.tensor([0])).backend == "reference"
            with ops.backend("auto"):
                assert chosen() == "reference"
        with pytest.raises(KeyError), ops.backend("torch"):
            raise KeyError
        assert chosen() == "triton"
    assert chosen() == "reference"


def test_a_choice_and_a_count_stay_in_their_thread(install: Any) -> None:
    install(triton=None)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(ops.row_logsumexp(**arguments())))
    with ops.backend("triton"), ops.counters() as ran:
        thread.start()
        thread.join()
    assert isinstance(results[0], Tensor)
    assert not ran


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"row_logsumexp": "tritn"},
            "unknown back end 'tritn'; back ends: accelerated, auto, cuda, reference, torch",
        ),
        ({"row_lse": "triton"}, "unknown op 'row_lse'; ops: act_quant_fp8, .*gather_tokens, .*row_logsumexp"),
        ({}, "name a back end"),
    ],
)
def test_unknown_names_are_refused_at_once(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.backend(**choice)
    with pytest.raises(ConfigError, match="unknown back end 'tritn'"):
        ops.backend("tritn")
    with pytest.raises(ConfigError, match="unknown op 'row_lse'; ops: act_quant_fp8, "):
        ops.explain("row_lse")


# The environment variable.


@pytest.mark.parametrize(
    ("value", "lse", "mass"),
    [
        ("", "triton", "reference"),
        ("auto", "triton", "reference"),
        ("reference", "reference", "reference"),
        ("torch,attention_column_mass=reference", "torch", "reference"),
        (" row_logsumexp = torch ,", "torch", "reference"),
        ("reference,row_logsumexp=auto", "triton", "reference"),
    ],
)
def test_the_environment_chooses(
    value: str, lse: str, mass: str, install: Any, cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(triton=None, torch=None)
    monkeypatch.setenv("VLMEFF_BACKEND", value)
    assert ops.explain("row_logsumexp", **cuda).backend == lse
    assert ops.explain("attention_column_mass", **cuda).backend == mass
    with ops.backend(row_logsumexp="reference"):
        assert ops.explain("row_logsumexp", **cuda).backend == "reference"
    with ops.backend("auto"):
        assert ops.explain("row_logsumexp", **cuda).backend == "triton"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpu", "VLMEFF_BACKEND='gpu': unknown back end 'gpu'; back ends: accelerated, auto, cuda"),
        ("triton,row_lse=cuda", "unknown op 'row_lse'; ops: act_quant_fp8, "),
        ("row_logsumexp=", "unknown back end ''"),
        ("triton,reference", "chooses twice for all ops"),
        ("row_logsumexp=triton,row_logsumexp=torch", "chooses twice for row_logsumexp"),
    ],
)
def test_a_wrong_environment_is_refused(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMEFF_BACKEND", value)
    with pytest.raises(ConfigError, match=message):
        ops.row_logsumexp(**arguments())


def test_an_unavailable_choice_of_the_environment_raises(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeff_kernels", None)
    monkeypatch.setenv("VLMEFF_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match="vlmeff_kernels is not installed"):
        ops.row_logsumexp(**cuda)


# The package of accelerators.


def test_without_vlmeff_kernels_the_reference_runs(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeff_kernels", None)
    assert isinstance(ops.row_logsumexp(**cuda), Tensor)
    refused = ops.explain("row_logsumexp", **cuda).refused
    assert set(refused.values()) == {"the package vlmeff_kernels is not installed"}


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import a_library_that_is_not_there", ModuleNotFoundError),
        ("raise ImportError('undefined symbol')", ImportError),
    ],
)
def test_a_broken_vlmeff_kernels_is_not_taken_for_a_missing_one(
    source: str, error: type[Exception], cuda: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vlmeff_kernels").mkdir()
    (tmp_path / "vlmeff_kernels" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vlmeff_kernels", raising=False)
    with pytest.raises(error, match=r"a_library_that_is_not_there|undefined symbol"):
        ops.row_logsumexp(**cuda)


def test_every_accelerated_op_is_an_op_of_ours() -> None:
    import vlmeff_kernels

    assert set(vlmeff_kernels.OPS) <= set(_dispatch._operators)
    assert {name for table in vlmeff_kernels.OPS.values() for name in table} <= set(_dispatch.ACCELERATED)


def test_importing_and_using_ops_on_cpu_loads_no_accelerator() -> None:
    script = """
import sys
import torch
before = set(sys.modules)
import vlmeff
import vlmeff.ops as ops
ops.attention_column_mass(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), scale=1.0)
ops.explain("gather_tokens", torch.ones(2, 2), torch.tensor([1]))
print(sorted({"triton", "vlmeff_kernels", "transformers"} & (set(sys.modules) - before)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_ops_import_nothing_of_vlmeff_but_errors() -> None:
    for file in sorted((ROOT / "vlmeff" / "ops").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: relative import"
                names = [node.module or ""]
            for name in names:
                ours = name.split(".")[0] in ("vlmeff", "tokenpruning", "kvcache", "transformers", "diffusers")
                assert not ours or name == "vlmeff.errors" or name.startswith("vlmeff.ops"), f"{file.name}: {name}"


# What is told.


def test_explain_runs_nothing_and_checks_like_the_call(install: Any, cuda: dict[str, Any]) -> None:
    stubs = install(triton=None)
    with ops.counters() as ran:
        assert ops.explain("row_logsumexp", cuda["q"], cuda["k"], scale=SCALE).backend == "triton"
    assert not stubs["triton"].calls
    assert not ran
    with pytest.raises(ValueError, match="row_logsumexp: softcap must be positive"):
        ops.explain("row_logsumexp", **cuda, softcap=-1.0)
    assert ops.row_logsumexp(**cuda) == "triton"  # an explanation that raised leaves the op as it was


def test_counters_count_runs_by_op_and_back_end(install: Any, cuda: dict[str, Any]) -> None:
    install(triton=None)
    with ops.counters() as outer:
        ops.row_logsumexp(**cuda)
        with ops.counters() as inner, ops.backend("reference"):
            ops.row_logsumexp(**cuda)
            ops.attention_column_mass(**cuda)
        ops.row_logsumexp(**cuda)
    ops.row_logsumexp(**cuda)
    assert inner == {("row_logsumexp", "reference"): 1, ("attention_column_mass", "reference"): 1}
    assert outer == {**inner, ("row_logsumexp", "triton"): 2}
    assert outer["gather_tokens", "reference"] == 0


def test_the_first_use_of_each_back_end_is_logged_once(
    install: Any, cuda: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    install(triton=None)
    _dispatch._said.clear()
    with caplog.at_level(logging.INFO, logger="vlmeff.ops"):
        for name in ("triton", "reference", "triton", "reference"):
            with ops.backend(name):
                ops.row_logsumexp(**cuda)
    assert [record.getMessage() for record in caplog.records] == [
        "vlmeff.ops.row_logsumexp runs on the back end 'triton'",
        "vlmeff.ops.row_logsumexp runs on the back end 'reference'",
    ]


def test_two_ops_of_one_name_are_refused() -> None:
    def row_logsumexp() -> None: ...

    with pytest.raises(ConfigError, match="already has an op named 'row_logsumexp'"):
        _dispatch.operator(row_logsumexp)


def test_the_exports_are_sorted_and_real() -> None:
    assert ops.__all__ == sorted(ops.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
