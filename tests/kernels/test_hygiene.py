"""Every op that vlmeff_kernels registers, as PyTorch sees it: schema, fake, tracing; and life without the package.

``CALLS`` holds calls of public ops. What they reach inside the package is recorded, with the arguments that arrive
there, and checked op by op; a registered op that no call reaches fails, so a new kernel needs a call here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

pytest.importorskip("triton")
import vlmeff_kernels
from vlmeff_kernels import _library

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def modules() -> list[str]:
    return [f"vlmeff_kernels.{found.name}" for found in pkgutil.iter_modules(vlmeff_kernels.__path__)]


for _module in modules():
    importlib.import_module(_module)
REGISTERED = sorted(_library._overloads)
# An op that a compiled library implements has no launcher here: without that library there is nothing to run.
INTERPRETED = sorted(_library._launchers)


class Draw:
    """Small tensors with sizes that no tile divides, on the device of the kernels, the same ones on every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)

    def positive(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) + 0.5).to(DEVICE)

    def below(self, n: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(n, shape, generator=self.generator).to(DEVICE, dtype)

    def codes(self, *shape: int) -> Tensor:
        return (self.below(255, *shape) - 127).to(torch.int8)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def calls() -> list[Call]:
    """(public op, positional and keyword arguments)."""
    d = Draw()
    index = d.below(9, 2, 5)
    per_head = d.below(9, 2, 3, 5)
    bf16 = torch.bfloat16
    q, k = d.normal(2, 6, 5, 20), d.normal(2, 3, 11, 20)
    masks = {"key_valid": d.below(4, 2, 11) > 0, "q_pos": d.below(11, 2, 5), "k_pos": d.below(11, 2, 11)}
    packed, bounds = d.normal(13, 4, 20, dtype=bf16), torch.tensor([0, 4, 4, 13], device=DEVICE)
    x, smooth = d.normal(3, 37), d.positive(37)
    rows, weights, bias = d.positive(3, 1), d.positive(19, 1), d.normal(19)
    groups = d.positive(19, 3)  # of 16, 16 and 5 channels
    packed_codes, zero = d.below(256, 19, 19, dtype=torch.uint8), d.below(8, 3, 1, dtype=torch.int32)
    fp8 = [d.normal(n, 37).to(torch.float8_e4m3fn) for n in (3, 19)]
    return [
        ("act_quant_fp8", (x, smooth), {}),
        ("act_quant_int8", (x,), {}),
        ("act_quant_int8", (x.to(bf16), smooth), {"bits": 4, "group": 16}),
        ("act_quant_uint", (x,), {"bits": 4}),
        ("act_quant_uint", (x.to(bf16),), {"bits": 3, "clip": torch.tensor([0.9, 0.8], device=DEVICE)}),
        ("attention_column_mass", (q, k), {"scale": 0.3, "reduce": "mean"}),
        ("attention_column_mass", (q, k), {"scale": 0.3, "causal": True, "query_weight": d.positive(2, 5), **masks}),
        ("attention_column_mass", (packed, packed), {"scale": 0.3, "reduce": "group", "cu_seqlens": bounds}),
        ("gather_tokens", (d.normal(2, 9, 7), index), {}),
        ("gather_tokens", (d.normal(2, 9, 14)[..., ::2], index), {}),
        ("gather_kv", (d.normal(2, 3, 9, 8), d.normal(2, 3, 9, 5), index), {}),
        ("gather_kv", ([d.normal(2, 3, 9, 8)] * 2, [d.normal(2, 3, 9, 8)] * 2, [index, per_head]), {}),
        ("gelu_quant_int8", (x, smooth), {"approximate": "tanh"}),
        ("gelu_quant_int8", (x.to(bf16),), {}),
        ("linear_w4a8_int8", (d.codes(3, 37), rows, packed_codes, weights, bias, torch.float32), {}),
        ("linear_w4a8_int8", (d.codes(3, 37), d.positive(3, 3), packed_codes, groups, None, bf16), {"group": 16}),
        ("linear_w8a8_fp8", (fp8[0], rows, fp8[1], weights, bias, bf16), {}),
        ("linear_w8a8_int8", (d.codes(3, 37), rows, d.codes(19, 37), weights, bias, torch.float32), {}),
        ("linear_w8a8_int8", (d.codes(3, 37), rows, d.codes(19, 37), weights, None, bf16), {}),
        ("linear_wna16", (x[:1], packed_codes, groups, None, bias), {"bits": 4, "group": 16}),
        ("linear_wna16", (x.to(bf16), packed_codes, groups, d.positive(19, 3), None), {"bits": 4, "group": 16}),
        ("linear_wna16", (x, d.codes(19, 37), weights, None, None), {"bits": 8}),
        (
            "linear_wnan_int",
            (d.below(8, 3, 37, dtype=torch.uint8), rows, zero, zero + 70, packed_codes, weights, weights,
             d.below(99, 19, dtype=torch.int32), bias, torch.float32),
            {},
        ),
        ("norm_quant_int8", (x,), {"eps": 1e-6, "kind": "rms", "weight": smooth}),
        ("norm_quant_int8", (d.normal(2, 3, 37, dtype=bf16),), {"eps": 1e-5, "weight": smooth, "bias": d.normal(37),
         "scale": d.normal(2, 37), "shift": d.normal(2, 37), "smooth": smooth}),
        ("quantized_decode_attention", (d.normal(2, 4, 1, 16), stored(d, keys=True), stored(d, keys=False)),
         {"scale": 0.25, "valid": d.below(4, 2, 12) > 0}),
        ("row_logsumexp", (q, k), {"scale": 0.3, "softcap": 5.0}),
        ("row_logsumexp", (q.to(bf16), k.to(bf16)), {"scale": 0.3, "causal": True, **masks}),
    ]  # fmt: skip


def stored(d: Draw, *, keys: bool) -> Any:
    """Nine tokens in 4 bits, groups of four tokens or of eight channels, and three more."""
    shape = (2, 2, 3, 16) if keys else (2, 2, 9, 2)
    codes = d.below(256, 2, 2, 9, 8, dtype=torch.uint8)
    rest = d.normal(2, 2, 3, 16)
    return ops.StoredStates(codes, d.positive(*shape), d.normal(*shape), rest, bits=4, group=4 if keys else 8)


CALLS = calls()
CALLED = sorted({op for op, _, _ in CALLS})


def back_ends(op: str) -> list[str]:
    """The back ends of op that are ops of ours: "torch" is PyTorch's own."""
    return [name for name in vlmeff_kernels.OPS.get(op, {}) if name != "torch"]


CASES = [(number, name) for number, (op, _, _) in enumerate(CALLS) for name in back_ends(op)]


def tensors(arguments: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]


def is_compiled(number: int) -> bool:
    """Tracing takes a second a call: the call of each op with the most tensors, and those of another kind."""
    op, args, kwargs = CALLS[number]
    most = max((n for n, call in enumerate(CALLS) if call[0] == op), key=lambda n: len(tensors(CALLS[n][1:])))
    return number == most or "cu_seqlens" in kwargs or any(x.stride(-1) > 1 for x in tensors(args) if x.ndim)


COMPILED = [(number, name) for number, name in CASES if is_compiled(number)]


def refusal(number: int, name: str) -> str | None:
    """Why the back end cannot run here. One in Triton always can, in its interpreter if there is no GPU."""
    op, args, kwargs = CALLS[number]
    try:
        with ops.backend(**{op: name}):
            ops.explain(op, *args, **kwargs)
    except BackendUnavailableError as error:
        if name == "triton":
            raise
        return str(error)
    return None


@contextmanager
def recorded(into: dict[str, list[tuple[Any, ...]]]) -> Iterator[None]:
    """Note the arguments of every op of the package that is called inside."""

    def noting(name: str, overload: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            into.setdefault(name, []).append(pytree.tree_map_only(Tensor, torch.clone, arguments))
            return overload(*arguments)

        return call

    before = dict(_library._overloads)
    _library._overloads.update({name: noting(name, overload) for name, overload in before.items()})
    try:
        yield
    finally:
        _library._overloads.update(before)


@functools.cache
def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Op of the package -> arguments with which ``CALLS`` reach it, one of each kind of arguments."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    with recorded(found):
        for number, name in CASES:
            # One that is broken fails in the test of its own call; the others are checked all the same.
            with contextlib.suppress(Exception):
                if refusal(number, name) is None:
                    run(number, name)
    return {name: list({kind(args): args for args in seen}.values()) for name, seen in found.items()}


def kind(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves = pytree.tree_leaves(arguments)
    return tuple((x.ndim, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)


def run(number: int, name: str) -> Any:
    op, args, kwargs = CALLS[number]
    with ops.backend(**{op: name}):
        return getattr(ops, op)(*args, **kwargs)


def sampled(name: str) -> list[tuple[Any, ...]]:
    if name not in INTERPRETED and name not in samples():
        pytest.skip("the compiled library that implements it is not built")
    assert name in samples(), f"no call in CALLS reaches vlmeff_kernels::{name}: add one"
    return samples()[name]


def test_every_public_op_with_a_kernel_has_a_call() -> None:
    assert set(vlmeff_kernels.OPS) == set(CALLED) | {op for op in vlmeff_kernels.OPS if not back_ends(op)}


@pytest.mark.parametrize("name", REGISTERED)
def test_the_registration_passes_the_checks_of_pytorch(name: str) -> None:
    arguments = max(sampled(name), key=lambda sample: len(tensors(sample)))
    checks = OPCHECKS
    if any(x.dtype == torch.float8_e4m3fn for x in tensors(arguments)):
        checks = OPCHECKS[1:]  # it compares the arguments before and after with allclose, which knows no float8
    results = torch.library.opcheck(_library._overloads[name], arguments, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("name", REGISTERED)
def test_fake_outputs_look_like_real_ones(name: str) -> None:
    for arguments in sampled(name):
        real = pytree.tree_leaves(_library._overloads[name](*arguments))
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = pytree.tree_leaves(_library._overloads[name](*fakes))
        for a, b in itertools.zip_longest(real, fake):
            looks = [(x.shape, x.dtype, x.stride(), x.device, x.storage_offset()) for x in (a, b)]
            assert looks[0] == looks[1]


@pytest.mark.parametrize("name", REGISTERED)
def test_outputs_are_new_and_arguments_stay_as_they_are(name: str) -> None:
    for arguments in sampled(name):
        given = tensors(arguments)
        before = [raw(x) for x in given]
        out = pytree.tree_leaves(_library._overloads[name](*arguments))
        assert all(torch.equal(raw(x), b) for x, b in zip(given, before, strict=True))
        ours = {x.untyped_storage().data_ptr() for x in out if x.numel()}
        assert not ours & {x.untyped_storage().data_ptr() for x in given}


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize(("number", "name"), COMPILED, ids=[f"{CALLS[n][0]}-{n}-{name}" for n, name in COMPILED])
def test_a_caller_compiles_to_one_graph_with_our_op_in_it(number: int, name: str) -> None:
    if reason := refusal(number, name):
        pytest.skip(reason)
    op, args, kwargs = CALLS[number]
    targets: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    def caller(args: Any, kwargs: Any) -> Any:
        return pytree.tree_leaves(getattr(ops, op)(*args, **kwargs))

    torch._dynamo.reset()
    with ops.backend(**{op: name}):
        compiled = torch.compile(caller, backend=backend, fullgraph=True)(args, kwargs)
        plain = caller(args, kwargs)
    assert any(target.startswith("vlmeff_kernels.") for target in targets), targets
    for a, b in zip(compiled, plain, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(raw(a), raw(b))


@pytest.mark.parametrize("number", [n for n, name in CASES if name == "cuda"], ids=lambda n: f"{CALLS[n][0]}-{n}")
def test_ops_of_the_compiled_library_are_traced_without_it(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not needed to trace: what a caller compiles to names the op, and its fakes look like what the
    reference returns."""
    cuda_ops = importlib.import_module("vlmeff_kernels.cuda_ops")
    monkeypatch.setattr(cuda_ops, "DEVICE", DEVICE)
    monkeypatch.setattr(cuda_ops, "load", lambda: None)
    if reason := refusal(number, "cuda"):
        pytest.skip(reason)
    op, args, kwargs = CALLS[number]
    targets: list[str] = []
    fakes: list[Tensor] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        (results,) = graph.graph.output_node().args
        fakes.extend(node.meta["example_value"] for node in results)
        return lambda *_: [torch.zeros_like(x, device=DEVICE) for x in expected]

    def caller(args: Any, kwargs: Any) -> Any:
        return pytree.tree_leaves(getattr(ops, op)(*args, **kwargs))

    with ops.backend("reference"):
        expected = caller(args, kwargs)
    torch._dynamo.reset()
    with ops.backend(**{op: "cuda"}):
        torch.compile(caller, backend=backend, fullgraph=True)(args, kwargs)
    assert any(target.startswith("vlmeff_kernels.") and "_cuda" in target for target in targets), targets
    looks = [[(x.shape, x.dtype, x.stride(), x.device) for x in outputs] for outputs in (fakes, expected)]
    assert looks[0] == looks[1]


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda n: f"{CALLS[n][0]}-{n}")
def test_without_the_package_the_reference_serves_and_a_named_kernel_is_refused(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, args, kwargs = CALLS[number]
    call = getattr(ops, op)
    with ops.backend("reference"):
        expected = pytree.tree_leaves(call(*args, **kwargs))
    monkeypatch.setitem(sys.modules, "vlmeff_kernels", None)
    for choice in ("auto", "accelerated"):
        with ops.backend(choice), ops.counters() as ran:
            got = pytree.tree_leaves(call(*args, **kwargs))
        assert ran[op, "reference"] == 1
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(got, expected, strict=True))
    with ops.backend(**{op: "triton"}), pytest.raises(BackendUnavailableError, match="vlmeff_kernels is not installed"):
        call(*args, **kwargs)
