"""Packed layers against the fake-quantized ones they come from, and the import of official checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.qvgen.export import export, export_spec, to_inference
from vlmeff.diffusion.qvgen.fake_quant import FakeQuantLinear
from vlmeff.diffusion.qvgen.official import convert_official
from vlmeff.diffusion.qvgen.prepare import prepare_qat
from vlmeff.errors import CheckpointError, ExportError

EQUAL = 1e-5  # of the largest output: one float32 product against an integer one


def trained(n=24, k=40, *, bits=(4, 4), bias=True, compat=None, slots=1, seed=0):
    """A layer whose ranges and clips have moved from where they start."""
    torch.manual_seed(seed)
    layer = FakeQuantLinear.from_linear(
        nn.Linear(k, n, bias=bias), w_bits=bits[0], a_bits=bits[1], compat=compat, slots=slots
    )
    with torch.no_grad():
        layer.w_scale.mul_(torch.empty_like(layer.w_scale).uniform_(0.7, 1.2))
        layer.w_zero.add_(torch.empty_like(layer.w_zero).uniform_(-0.5, 0.5))
        layer.a_clip.add_(torch.empty_like(layer.a_clip).uniform_(-1.5, 0.5))
    return layer


def tokens(*shape, seed=1):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1, shape[-1])[0] = 0.0  # padded text
    x.view(-1, shape[-1])[1] = x.view(-1, shape[-1])[1].abs() + 2  # one sign
    return x


def assert_equal(layer, packed, x):
    with torch.no_grad():
        expected, found = layer(x), packed(x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= EQUAL * float(expected.abs().max())


@pytest.mark.parametrize("compat", [None, "qvgen"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 4), (4, 7)])
def test_the_packed_layer_computes_the_same(bits, bias, compat):
    layer = trained(bits=bits, bias=bias, compat=compat)
    packed = layer.to_inference()
    assert isinstance(packed, QuantLinear)
    assert packed.spec.scheme == ("w3a3_sim" if bits == (3, 3) else "w4a4_int")
    assert_equal(layer, packed, tokens(2, 9, 40))
    torch.testing.assert_close(packed.dequantize(), layer.quantized_weight(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (5, 64), (16, 1025)])
def test_odd_and_small_sizes(n, k):
    assert_equal(layer := trained(n, k), layer.to_inference(), tokens(5, k))


def test_equality_holds_after_training_steps():
    layer = trained(bits=(3, 3))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    for step in range(20):
        optimizer.zero_grad()
        layer(tokens(16, 40, seed=step)).pow(2).mean().backward()
        optimizer.step()
        layer.clamp_scales()
    assert_equal(layer, layer.to_inference(), tokens(64, 40))


def test_a_layer_that_still_has_phi_is_refused_by_name_and_rank():
    layer = FakeQuantLinear.from_linear(nn.Linear(8, 8), phi="svd", rank=3)
    with pytest.raises(ExportError, match=r"blocks\.0\.q: .* rank 3"):
        layer.to_inference(name="blocks.0.q")
    layer.remove_phi()
    layer.to_inference()


def test_what_integers_cannot_compute_is_refused():
    with pytest.raises(ExportError, match="a_bits=8"):
        export_spec(4, 8)
    with pytest.raises(ExportError, match="w_bits=8"):
        export_spec(8, 4)
    layer = trained()
    layer.use_act_quant = False
    with pytest.raises(ExportError, match="switched off"):
        layer.to_inference()


def test_several_clips_are_refused_or_averaged_on_request():
    layer = trained(slots=3)
    with pytest.raises(ExportError, match="3 clips"):
        layer.to_inference()
    packed = to_inference(layer, slots="mean")
    torch.testing.assert_close(packed.a_clip.data, layer.a_clip.sigmoid().mean(0).detach())
    with torch.no_grad():
        layer.a_clip.copy_(torch.logit(packed.a_clip).expand(3, 2))
    layer.set_slot(700)
    assert_equal(layer, packed, tokens(9, 40))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))))


def test_export_swaps_all_layers_or_none():
    model = Small()
    layers = prepare_qat(model, ["first", "second"], rank=4)
    layers["first"].remove_phi()
    with pytest.raises(ExportError, match="second"):
        export(model)
    assert isinstance(model.first, FakeQuantLinear)  # nothing happened
    layers["second"].remove_phi()
    x = tokens(8, 12)
    inputs = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: inputs.__setitem__(name, (args[0], out)))
    model(x)
    assert export(model) == ["first", "second"]
    assert type(model.out) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    for name, (given, expected) in inputs.items():
        found, expected = model.get_submodule(name)(given.detach()), expected.detach()
        assert float((found - expected).abs().max()) <= EQUAL * float(expected.abs().max())
    with pytest.raises(ExportError, match="no fake-quantized"):
        export(model)


def test_a_layer_in_two_places_is_exported_to_both():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    prepare_qat(model, ["a", "b"], phi=None)
    assert export(model) == ["a"]
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"]


def test_a_trained_transformer_is_written_and_read_back_bit_for_bit(tmp_path):
    pytest.importorskip("diffusers")
    import qvgen_toy as toy

    from vlmeff.diffusion.checkpoint import load_quantized, save_quantized
    from vlmeff.diffusion.qvgen.config import TrainingConfig
    from vlmeff.diffusion.qvgen.training import train

    config = TrainingConfig(steps=12, rank=4, w_bits=3, a_bits=3, validation_clips=0, lr=1e-3)
    training = train(toy.build_toy(), toy.clips(4), toy.scheduler(), config, empty_prompt=toy.empty_prompt())
    model = training.transformer
    call = {
        "hidden_states": torch.randn(1, toy.CHANNELS, toy.FRAMES, toy.SIDE, toy.SIDE),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": toy.clips(1)[0][1][None],
    }
    inputs = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: inputs.__setitem__(name, (args[0], out)))
        for name, layer in training.layers.items()
    ]
    with torch.no_grad():
        before = model(**call).sample
    for hook in hooks:
        hook.remove()
    names = export(model)
    assert len(names) == len(inputs) == 20
    with torch.no_grad():
        for name, (given, expected) in inputs.items():
            found = model.get_submodule(name)(given)
            assert float((found - expected).abs().max()) <= EQUAL * float(expected.abs().max()), name
        # In a chain of layers the last bit of a sum can move an activation to the next code, rarely.
        after = model(**call).sample
        assert float((after - before).norm()) <= 0.02 * float(before.norm())
        save_quantized(model, tmp_path, producer="qvgen")
        again = load_quantized(tmp_path)
        assert torch.equal(again(**call).sample, after)


def test_casting_leaves_codes_scales_and_sensitive_parts_alone():
    pytest.importorskip("diffusers")
    import qvgen_toy as toy

    model = toy.build_toy()
    prepare_qat(model, None, 4, None)
    export(model, dtype=torch.bfloat16)
    layer = model.blocks[0].attn1.to_q
    assert layer.w_scale.dtype == layer.a_clip.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------- official checkpoints


def official_state(n=6, k=10, bits=4, *, lora=False, seed=0):
    """Keys and shapes of a checkpoint of the official code: one quantized linear, one full, other tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    w = random(n, k)
    state = {
        "blocks.0.attn1.to_q.w": w,
        "blocks.0.attn1.to_q.b": random(n),
        "blocks.0.attn1.to_q.wquantizer.scale": (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**bits - 1),
        "blocks.0.attn1.to_q.wquantizer.zero_point": random(n, 1) + 7,
        "blocks.0.attn1.to_q.aquantizer.upper": torch.full((50,), 2.0),
        "blocks.0.attn1.to_q.aquantizer.lower": torch.full((50,), 1.0),
        "proj_out.w": random(4, n),
        "proj_out.b": random(4),
        "blocks.0.scale_shift_table": random(1, 6, n),
        "patch_embedding.weight": random(n, 4, 1, 2, 2),
    }
    if lora:
        state["blocks.0.attn1.to_q.loraA.weight"] = random(2, k)
        state["blocks.0.attn1.to_q.loraB.weight"] = random(n, 2)
    return state


