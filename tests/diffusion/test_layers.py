"""QuantLinear: one contract for every scheme, against numpy; sharing of activations, casts, state, compilation."""

from __future__ import annotations

import copy
import gc
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlmeff import ops
from vlmeff.diffusion.layers import PROTECTED, QuantLinear, share_activations
from vlmeff.diffusion.schemes import SCHEMES, LayerSpec, get_scheme
from vlmeff.errors import QuantConfigError, UnsupportedInputError

INTEGER = 1e-5  # relative to the largest output: exact sums, then float32 scales
HALF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # two roundings of the largest output
SHAPES = [(7, 40), (2, 3, 40), (2, 1, 3, 40), (40,), (0, 40), (17, 40)]
CALIBRATED = [name for name, spec in SCHEMES.items() if spec.smooth]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(
    n: int = 24, k: int = 40, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(seed + i)) / k**0.5)
    return layer.to(dtype)


def spec_of(name: str) -> LayerSpec:
    """The scheme with groups and ranks small enough that a small layer has several; the last group is short."""
    spec = get_scheme(name)
    if spec.group:
        spec = get_scheme(name, group=16)
    return get_scheme(name, group=16, rank=4) if spec.rank else spec


def made(name: str, *, smooth: bool = True, n: int = 24, k: int = 40, **options) -> QuantLinear:
    spec = spec_of(name)
    vector = torch.rand(k, generator=generator(9)) + 0.5 if smooth and spec.smooth else None
    return QuantLinear.from_linear(linear(n, k, **options), spec, smooth=vector).eval()


