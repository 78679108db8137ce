"""Dropping blocks: the model without them is what is left, undoing restores it, rankings are those of brute force."""

import itertools

import pytest
import torch

from vlmeff.diffusion.blocks import (
    block_importance,
    drop_blocks,
    quality_curve,
    rank_blocks,
    recorded_calls,
    relative_error,
)
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")


def wan(layers=4, name="WanTransformer3DModel", **config):
    torch.manual_seed(layers)
    tiny = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 8, "in_channels": 4}
    return getattr(diffusers, name)(**tiny, num_layers=layers, out_channels=4, **config).eval()


def hunyuan():
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2, "num_single_layers": 3}
    config |= {"text_embed_dim": 8, "pooled_projection_dim": 6, "rope_axes_dim": (2, 4, 4), "num_refiner_layers": 1}
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, guidance_embeds=False, **config
    ).eval()


def calls_of(model, count=2):
    generator = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    calls = []
    for index in range(count):
        call = {"hidden_states": make(1, 4, 2, 4, 4), "encoder_hidden_states": make(1, 3, 8)}
        call["timestep"] = torch.tensor([900.0 - 400 * index])
        if "Hunyuan" in type(model).__name__:
            call |= {"encoder_attention_mask": torch.ones(1, 3), "pooled_projections": make(1, 6)}
        calls.append(call)
    return calls


@torch.no_grad()
def run(model, call):
    return model(**call, return_dict=False)[0]


def test_a_shortened_model_equals_one_built_with_those_blocks_and_undoing_restores_it():
    model, short = wan(4), wan(2)
    (call,) = calls_of(model, 1)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.")}
    for new, old in enumerate((1, 3)):
        state |= {f"blocks.{new}.{key}": value for key, value in model.blocks[old].state_dict().items()}
    short.load_state_dict(state, strict=True)
    before, blocks, config = run(model, call), model.blocks, dict(model.config)
    with drop_blocks(model, keep=[1, 3]) as handle:
        assert torch.equal(run(model, call), run(short, call))
        assert model.config.num_layers == 2
        assert handle.kept == {"blocks": (1, 3)}
        assert handle.dropped == {"blocks": (0, 2)}
        assert handle.params == 2 * sum(p.numel() for p in blocks[0].parameters())
    assert model.blocks is blocks
    assert dict(model.config) == config
    assert torch.equal(run(model, call), before)
    handle.undo()  # a second time: nothing


def test_a_shortened_model_can_be_saved_and_loaded(tmp_path):
    model = wan(3)
    (call,) = calls_of(model, 1)
    drop_blocks(model, keep=[0, 2])
    model.save_pretrained(tmp_path)
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    # The loaded weights lie in mapped memory, whose alignment chooses other CPU kernels: last digits differ.
    assert torch.allclose(run(again, call), run(model, call), atol=1e-5)


def test_both_lists_of_hunyuan_are_shortened_separately():
    model = hunyuan()
    (call,) = calls_of(model, 1)
    before = run(model, call)
    with drop_blocks(model, keep={"single_transformer_blocks": [2]}) as handle:
        assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 1)
        assert (model.config.num_layers, model.config.num_single_layers) == (2, 1)
        assert handle.dropped == {"single_transformer_blocks": (0, 1)}
        assert not torch.equal(run(model, call), before)
    with drop_blocks(model, keep={"transformer_blocks": [], "single_transformer_blocks": [0]}):
        assert run(model, call).shape == before.shape
    assert torch.equal(run(model, call), before)