def official_forward(state, name, x, bits):
    """What the official layer computes (without gradients), written out."""
    top = 2**bits - 1
    hi = torch.sigmoid(state[f"{name}.aquantizer.upper"][0]) * (x.amax(-1, keepdim=True) * 0.95)
    lo = torch.sigmoid(state[f"{name}.aquantizer.lower"][0]) * (x.amin(-1, keepdim=True) * 0.95)
    s = ((hi - lo) / top).clamp_min(1e-9)
    z = (-torch.round(lo / s)).clamp(0, top)
    x_hat = s * ((torch.round(x / s) + z).clamp(0, top) - z)
    w, scale, zero = (state[f"{name}.{key}"] for key in ("w", "wquantizer.scale", "wquantizer.zero_point"))
    if f"{name}.loraA.weight" in state:
        w = w + state[f"{name}.loraB.weight"] @ state[f"{name}.loraA.weight"]
    w_hat = scale * (torch.clamp(torch.round(w / scale + zero), 0, top) - zero)
    return F.linear(x_hat, w_hat, state[f"{name}.b"])


NAME = "blocks.0.attn1.to_q"


def part(converted):
    return {key.removeprefix(f"{NAME}."): value for key, value in converted.items() if key.startswith(f"{NAME}.")}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_an_official_layer_computes_the_same_after_the_import(bits, lora):
    state = official_state(bits=bits, lora=lora)
    x = tokens(12, 10)
    expected = official_forward(state, NAME, x, bits)

    converted, layers = convert_official(state, bits=bits, target="training")
    assert layers == [NAME]
    layer = FakeQuantLinear(10, 6, w_bits=bits, a_bits=bits, compat="qvgen")
    layer.load_state_dict(part(converted))
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)

    converted, _ = convert_official(state, bits=bits)
    packed = QuantLinear(10, 6, export_spec(bits, bits, compat=True))
    packed.load_state_dict(part(converted))
    # 0.95 * sigmoid is one factor here: a rounding error of it may move a value to the next code.
    off = (packed(x) - expected).abs() > EQUAL * float(expected.abs().max())
    assert float(off.float().mean()) <= 0.1