def inputs(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def quantized_activation(x: np.ndarray, layer: QuantLinear) -> np.ndarray:
    """What the layer's codes of x stand for, [M, K] float64, each token by itself and each step in float32."""
    spec = layer.spec
    f = np.float32
    if layer.smooth is not None:
        x = x / layer.smooth.numpy()
    if spec.a_bits == 16:
        return x.astype(np.float64)
    out = np.zeros(x.shape)
    for m, row in enumerate(x.astype(f)):
        if spec.weight == "fp8":
            s = f(np.abs(row).max()) / f(448) or f(1)
            codes = torch.from_numpy(row / s).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
            out[m] = codes.astype(np.float64) * float(s)
        elif spec.weight == "uint":
            largest = 2**spec.a_bits - 1
            clip = layer.a_clip.numpy() if layer.a_clip is not None else (f(1), f(1))
            lo, hi = min(row.min(), f(0)) * clip[0], max(row.max(), f(0)) * clip[1]
            s = max((hi - lo) / f(largest), f(1e-6))
            z = np.clip(np.rint(-lo / s), 0, largest)
            out[m] = (np.clip(np.rint(row / s) + z, 0, largest).astype(np.float64) - float(z)) * float(s)
        else:
            largest = 2 ** (spec.a_bits - 1) - 1
            size = spec.a_group if 0 < spec.a_group < len(row) else len(row)
            for i in range(0, len(row), size):
                part = row[i : i + size]
                s = f(np.abs(part).max()) / f(largest) or f(1)
                out[m, i : i + size] = np.clip(np.rint(part / s), -largest, largest).astype(np.float64) * float(s)
    return out


def expected(layer: QuantLinear, x: Tensor) -> np.ndarray:
    """Quantized activation times dequantized weight in float64; the branch takes the activation unquantized."""
    flat = x.reshape(-1, x.shape[-1]).float().numpy()
    weight = layer.dequantize().double().numpy()
    smooth = np.ones(flat.shape[1]) if layer.smooth is None else layer.smooth.double().numpy()
    branch = np.zeros_like(weight)
    if layer.lr_up is not None and layer.lr_down is not None:
        branch = layer.lr_up.double().numpy() @ layer.lr_down.double().numpy()
    out = quantized_activation(flat, layer) @ (weight * smooth - branch).T + (flat / smooth) @ branch.T
    if layer.bias is not None:
        out = out + layer.bias.double().numpy()
    return out.reshape(*x.shape[:-1], layer.out_features)


def off(got: Tensor, wanted: np.ndarray) -> float:
    if not wanted.size:
        return 0.0
    return float(np.abs(got.double().numpy() - wanted).max() / np.abs(wanted).max())


# The contract of every scheme.


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smooth", [True, False])
def test_forward_is_the_product_of_what_the_codes_stand_for(name: str, bias: bool, smooth: bool) -> None:
    layer = made(name, bias=bias, smooth=smooth)
    if layer.a_clip is not None:
        layer.a_clip.copy_(torch.tensor([0.9, 0.8]))
    for shape in SHAPES:
        x = inputs(*shape)
        got = layer(x)
        assert got.shape == (*shape[:-1], 24)
        assert got.dtype == torch.float32
        assert off(got, expected(layer, x)) <= INTEGER
    strided = inputs(40, 6).T
    assert off(layer(strided), expected(layer, strided)) <= INTEGER


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (3, 17), (24, 33), (8, 129)])
def test_small_and_odd_sizes(name: str, n: int, k: int) -> None:
    layer = made(name, n=n, k=k)
    x = inputs(4, k)
    assert off(layer(x), expected(layer, x)) <= 2 * INTEGER
    assert layer.codes().shape == layer.dequantize().shape == (n, k)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    layer = made(name, dtype=dtype)
    x = inputs(2, 5, 40, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    # The branch and weight-only products are of the dtype throughout; the others are rounded once, at the end.
    roundings = 4 if layer.rank or layer.spec.a_bits == 16 else 1
    assert off(got, expected(layer, x)) <= roundings * HALF[dtype]
    wide = layer(x.float())  # float32 inputs are taken whatever the layer's dtype
    assert wide.dtype == torch.float32
    assert off(wide, expected(layer, x)) <= roundings * HALF[dtype]


@pytest.mark.parametrize("name", SCHEMES)
def test_odd_rows(name: str) -> None:
    layer = made(name)
    x = inputs(5, 40)
    clean = layer(x)
    x[1] = 0
    x[2, 7], x[3, 20] = float("nan"), float("inf")
    got = layer(x)
    assert torch.equal(got[1], layer.bias)
    assert not bool(got[2:4].isfinite().any())
    assert torch.equal(got[[0, 4]], clean[[0, 4]])
    order = torch.tensor([3, 0, 4, 2, 1])
    fresh = inputs(5, 40, seed=6)
    assert off(layer(fresh[order]), layer(fresh)[order].double().numpy()) <= 1e-6
    large = torch.full((1, 40), 3e4, dtype=torch.float16)  # sums overflow float16 unless they are computed wider
    small = made(name, bias=False)
    small.w_scale.mul_(1e-3)
    if small.lr_up is not None:
        small.lr_up.mul_(1e-3)
    assert bool(small(large).isfinite().all())


@pytest.mark.parametrize("name", SCHEMES)
def test_eight_and_four_bits_stay_near_the_original(name: str) -> None:
    original, x = linear(64, 256), inputs(32, 256)
    layer = QuantLinear.from_linear(original, get_scheme(name))
    with torch.no_grad():
        wanted = original(x)
    error = float((layer(x) - wanted).norm() / wanted.norm())
    spec = layer.spec
    worst = min(spec.w_bits, spec.a_bits)
    assert error <= {8: 0.045, 4: 0.25, 3: 0.55}[worst]


@pytest.mark.parametrize("name", SCHEMES)
def test_casts_leave_codes_and_scales_alone(name: str) -> None:
    layer = made(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    colsum = None if layer.w_colsum is None else layer.w_colsum.clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        model = nn.Sequential(layer)
        cast(model)
        for key in PROTECTED:
            if key in before:
                now = layer.get_parameter(key)
                assert now.dtype == before[key].dtype, key
                assert torch.equal(now.float(), before[key].float()), key
        x = inputs(3, 40)
        assert bool(layer(x).isfinite().all())
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.lr_up is None or layer.lr_up.dtype == torch.bfloat16
    assert (layer.w_colsum is None) == (colsum is None)
    assert colsum is None or torch.equal(layer.w_colsum, colsum)


@pytest.mark.parametrize("name", SCHEMES)
def test_state_copies_and_pickles_come_back(name: str) -> None:
    layer = made(name)
    x = inputs(3, 40)
    wanted = layer(x)
    fresh = QuantLinear(40, 24, layer.spec)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    with torch.device("meta"):
        empty = QuantLinear(40, 24, layer.spec)
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    file = io.BytesIO()
    torch.save(layer, file)  # torch's pickle: the plain one does not know float8
    file.seek(0)
    for other in (fresh, empty, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), wanted)
        assert list(other.state_dict()) == list(layer.state_dict())
    assert "w_colsum" not in layer.state_dict()
    assert not any(p.requires_grad for p in layer.parameters())
    incomplete = dict(layer.state_dict())
    del incomplete["w_scale"]
    with pytest.raises(RuntimeError, match="w_scale"):
        fresh.load_state_dict(incomplete, strict=True)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(24, 40), (5, 33)])
