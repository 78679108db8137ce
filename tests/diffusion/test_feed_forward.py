"""GELU folded into the quantized layer behind it: the same bits, and nobody can tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmeff import ops
from vlmeff.diffusion.convert import Quantized, convert
from vlmeff.diffusion.rules import as_rules

attention = pytest.importorskip("diffusers.models.attention")
RULES = as_rules([(r"ff\.net\.(0\.proj|2)", "default")])


class Block(nn.Module):
    def __init__(self, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.ff = attention.FeedForward(12, activation_fn=activation, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ff(x)
        return out


def block(
    activation: str = "gelu-approximate", scheme: str = "w8a8_int8", dropout: float = 0.0, **options: Any
) -> tuple[Block, Quantized]:
    torch.manual_seed(0)
    model = Block(activation, dropout).eval()
    return model, convert(model, scheme, RULES, **options)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def one_by_one(model: Block, x: Tensor) -> Tensor:
    for module in model.ff.net:
        x = module(x)
    return x


@torch.no_grad()
def folds(model: Block, x: Tensor) -> bool:
    """Whether a call is folded; what it gives is checked on the way."""
    with ops.counters() as ran:
        got = model(x)
    assert torch.equal(got, one_by_one(model, x))
    return bool(ran["gelu_quant_int8", "reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate"])
@pytest.mark.parametrize("scheme", ["w8a8_int8", "w4a8_int8"])
def test_it_gives_the_same_bits(scheme: str, activation: str, dtype: torch.dtype) -> None:
    model, _ = block(activation, scheme)
    assert folds(model.to(dtype), tokens(dtype))


@pytest.mark.parametrize("scheme", ["w8a8_fp8", "w8a16_int8", "svdq_w4a8", "svdq_w4a4", "w4a4_int"])
def test_other_schemes_are_left_alone(scheme: str) -> None:
    assert not folds(block(scheme=scheme)[0], tokens())


@pytest.mark.parametrize("activation", ["geglu", "linear-silu", "swiglu"])
def test_other_activations_are_left_alone(activation: str) -> None:
    assert not folds(block(activation)[0], tokens())


def add_hook(model: Block) -> None:
    model.ff.net[2].register_forward_pre_hook(lambda module, args: None)


def add_gelu_hook(model: Block) -> None:
    model.ff.net[0].register_forward_hook(lambda module, args, out: None)


def offload(model: Block) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.ff.net[2], hooks.ModelHook())


def subclass_the_layer(model: Block) -> None:
    class Other(type(model.ff.net[2])):  # type: ignore[misc]
        pass

    model.ff.net[2].__class__ = Other


def lengthen(model: Block) -> None:
    model.ff.net.append(nn.Identity())


@pytest.mark.parametrize("change", [add_hook, add_gelu_hook, offload, subclass_the_layer, lengthen])
def test_whoever_looks_between_sees_what_was_always_there(change: Callable[[Block], None]) -> None:
    model, _ = block()
    assert folds(model, tokens())
    change(model)
    assert not folds(model, tokens())


def test_active_dropout_is_not_skipped() -> None:
    model, _ = block(dropout=0.5)
    assert folds(model, tokens())
    model.train()
    with ops.counters() as ran, torch.no_grad():
        model(tokens())
    assert not ran["gelu_quant_int8", "reference"]


def test_a_replaced_projection_is_called() -> None:
    """As an adapter (LoRA) replaces it."""
    model, _ = block()
    inner = model.ff.net[0].proj
    model.ff.net[0].proj = nn.Sequential(inner, nn.Tanh())
    assert folds(model, tokens())


def test_counting_hooks_do_not_switch_it_off() -> None:
    diffusers = pytest.importorskip("diffusers")
    from vlmeff.diffusion.convert import quantize_
    from vlmeff.diffusion.counting import count_work

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    quantize_(model, "w8a8_int8")
    arguments = (torch.randn(1, 4, 2, 4, 4), torch.tensor([5]), torch.randn(1, 6, 16))
    with torch.no_grad(), ops.counters() as alone:
        expected = model(*arguments).sample
    with torch.no_grad(), ops.counters() as ran, count_work(model) as work:
        assert torch.equal(model(*arguments).sample, expected)
    assert alone["gelu_quant_int8", "reference"] == ran["gelu_quant_int8", "reference"] == 2
    assert work.linear_flops > 0


def test_names_copies_and_restoring() -> None:
    torch.manual_seed(0)
    before = Block("gelu").eval()
    expected, names = before(tokens()), list(before.state_dict())
    result = convert(before, "w8a8_int8", RULES)
    assert {name.rpartition(".")[0] for name in before.state_dict()} == {name.rpartition(".")[0] for name in names}
    for other in (copy.deepcopy(before), pickle.loads(pickle.dumps(before))):
        with torch.no_grad():
            other.ff.net[2].w_scale.mul_(2)  # the copy's forward reads the copy's tensors
            assert folds(other, tokens())
            assert not torch.equal(other(tokens()), before(tokens()))
    result.restore()
    assert "forward" not in before.ff.__dict__
    assert list(before.state_dict()) == names
    assert torch.equal(before(tokens()), expected)


def test_a_hook_around_the_feed_forward_survives_restoring() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    torch.manual_seed(0)
    model = Block("gelu").eval()
    expected = model(tokens())
    result = convert(model, "w8a8_int8", RULES)
    hooks.add_hook_to_module(model.ff, hooks.ModelHook())
    assert folds(model, tokens())
    result.restore()
    assert torch.equal(model(tokens()), expected)
    hooks.remove_hook_from_module(model.ff)
    assert torch.equal(model(tokens()), expected)


def test_it_compiles_in_one_piece() -> None:
    model, _ = block()
    with torch.no_grad():
        expected = model(tokens())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()), expected)
