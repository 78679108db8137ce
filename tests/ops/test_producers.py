"""Normalization or GELU with quantization: bit for bit the modules and blocks that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmeff import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
B, T, K = 2, 5, 24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got: tuple[Tensor, Tensor], y: Tensor, smooth: Tensor | None = None) -> None:
    q, s = ops.act_quant_int8(y.reshape(-1, y.shape[-1]), smooth)
    assert (got[0].dtype, got[1].dtype, got[0].shape) == (torch.int8, torch.float32, q.shape)
    assert torch.equal(got[0], q)
    assert torch.equal(got[1], s)


# Norms, as diffusers' blocks have them


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [(B, 1, K), (B, T, K)])  # Wan 2.1 has a modulation per sample, 2.2 one per token
def test_it_is_wans_block(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")
    x, scale, shift = randn(B, T, K).to(dtype), randn(*rows, seed=1), randn(*rows, seed=2)
    norm = normalization.FP32LayerNorm(K, 1e-6, elementwise_affine=False)
    y = (norm(x.float()) * (1 + scale) + shift).type_as(x)
    assert_same(ops.norm_quant_int8(x, scale=scale, shift=shift, eps=1e-6), y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_fp32_layer_norm_with_weights(dtype: torch.dtype) -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")
    norm = normalization.FP32LayerNorm(K, 1e-6, elementwise_affine=True).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(randn(K))
        norm.bias.copy_(randn(K, seed=3))
        x, smooth = randn(B * T, K, seed=1).to(dtype), randn(K, seed=2).abs() + 0.5
        got = ops.norm_quant_int8(x, weight=norm.weight, bias=norm.bias, smooth=smooth, eps=1e-6)
        assert_same(got, norm(x), smooth)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_cogvideox_modulation_which_rounds_each_step(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(K, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(randn(K))
        x, scale, shift = (randn(*s, seed=i).to(dtype) for i, s in enumerate(((B, T, K), (B, K), (B, K))))
        got = ops.norm_quant_int8(x, weight=norm.weight, bias=norm.bias, scale=scale, shift=shift, eps=1e-5)
        assert_same(got, norm(x) * (1 + scale)[:, None, :] + shift[:, None, :])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_ltx_rms_norm(dtype: torch.dtype) -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")
    x, scale, shift = (randn(*s, seed=i).to(dtype) for i, s in enumerate(((B, T, K), (B, 1, K), (B, 1, K))))
    norm = normalization.RMSNorm(K, eps=1e-6, elementwise_affine=False)
    got = ops.norm_quant_int8(x, scale=scale, shift=shift, eps=1e-6, kind="rms")
    assert_same(got, norm(x) * (1 + scale) + shift)


def test_rms_norm_with_a_weight_is_torchs_own() -> None:
    x, weight = randn(7, K), randn(K, seed=1)
    assert_same(ops.norm_quant_int8(x, weight=weight, eps=1e-6, kind="rms"), F.rms_norm(x, (K,), weight, 1e-6))


def test_a_vector_modulates_every_token_and_a_factor_may_be_missing() -> None:
    x, scale, shift = randn(B, T, K), randn(K, seed=1), randn(K, seed=2)
    n = F.layer_norm(x, (K,))
    assert_same(ops.norm_quant_int8(x, scale=scale, shift=shift, eps=1e-5), n * (1 + scale) + shift)
    assert_same(ops.norm_quant_int8(x, scale=scale, eps=1e-5), n * (1 + scale))
    assert_same(ops.norm_quant_int8(x[0], shift=shift, eps=1e-5), (n + shift)[0])


# GELU


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_torchs(dtype: torch.dtype, approximate: Any) -> None:
    x, smooth = randn(9, K).to(dtype) * 3, randn(K, seed=1).abs() + 0.1
    for vector in (None, smooth):
        y = F.gelu(x, approximate=approximate)
        assert_same(ops.gelu_quant_int8(x, vector, approximate=approximate), y, vector)


def test_gelu_of_a_row_that_is_not_finite_spoils_that_row() -> None:
    x = randn(3, K)
    x[1, 2] = torch.nan
    q, s = ops.gelu_quant_int8(x)
    assert s[:, 0].isnan().tolist() == [False, True, False]
    assert not bool(q[1].any())


# Both


@pytest.mark.parametrize(("tokens", "k"), [(0, 4), (1, 1), (3, 0)])
def test_every_size_has_the_right_shapes(tokens: int, k: int) -> None:
    for q, s in (ops.gelu_quant_int8(torch.ones(tokens, k)), ops.norm_quant_int8(torch.ones(tokens, k), eps=1e-5)):
        assert (q.shape, s.shape) == ((tokens, k), (tokens, 1))


def test_they_are_counted_and_explained() -> None:
    x = torch.ones(2, 4)
    with ops.counters() as ran:
        ops.gelu_quant_int8(x)
        ops.norm_quant_int8(x, eps=1e-5)
    # The reference is the sequence, whose quantizer is free to run elsewhere.
    assert ran == {
        ("gelu_quant_int8", "reference"): 1,
        ("norm_quant_int8", "reference"): 1,
        ("act_quant_int8", "reference"): 2,
    }
    assert ops.explain("norm_quant_int8", x, eps=1e-5).backend == "reference"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gelu_quant_int8(torch.ones(2, 3, dtype=torch.int32)), TypeError, "float tensor, got torch.int32"),
        (lambda: ops.gelu_quant_int8(torch.ones(2, 3, 4)), ValueError, r"\[M, K\], got \(2, 3, 4\)"),
        (lambda: ops.gelu_quant_int8(torch.ones(2, 3), torch.ones(2)), ValueError, r"smooth .* K = 3 .*got \(2,\)"),
        (lambda: ops.gelu_quant_int8(torch.ones(2, 3), approximate="erf"), ValueError, "none, tanh, got 'erf'"),
        (lambda: ops.norm_quant_int8(torch.ones(3), eps=0.1), ValueError, r"\[B, T, K\], got \(3,\)"),
        (lambda: ops.norm_quant_int8(torch.ones(2, 3), eps=0.1, kind="batch"), ValueError, "layer, rms, got 'batch'"),
        (
            lambda: ops.norm_quant_int8(torch.ones(2, 3), eps=0.1, kind="rms", bias=torch.ones(3)),
            ValueError,
            "no bias",
        ),
        (lambda: ops.norm_quant_int8(torch.ones(2, 3), eps=0.1, weight=torch.ones(2)), ValueError, "weight .* K = 3"),
        (lambda: ops.norm_quant_int8(torch.ones(2, 3), eps=0.1, scale=torch.ones(2, 3)), ValueError, "scale .* K = 3"),
        (
            lambda: ops.norm_quant_int8(torch.ones(2, 5, 3), eps=0.1, shift=torch.ones(5, 3)),
            ValueError,
            r"shift .*\[B, K\].*got \(5, 3\)",
        ),
        (
            lambda: ops.norm_quant_int8(torch.ones(2, 3), eps=0.1, scale=torch.ones(3).half()),
            TypeError,
            "scale must be float32",
        ),
        (
            lambda: ops.norm_quant_int8(
                torch.ones(2, 3).half(), eps=0.1, scale=torch.ones(3).half(), shift=torch.ones(3)
            ),
            TypeError,
            "one dtype",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_compiled_function_gives_the_same_codes() -> None:
    def both(x: Tensor, scale: Tensor) -> list[Tensor]:
        return [*ops.gelu_quant_int8(x, approximate="tanh"), *ops.norm_quant_int8(x, scale=scale, eps=1e-5)]

    arguments = randn(5, K), randn(K, seed=1)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), both(*arguments), strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-6, atol=1)