def test_the_bytes_are_those_that_the_scheme_counts(name: str, n: int, k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = made(name, n=n, k=k, bias=False, dtype=dtype)
        held = sum(p.nbytes for p in layer.parameters())
        assert held == layer.spec.weight_bytes(n, k, branch_bytes=dtype.itemsize)


@pytest.mark.parametrize("name", SCHEMES)
def test_an_input_that_requires_grad_is_refused(name: str) -> None:
    layer, x = made(name), inputs(2, 40).requires_grad_()
    with pytest.raises(UnsupportedInputError, match=r"no_grad.*qvgen"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (2, 24)
    with torch.inference_mode():
        assert torch.equal(layer(inputs(2, 40)), layer(inputs(2, 40)))


@pytest.mark.parametrize("name", SCHEMES)
def test_it_compiles_in_one_graph(name: str) -> None:
    layer, x = made(name), inputs(6, 40)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


# Shapes, errors, parts.


def test_another_width_is_refused_even_where_the_bytes_would_fit() -> None:
    layer = made("w4a16", k=33)
    with pytest.raises(ValueError, match="34 features, the layer takes 33"):
        layer(inputs(2, 34))


def test_there_is_no_weight_and_the_error_says_what_to_do() -> None:
    layer = made("w8a8_int8")
    assert not isinstance(layer, nn.Linear)
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"fuse projections or LoRA before quantizing; dequantize\(\)"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        _ = layer.bogus


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_give_back_the_same_layer(name: str) -> None:
    layer = made(name)
    again = QuantLinear.from_codes(
        layer.codes(), layer.w_scale, layer.w_zero, layer.bias, layer.spec, a_clip=layer.a_clip
    )
    for key in ("qweight", "w_scale", "w_zero", "a_clip", "bias"):
        mine, theirs = getattr(layer, key), getattr(again, key)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.float(), theirs.float())


def test_an_odd_byte_is_filled_with_the_code_of_zero() -> None:
    for name in ("w4a4_int", "w4a16", "w4a8_int8"):
        layer = made(name, k=33)
        filling = layer.qweight[:, -1] >> 4
        zero = 8 if layer.w_zero is None else layer.w_zero[:, -1].float().round().clamp(0, 15)
        assert bool((filling == zero).all()), name


def test_what_a_scheme_lacks_is_refused() -> None:
    with pytest.raises(QuantConfigError, match="takes no smoothing"):
        QuantLinear.from_linear(linear(), get_scheme("w8a8_int8"), smooth=torch.ones(40))
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(QuantConfigError, match="needs zero-points"):
        QuantLinear.from_codes(codes, torch.ones(2, 1), None, None, get_scheme("w4a4_int"))


def test_a_rank_that_a_small_layer_cannot_hold_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    layer = QuantLinear.from_linear(linear(16, 40), get_scheme("svdq_w4a16"))
    assert (layer.rank, layer.lr_up.shape, layer.lr_down.shape) == (16, (16, 16), (16, 40))
    assert "rank 32 is more than a 16x40 layer can hold" in caplog.text


# q, k and v quantize their input once.


def siblings(name: str = "w8a8_int8", count: int = 3) -> list[QuantLinear]:
    layers = [made(name, seed=10 * i) for i in range(count)]
    share_activations(layers)
    return layers


def quantizations(run) -> int:
    with ops.counters() as ran:
        run()
    return sum(count for (op, _), count in ran.items() if op.startswith("act_quant"))


@pytest.mark.parametrize("name", ["w8a8_int8", "w8a8_fp8", "w4a8_int8", "svdq_w4a4"])
def test_three_projections_quantize_once(name: str) -> None:
    layers, x = siblings(name), inputs(2, 5, 40)
    alone = [copy.deepcopy(layer) for layer in layers]
    assert quantizations(lambda: [layer(x) for layer in layers]) == 1
    assert quantizations(lambda: [layer(x) for layer in alone]) == 3  # copies share nothing
    for layer, single in zip(layers, alone, strict=True):
        assert torch.equal(layer(x), single(x))


def test_what_was_shared_is_never_stale() -> None:
    q, k, v = siblings()
    x = inputs(4, 40)
    q(x)
    x.mul_(-3)  # in place: the same tensor with other contents
    assert off(k(x), expected(k, x)) <= INTEGER
    x[1].zero_()  # through a view
    assert off(v(x), expected(v, x)) <= INTEGER
    q(x)
    other = x.clone()
    other[0] = 5
    assert off(k(other), expected(k, other)) <= INTEGER
    for seed in range(5):  # memory that is handed out again
        fresh = inputs(4, 40, seed=seed)
        assert off(q(fresh), expected(q, fresh)) <= INTEGER
        del fresh


def test_the_memory_is_dropped_after_the_last_member_or_with_the_input() -> None:
    q, k, v = siblings()
    memory = q.shared
    assert memory is not None
    x = inputs(4, 40)
    q(x), k(x)
    assert memory._entry is not None
    v(x)
    assert memory._entry is None
    q(x)
    del x
    gc.collect()
    assert memory._entry is None


def test_inference_mode_quantizes_each_time() -> None:
    layers = siblings()
    with torch.inference_mode():
        x = inputs(4, 40)
        first = layers[0](x).clone()
        x.mul_(2)  # has no version that could tell
        assert off(layers[1](x), expected(layers[1], x)) <= INTEGER
        assert off(first * 2, (layers[0](x) + layers[0].bias).double().numpy()) <= 1e-5


@pytest.mark.parametrize(
    "names", [("w8a8_int8", "w8a8_fp8"), ("w4a16", "w4a16"), ("w4a4_int", "w4a4_int"), ("w8a8_int8",)]
)
def test_layers_that_quantize_differently_do_not_share(names: tuple[str, ...]) -> None:
    layers = [made(name) for name in names]
    share_activations(layers)
    assert all(layer.shared is None for layer in layers)


def test_layers_with_different_smoothing_do_not_share_even_if_it_is_loaded_later() -> None:
    one, other = siblings("svdq_w4a8", 2)
    assert one.shared is other.shared is not None
    state = {**other.state_dict(), "smooth": torch.full((40,), 2.0)}
    other.load_state_dict(state)
    x = inputs(3, 40)
    one(x)
    assert off(other(x), expected(other, x)) <= INTEGER
    assert other.shared is None
    share_activations([made("svdq_w4a8"), other])
    assert other.shared is None


class Steps(nn.Module):
    """As much of a block as matters: a timestep and layers that share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(siblings())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * (1 + timestep[:, None, None])
        return sum(layer(x) for layer in self.qkv)  # type: ignore[return-value]


def test_another_timestep_does_not_recompile() -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, x = Steps(), inputs(2, 5, 40)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for t in (999, 500, 1):
            timestep = torch.full((2,), t / 1000)
            torch.testing.assert_close(compiled(x, timestep), model(x, timestep), rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1
