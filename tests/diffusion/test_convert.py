"""Quantizing whole models: tiny random transformers of the four families, text encoders, and everything refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmeff import ops
from vlmeff.diffusion import convert as converting
from vlmeff.diffusion.convert import convert, dtype_of, is_known, link_siblings, quantize_
from vlmeff.diffusion.families import text_encoder_rules
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.rules import as_rules
from vlmeff.diffusion.schemes import SCHEMES
from vlmeff.errors import AlreadyQuantizedError, IncompatibleError, QuantConfigError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

W8A8_ERROR = 0.01  # relative, of the model's output
FAMILIES = {
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 96,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (8, 8, 8),
        },
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "num_layers": 2,
            "caption_channels": 16,
        },
    ),
}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transformer(family: str) -> nn.Module:
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def call(family: str, model: nn.Module, seed: int = 1) -> Tensor:
    text, timestep = randn(2, 6, 16, seed=seed + 1), torch.tensor([500, 500])
    if family == "wan":
        inputs: dict[str, Any] = {"hidden_states": randn(2, 4, 2, 8, 8, seed=seed)}
    elif family == "cogvideox":
        inputs = {"hidden_states": randn(2, 2, 4, 8, 8, seed=seed)}
    elif family == "hunyuan_video":
        inputs = {"hidden_states": randn(2, 4, 2, 8, 8, seed=seed), "pooled_projections": randn(2, 8)}
        inputs |= {"encoder_attention_mask": torch.ones(2, 6), "guidance": torch.tensor([6000.0, 6000.0])}
    else:
        inputs = {"hidden_states": randn(2, 128, 4, seed=seed), "num_frames": 2, "height": 8, "width": 8}
        inputs |= {"encoder_attention_mask": torch.ones(2, 6)}
    with torch.no_grad():
        return model(encoder_hidden_states=text, timestep=timestep, return_dict=False, **inputs)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_within_a_percent_and_restore_gives_every_bit_back(family: str) -> None:
    model = transformer(family)
    before, wanted = state(model), call(family, model)
    originals = dict(model.named_modules())
    result = quantize_(model, "w8a8_int8")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers
    assert set(layers) == set(result.specs)
    assert sum(group.count for group in result.table.groups if group.scheme) == len(layers)
    got = call(family, model)
    assert 0 < relative(got, wanted) <= W8A8_ERROR
    with ops.counters() as ran:
        call(family, model)
    products = ran["linear_w8a8_int8", "reference"]
    assert products == sum(layer.spec.scheme == "w8a8_int8" for layer in layers.values())
    assert ran["act_quant_int8", "reference"] < products  # q, k and v quantize once
    for layer in layers.values():
        layer.shared = None
    assert torch.equal(call(family, model), got)
    model.train()
    assert result.restore() is model
    assert same(model, before)
    assert all(model.get_submodule(name) is originals[name] for name in layers)
    assert model.get_submodule(next(iter(layers))).training
    assert torch.equal(call(family, model.eval()), wanted)
    with pytest.raises(QuantConfigError, match="not kept"):
        result.restore()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs_on_wan_calibrated_or_not(scheme: str) -> None:
    wanted = call("wan", transformer("wan"))
    limit = {8: W8A8_ERROR if "fp8" not in scheme else 0.04, 4: 0.25, 3: 0.5}
    spec = SCHEMES[scheme]
    for calibrated in (False, True) if spec.smooth else (False,):
        model = transformer("wan")
        options: dict[str, Any] = {"group": 16, "rank": 4} if spec.rank else {}
        calls: list[int] = []

        def calibrate(model: nn.Module = model, calls: list[int] = calls) -> None:
            calls.append(1)
            call("wan", model, seed=4)

        result = quantize_(model, scheme, calibrate=calibrate if calibrated else None, **options)
        assert result.calibrated == calibrated
        assert len(calls) == calibrated
        assert relative(call("wan", model), wanted) <= limit[min(spec.w_bits, spec.a_bits)]
        smooths = [m.smooth for m in model.modules() if isinstance(m, QuantLinear) and m.smooth is not None]
        assert len(smooths) == (20 if spec.smooth else 0)
        assert all(bool((s != 1).any()) == calibrated for s in smooths)
    if spec.smooth:  # q, k and v take one vector, so that they can share their codes
        attention = model.blocks[0].attn1
        assert torch.equal(attention.to_q.smooth, attention.to_k.smooth)
        assert torch.equal(attention.to_q.smooth, attention.to_v.smooth)
        cross = model.blocks[0].attn2
        assert not torch.equal(cross.to_q.smooth, cross.to_k.smooth)


def test_half_precision_models_keep_their_type() -> None:
    model = transformer("wan").to(torch.bfloat16)
    quantize_(model, "w8a8_int8")
    assert dtype_of(model) == torch.bfloat16
    model.to(torch.float32)
    assert model.blocks[0].attn1.to_q.qweight.dtype == torch.int8
    assert model.blocks[0].attn1.to_q.w_scale.dtype == torch.float32


# Failures


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_a_failure_in_the_middle_restores_everything(error: type[BaseException]) -> None:
    model = transformer("wan")
    before, wanted, modules = state(model), call("wan", model), dict(model.named_modules())

    def fail(done: int, total: int) -> None:
        assert total == 20
        if done == 7:
            raise error("out of memory")

    with pytest.raises(error, match="out of memory"):
        quantize_(model, "w8a8_int8", progress=fail)
    assert same(model, before)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert torch.equal(call("wan", model), wanted)
    assert quantize_(model, "w4a16").specs  # and it can be quantized after all


def test_a_layer_that_cannot_be_quantized_leaves_the_model_as_it_was() -> None:
    model = transformer("wan")
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[0, 0] = float("nan")
    with pytest.raises(QuantConfigError, match="NaN or infinities"):
        quantize_(model, "w8a8_int8")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_failure_without_the_originals_says_so() -> None:
    def fail(done: int, total: int) -> None:
        raise Broken("stop")

    with pytest.raises(Broken) as caught:
        quantize_(transformer("wan"), "w8a8_int8", keep_original=False, progress=fail)
    assert "partly quantized" in caught.value.__notes__[0]
    result = quantize_(transformer("wan"), "w8a8_int8", keep_original=False)
    with pytest.raises(QuantConfigError, match="keep_original=False"):
        result.restore()


# What is refused


def test_weights_that_are_not_there_are_refused() -> None:
    name, config = FAMILIES["wan"]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    with pytest.raises(IncompatibleError, match=r"blocks\.0\.attn1\.to_q.*quantize before enabling offload"):
        quantize_(model, "w8a8_int8")


def test_sequential_offload_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = transformer("wan")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(IncompatibleError, match="quantize before enabling offload"):
        quantize_(model, "w8a8_int8")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_layerwise_casting_is_refused() -> None:
    model = transformer("wan")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(IncompatibleError, match="enable_layerwise_casting"):
        quantize_(model, "w8a8_int8")


def test_group_offload_is_refused() -> None:
    model = transformer("wan")
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(IncompatibleError, match=r"enable_group_offload.*quantize before enabling offload"):
        quantize_(model, "w8a8_int8")


def test_adapters_are_refused_before_and_after() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"])
    model = transformer("wan")
    model.add_adapter(config)
    with pytest.raises(IncompatibleError, match=r"carries an adapter.*fuse_lora"):
        quantize_(model, "w8a8_int8")
    model = transformer("wan")
    quantize_(model, "w8a8_int8")
    with pytest.raises(ValueError, match="QuantLinear"):
        model.add_adapter(config)


def test_fusing_projections_afterwards_says_what_to_do() -> None:
    model = transformer("wan")
    quantize_(model, "w8a8_int8")
    with pytest.raises(AttributeError, match="fuse projections or LoRA before quantizing"):
        model.blocks[0].attn1.fuse_projections()


def test_fusing_before_is_fine() -> None:
    model = transformer("wan")
    for block in model.blocks:
        block.attn1.fuse_projections()
    wanted = call("wan", model)
    quantize_(model, "w8a8_int8", rules=[(r"blocks\.\d+\.attn1\.to_[qkv]", "keep")])
    assert isinstance(model.blocks[0].attn1.to_qkv, QuantLinear)
    assert relative(call("wan", model), wanted) <= W8A8_ERROR


def test_twice_and_unknown_classes_are_refused() -> None:
    model = transformer("wan")
    quantize_(model, "w8a8_int8")
    with pytest.raises(AlreadyQuantizedError, match=r"blocks\.0\.attn1\.to_q is quantized already"):
        quantize_(model, "w8a8_int8")
    plain = nn.Sequential(nn.Linear(4, 4))
    assert is_known(model)
    assert not is_known(plain)
    with pytest.raises(UnsupportedModelError, match="Sequential"):
        quantize_(plain, "w8a8_int8")
    assert quantize_(plain, "w8a8_int8", rules=[("0", "default")]).specs["0"].scheme == "w8a8_int8"


# Shared weights, text encoders


class Shared(nn.Module):
    def __init__(self, *, one_bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.b.weight = self.a.weight
        if one_bias:
            self.b.bias = self.a.bias
        self.again = self.c  # one module, two names

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("one_bias", [True, False])
def test_shared_weights_become_one_module_unless_the_biases_differ(one_bias: bool) -> None:
    model, x = Shared(one_bias=one_bias), randn(5, 8)
    with torch.no_grad():
        model.b.bias.add_(1)
        wanted, before = model(x), state(model)
    result = convert(model, "w8a8_int8", as_rules([(".*", "default")]))
    assert (model.a is model.b) == one_bias
    assert model.c is model.again
    assert torch.equal(model.a.qweight, model.b.qweight)
    with torch.no_grad():
        assert relative(model(x), wanted) <= 0.03
        result.restore()
        assert model.b.weight is model.a.weight
        assert model.c is model.again
        assert same(model, before)
        assert torch.equal(model(x), wanted)


def test_layers_of_one_attention_are_linked_and_those_of_cross_attention_are_not() -> None:
    names = [f"{a}.{p}" for a in ("blocks.0.attn1", "blocks.0.attn2") for p in ("to_q", "to_k", "to_v")]
    model = transformer("wan")
    quantize_(model, "w8a8_int8")
    memories = {name: model.get_submodule(name).shared for name in names}
    assert memories[names[0]] is memories[names[1]] is memories[names[2]] is not None
    assert memories[names[3]] is None
    assert memories[names[4]] is memories[names[5]] is not None
    assert memories[names[4]] is not memories[names[0]]
    single = copy.deepcopy(model.get_submodule(names[0]))
    link_siblings({"attn.to_q": single})
    assert single.shared is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoder_is_quantized_and_its_owners_still_read_wo(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=64, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoder, ids = transformers.UMT5EncoderModel(config).eval().to(dtype), torch.arange(10)[None]
    with torch.no_grad():
        wanted = encoder(ids).last_hidden_state
        result = convert(encoder, "w8a16_int8", text_encoder_rules(encoder))
        got = encoder(ids).last_hidden_state
    dense = encoder.encoder.block[0].layer[-1].DenseReluDense
    assert isinstance(dense.wo, QuantLinear)
    assert dense.wo.weight is None
    with pytest.raises(AttributeError, match="dequantize"):
        _ = dense.wi_0.weight
    assert len(result.specs) == 14
    assert got.dtype == dtype
    assert relative(got.float(), wanted.float()) <= W8A8_ERROR * (1 if dtype == torch.float32 else 2)
    result.restore()
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, wanted)


def test_progress_counts_every_layer() -> None:
    seen: list[tuple[int, int]] = []
    quantize_(transformer("ltx_video"), "w8a16_int8", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 20) for i in range(20)]


def test_the_hardware_is_asked_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("wan")
    before = state(model)

    def refuse(*_: Any) -> None:
        raise QuantConfigError("no such arithmetic")

    monkeypatch.setattr(converting, "check_hardware", refuse)
    with pytest.raises(QuantConfigError, match="no such arithmetic"):
        quantize_(model, "w8a8_fp8")
    assert same(model, before)