def test_nested_drops_are_undone_in_reverse_order_only():
    model = wan(4)
    first = drop_blocks(model, keep=[0, 1, 3])
    second = drop_blocks(model, keep=[0, 2])
    with pytest.raises(IncompatibleError, match="changed after"):
        first.undo()
    second.undo()
    first.undo()
    assert len(model.blocks) == 4


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ([], "names no block"),
        ([4], "4 is not a block of blocks, which has blocks 0 to 3"),
        ([-1], "-1 is not a block"),
        ([True], "True is not a block"),
        ([1.0], "1.0 is not a block"),
        ([2, 1], "must be ascending"),
        ([1, 1], "must be ascending"),
        ({"layers": [0]}, "no block list 'layers'"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_changes(keep, text):
    model = wan(4)
    with pytest.raises(ConfigError, match=text):
        drop_blocks(model, keep=keep)
    assert len(model.blocks) == model.config.num_layers == 4


def test_models_that_cannot_be_shortened_say_why():
    with pytest.raises(ConfigError, match=r"2 block lists .*keep=\{'transformer_blocks'"):
        drop_blocks(hunyuan(), keep=[0])
    with pytest.raises(UnsupportedModelError, match="vace_layers"):
        drop_blocks(wan(2, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=4), keep=[0])
    model = wan(3)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(IncompatibleError, match="disable_cache"):
        drop_blocks(model, keep=[0])


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_importance_by_error_equals_skipping_each_block(make):
    model = make()
    calls = calls_of(model)
    scores = block_importance(model, calls)
    wanted = [run(model, call) for call in calls]
    for (name, index), score in scores.items():
        block = getattr(model, name)[index]
        block.forward = lambda *args, **kwargs: args[:2] if name != "blocks" else args[0]  # noqa: B023
        skipped = [run(model, call) for call in calls]
        del block.forward
        off = torch.cat([(a - b).flatten() for a, b in zip(skipped, wanted, strict=True)]).norm()
        assert score == pytest.approx((off / torch.cat([w.flatten() for w in wanted]).norm()).item(), rel=1e-4)
    assert len(scores) == (4 if make is wan else 5)


def test_importance_by_cosine_is_that_of_inputs_and_outputs():
    model = wan(3)
    with torch.no_grad():
        model.blocks[1].scale_shift_table.zero_()
        for parameter in (model.blocks[1].attn2.to_out[0].weight, model.blocks[1].attn2.to_out[0].bias):
            parameter.zero_()
    calls = calls_of(model)
    scores = block_importance(model, calls, method="cosine")
    seen = []
    handle = model.blocks[2].register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    for call in calls:
        run(model, call)
    handle.remove()
    distances = [1 - torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in seen]
    assert scores["blocks", 2] == pytest.approx(torch.cat(distances, 1).mean().item(), rel=1e-4)
    assert min(scores.values()) >= -1e-6


def test_greedy_ranking_equals_brute_force_step_by_step():
    model = wan(4)
    calls = calls_of(model)
    wanted = [run(model, call) for call in calls]

    def error(keep):
        with drop_blocks(model, keep=keep):
            return relative_error([run(model, call) for call in calls], wanted)

    order = rank_blocks(model, calls, drop=3)
    left = [0, 1, 2, 3]
    for (name, index), score in order:
        candidates = {i: error([j for j in left if j != i]) for i in left}
        assert name == "blocks"
        assert score == candidates[index] == min(candidates.values())
        left.remove(index)
    # the first step of greedy is the best single block of all
    assert order[0][1] == min(error(list(keep)) for keep in itertools.combinations(range(4), 3))


def test_the_curve_starts_without_error_and_its_points_can_be_applied():
    model = wan(4)
    calls = calls_of(model)
    order = [block for block, _ in rank_blocks(model, calls, method="error", drop=2)]
    curve = quality_curve(model, calls, order)
    assert [point.kept for point in curve] == [4, 3, 2]
    assert curve[0].error == 0.0
    assert curve[1].error > 0
    wanted = [run(model, call) for call in calls]
    with drop_blocks(model, curve[2].keep):
        assert relative_error([run(model, call) for call in calls], wanted) == curve[2].error
    assert len(model.blocks) == 4


def test_arguments_of_rankings_are_checked():
    model = wan(2)
    calls = calls_of(model, 1)
    with pytest.raises(ConfigError, match="calls is empty"):
        block_importance(model, [])
    with pytest.raises(ConfigError, match="method='greedy'"):
        block_importance(model, calls, method="greedy")
    with pytest.raises(ConfigError, match="drop=2 of 2 blocks"):
        rank_blocks(model, calls, drop=2)
    with pytest.raises(ConfigError, match="no block"):
        quality_curve(model, calls, [("blocks", 5)])


@pytest.mark.parametrize("made", [1, 3, 4, 9, 40])
def test_recorded_calls_are_spread_over_all(made):
    model = wan(1)
    (call,) = calls_of(model, 1)
    with recorded_calls(model, limit=4) as calls:
        for step in range(made):
            run(model, {**call, "timestep": torch.tensor([float(step)])})
    steps = [int(entry["timestep"]) for entry in calls]
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    assert steps[0] == 0
    assert len(gaps) <= 1
    assert min(made, 2) <= len(steps) <= 4
    assert steps[-1] + (gaps.pop() if gaps else 1) >= made
    run(model, call)
    assert len(calls) == len(steps)  # nothing is recorded after the block


def test_recorded_calls_are_copies_and_must_be_named():
    model = wan(1)
    (call,) = calls_of(model, 1)
    with recorded_calls(model) as calls:
        run(model, call)
        call["hidden_states"].zero_()
        with pytest.raises(ConfigError, match="positional"):
            model(call["hidden_states"])
    assert calls[0]["hidden_states"].abs().sum() > 0