def test_clips_are_averaged_over_the_slots_on_each_side():
    state = official_state()
    state[f"{NAME}.aquantizer.upper"] = torch.linspace(-1, 3, 50)
    clip = part(convert_official(state)[0])["a_clip"]
    assert clip[0] == pytest.approx(0.95 * float(torch.sigmoid(torch.tensor(1.0))), rel=1e-5)  # lower first
    assert clip[1] == pytest.approx(0.95 * float(torch.linspace(-1, 3, 50).sigmoid().mean()), rel=1e-5)


@pytest.mark.parametrize("target", ["inference", "training"])
def test_everything_else_keeps_its_values_under_the_names_of_diffusers(target):
    state = official_state(lora=True)
    converted, _ = convert_official(state, target=target)
    assert torch.equal(converted["proj_out.weight"], state["proj_out.w"])
    assert torch.equal(converted["proj_out.bias"], state["proj_out.b"])
    for key in ("blocks.0.scale_shift_table", "patch_embedding.weight"):
        assert converted[key] is state[key]
    own = {"w_scale", "w_zero", "a_clip", "bias"}
    own |= {"qweight"} if target == "inference" else {"weight", "rank", "slot"}
    assert set(part(converted)) == own
    others = {"proj_out.weight", "proj_out.bias", "blocks.0.scale_shift_table", "patch_embedding.weight"}
    assert set(converted) == others | {f"{NAME}.{key}" for key in own}


def test_what_is_left_of_an_auxiliary_module_is_dropped_with_a_warning():
    state = official_state()
    clean = convert_official(state)[0]
    state[f"{NAME}.wquantizer.L"], state[f"{NAME}.wquantizer.R"] = torch.ones(6, 2), torch.ones(2, 10)
    with pytest.warns(UserWarning, match="auxiliary module, which is dropped"):
        converted = convert_official(state)[0]
    assert converted.keys() == clean.keys()


def test_incomplete_checkpoints_are_refused():
    for missing in ("w", "wquantizer.zero_point", "aquantizer.upper"):
        state = official_state()
        del state[f"{NAME}.{missing}"]
        with pytest.raises(CheckpointError, match=missing):
            convert_official(state)
    state = official_state()
    state[f"{NAME}.wquantizer.scale"] = torch.ones(5, 1)
    with pytest.raises(CheckpointError, match=r"\[6, 1\]"):
        convert_official(state)
