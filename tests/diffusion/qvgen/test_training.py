"""The training loop: what teacher and student are shown, resuming bit for bit, the effect of Phi at the start."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import qvgen_toy as toy

from vlmeff.diffusion.qvgen.config import TrainingConfig
from vlmeff.diffusion.qvgen.data import ClipFolder, collate, order, split, write_clips
from vlmeff.diffusion.qvgen.denoising import cogvideox_velocity, noising_of, velocity_of, wan_velocity
from vlmeff.diffusion.qvgen.fake_quant import FakeQuantLinear
from vlmeff.diffusion.qvgen.prepare import parameter_groups, prepare_qat, set_slot
from vlmeff.diffusion.qvgen.training import CHECKPOINT, LOG, PLOT, DivergedError, train
from vlmeff.errors import (
    AlreadyQuantizedError,
    CheckpointError,
    ConfigError,
    DataError,
    QuantConfigError,
    UnsupportedModelError,
    VlmeffError,
)

QUICK = {"steps": 12, "batch_size": 2, "rank": 4, "lr": 1e-3, "warmup_steps": 2, "validation_clips": 2}


def run(transformer=None, clips=None, *, shift=1.0, out=None, **settings):
    call = {key: settings.pop(key) for key in ("resume", "stop_at", "velocity", "progress") if key in settings}
    config = TrainingConfig(**{**QUICK, **settings})
    return train(
        toy.build_toy() if transformer is None else transformer,
        toy.clips(10) if clips is None else clips,
        toy.scheduler(shift),
        config,
        out=out,
        empty_prompt=toy.empty_prompt(),
        **call,
    )


def losses(training):
    return [row["loss"] for row in training.history if "loss" in row]


class Seen:
    """A velocity function that writes down what it is called with: teacher and student in turn."""

    def __init__(self):
        self.calls = []

    def __call__(self, transformer, x, t, prompt):
        self.calls.append((transformer, x.clone(), t.clone(), prompt.clone()))
        return wan_velocity(transformer, x, t, prompt)


# ---------------------------------------------------------------------------------------- the effect of Phi


def test_phi_lowers_the_first_loss_the_first_gradients_and_while_kept_the_error():
    """The claims that hold at toy scale, W2A8; that the final model beats plain training is not one of them."""
    results = {}
    for phi in (None, "keep"):
        training = run(
            toy.trained_toy(steps=60),
            toy.clips(),
            steps=40,
            batch_size=4,
            w_bits=2,
            a_bits=8,
            rank=16,
            phi=phi,
            warmup_steps=5,
            validation_clips=4,
        )
        rows = [row for row in training.history if "loss" in row]
        results[phi] = (
            rows[0]["loss"],
            sum(row["grad_norm"] for row in rows[:20]) / 20,
            training.final_validation,
        )
        if phi is None:  # training helps at all
            assert sum(row["loss"] for row in rows[-5:]) / 5 < 0.6 * rows[0]["loss"]
    start, gradient, end = (kept / plain for kept, plain in zip(results["keep"], results[None], strict=True))
    assert start < 0.5
    assert gradient < 1.0
    assert end < 0.7


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stops", [(5,), (3, 9)])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, stops):
    settings = {"steps": 14, "rank": 3, "condition_dropout": 0.4, "slots": 3, "validate_every": 5}
    whole = run(out=tmp_path / "whole", **settings)
    torch.manual_seed(123)  # the global random state of the resumed process is another
    for stop in stops:
        run(out=tmp_path / "broken", resume=True, stop_at=stop, **settings)
    resumed = run(out=tmp_path / "broken", resume=True, **settings)
    assert losses(resumed) == losses(whole)
    assert resumed.history == whole.history
    assert {row["rank"] for row in whole.history if "loss" in row} == {3, 1, 0}
    ours, theirs = resumed.transformer.state_dict(), whole.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [(tmp_path / name / LOG).read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines() if "loss" in json.loads(line)] == list(range(14))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(out=tmp_path, stop_at=2)
    with pytest.raises(ConfigError, match="resume=True"):
        run(out=tmp_path)
    with pytest.raises(CheckpointError, match=r"lr \(was 0.001, is 0.002\)"):
        run(out=tmp_path, resume=True, lr=2e-3)
    with pytest.raises(CheckpointError, match="10 clips, these are 12"):
        run(out=tmp_path, resume=True, clips=toy.clips(12))
    with pytest.raises(ConfigError, match="out="):
        run(resume=True)
    assert len(losses(run(out=tmp_path, resume=True, save_every=7))) == 12  # saving more often is the same run
    (tmp_path / CHECKPOINT).write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(out=tmp_path, resume=True)


# ---------------------------------------------------------------------------------------- what is shown


def test_teacher_and_student_see_the_same_and_the_teacher_is_the_original():
    seen, original = Seen(), toy.build_toy()
    reference = {name: value.clone() for name, value in original.state_dict().items()}
    run(original, velocity=seen, steps=12, validation_clips=0, shift=3.0)
    assert len(seen.calls) == 24
    timesteps = set()
    for (teacher, *shown), (student, *also) in zip(seen.calls[::2], seen.calls[1::2], strict=True):
        assert teacher is not student
        assert all(torch.equal(a, b) for a, b in zip(shown, also, strict=True))
        timesteps.update(shown[1].tolist())
        assert not any(p.requires_grad for p in teacher.parameters())
    teacher = seen.calls[0][0]
    assert all(torch.equal(value, reference[name]) for name, value in teacher.state_dict().items())
    # Timesteps are those of the shifted schedule of inference.
    legal = {round(1000 * 3 * u / (1 + 2 * u), 2) for u in (i / 1000 for i in range(1, 1001))}
    assert {round(t, 2) for t in timesteps} <= legal


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.5, 0.5), (0.999, 1.0)])
def test_conditions_are_dropped_for_the_empty_prompt(dropout, share):
    seen = Seen()
    run(velocity=seen, steps=12, batch_size=8, condition_dropout=dropout, validation_clips=0)
    prompts = torch.cat([prompt for _, _, _, prompt in seen.calls[::2]])
    empty = (prompts == 0).all(dim=(1, 2)).float().mean()
    assert abs(float(empty) - share) <= 0.15


def test_with_clip_slots_a_batch_stays_in_one_slot():
    seen = Seen()
    training = run(velocity=seen, steps=12, batch_size=6, slots=4, validation_clips=0, shift=3.0)
    slots = [{min(int(t * 4 / 1000), 3) for t in call[2].tolist()} for call in seen.calls]
    assert all(len(found) == 1 for found in slots)
    visited = {next(iter(found)) for found in slots}
    assert len(visited) > 1
    assert len({t for call in seen.calls for t in call[2].tolist()}) > 20  # not one timestep a batch
    layer = next(iter(training.layers.values()))
    start = math.log(0.95 / 0.05)
    moved = {slot for slot in range(4) if not torch.allclose(layer.a_clip[slot], torch.tensor(start))}
    assert moved == visited


def test_the_first_loss_is_the_mean_squared_difference_of_the_two_models():
    seen = Seen()
    training = run(velocity=seen, steps=12, validation_clips=0, phi=None)
    teacher, x, t, prompt = seen.calls[0]
    fresh = toy.build_toy()
    prepare_qat(fresh, None, 4, None)
    with torch.no_grad():
        expected = (wan_velocity(teacher, x, t, prompt) - wan_velocity(fresh, x, t, prompt)).pow(2).mean()
    assert losses(training)[0] == pytest.approx(float(expected), rel=1e-5)


def test_every_epoch_shows_every_clip_once_in_another_order():
    chosen = [index for step in range(10) for index in order(list(range(7)), step=step, batch_size=3, seed=1)]
    epochs = [chosen[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert split(range(40), 8) == (list(range(32)), list(range(32, 40)))
    assert split(range(4), 8) == (list(range(4)), [])


# ---------------------------------------------------------------------------------------- running


def test_a_run_logs_checks_draws_and_ends_without_phi(tmp_path):
    rows = []
    training = run(out=tmp_path, validate_every=4, progress=rows.append)
    assert tuple(rows) == training.history
    steps = [row for row in rows if "loss" in row]
    assert all({"loss", "grad_norm", "rank", "phi_share", "lr"} <= row.keys() for row in steps)
    assert [row["rank"] for row in steps] == [4, 4, 2, 2, 1, 1, *[0] * 6]
    assert steps[0]["phi_share"] > 0
    assert steps[-1]["phi_share"] == 0
    checks = [row for row in rows if "validation" in row]
    assert [row["step"] for row in checks] == [3, 7, 11]
    assert checks[0]["validation"] != checks[0]["validation_without_phi"]
    assert checks[-1]["validation"] == checks[-1]["validation_without_phi"]
    assert all(layer.phi_L is None for layer in training.layers.values())
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    assert not training.transformer.training


@pytest.mark.parametrize("phi", ["svd", "lora", "drop", "keep", None])
def test_every_kind_of_phi_trains(phi):
    training = run(phi=phi, decay_fraction=1.0)
    assert all(int(layer.rank) == (4 if phi == "keep" else 0) for layer in training.layers.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_and_checkpointing_run(checkpointing):
    training = run(precision="bfloat16", gradient_checkpointing=checkpointing, stop_at=2)
    assert all(math.isfinite(loss) for loss in losses(training))
    assert next(training.transformer.parameters()).dtype == torch.float32  # masters


def test_checkpointing_does_not_change_the_losses():
    runs = [run(gradient_checkpointing=checkpointing, stop_at=3) for checkpointing in (True, False)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_nan_stops_the_training_and_leaves_the_last_checkpoint(tmp_path):
    calls = []

    def breaks(transformer, x, t, prompt):
        calls.append(1)
        return wan_velocity(transformer, x, t, prompt) * (math.nan if len(calls) > 8 else 1.0)

    with pytest.raises(DivergedError, match="step 4: the loss is nan") as caught:
        run(out=tmp_path, velocity=breaks, save_every=2, validation_clips=0)
    assert CHECKPOINT in str(caught.value)
    assert isinstance(caught.value, VlmeffError)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 4


def test_a_run_without_an_empty_prompt_is_refused_unless_nothing_is_dropped():
    config = TrainingConfig(**QUICK)
    with pytest.raises(QuantConfigError, match="empty_prompt="):
        train(toy.build_toy(), toy.clips(5), toy.scheduler(), config)
    train(toy.build_toy(), toy.clips(5), toy.scheduler(), TrainingConfig(**QUICK, condition_dropout=0.0), stop_at=1)


# ---------------------------------------------------------------------------------------- preparing


def test_the_rules_of_the_family_choose_the_layers():
    model = toy.build_toy()
    layers = prepare_qat(model)
    per_block = {f"attn{a}.{p}" for a in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")}
    per_block |= {"ffn.net.0.proj", "ffn.net.2"}
    assert set(layers) == {f"blocks.{i}.{name}" for i in (0, 1) for name in per_block}
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert type(model.proj_out) is nn.Linear
    with pytest.raises(AlreadyQuantizedError):
        prepare_qat(model)
    with pytest.warns(UserWarning, match="exceeds"):
        everything = prepare_qat(toy.build_toy(), [(".+", "default")])
    assert sum(isinstance(m, nn.Linear) for m in toy.build_toy().modules()) == len(everything)


def test_names_choose_layers_and_unknown_ones_are_refused():
    assert set(prepare_qat(toy.build_toy(), ["proj_out"], rank=4)) == {"proj_out"}
    with pytest.raises(QuantConfigError, match="nowhere"):
        prepare_qat(toy.build_toy(), ["proj_out", "nowhere"], rank=4)
    with pytest.raises(QuantConfigError, match="bits"):
        prepare_qat(toy.build_toy(), bits=1)
    with pytest.raises(QuantConfigError, match="phi"):
        prepare_qat(toy.build_toy(), phi="svdd")


def test_a_shared_weight_becomes_one_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

    model = Tied()
    assert list(prepare_qat(model, ["a", "b"], rank=2)) == ["a"]
    assert model.a is model.b


def test_every_parameter_is_in_exactly_one_group():
    model = toy.build_toy()
    layers = prepare_qat(model, rank=4)
    groups = {group["name"]: group for group in parameter_groups(model, lr=1e-4, clip_lr=1e-2, weight_decay=0.1)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "other": 0.1,
        "weights": 0.1,
        "ranges": 0.0,
        "phi": 0.0,
        "clip": 0.0,
    }
    assert {group["lr"] for name, group in groups.items() if name != "clip"} == {1e-4}
    assert groups["clip"]["lr"] == 1e-2
    assert len(groups["phi"]["params"]) == 2 * len(layers)


def test_timesteps_of_several_slots_in_one_batch_are_refused():
    model = nn.Sequential(FakeQuantLinear.from_linear(nn.Linear(4, 4), slots=4))
    set_slot(model, torch.tensor([[260.0, 300.0]]))
    assert int(model[0].slot) == 1
    with pytest.raises(QuantConfigError, match="2 of 4"):
        set_slot(model, torch.tensor([10.0, 900.0]))


# ---------------------------------------------------------------------------------------- noise and models


def test_flow_noise_is_that_of_the_scheduler():
    scheduler = toy.scheduler(shift=3.0)
    noising = noising_of(scheduler)
    # The scheduler lists them from noisy to clean.
    torch.testing.assert_close(noising.timesteps, scheduler.timesteps.flip(0), atol=1e-3, rtol=1e-5)
    x, noise = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    index = torch.tensor([0, 499, 999])
    expected = scheduler.scale_noise(x, scheduler.timesteps.flip(0)[index], noise)
    torch.testing.assert_close(noising.add(x, noise, index), expected, atol=1e-5, rtol=1e-5)
    even = noising_of(scheduler, shift=1.0).timesteps
    torch.testing.assert_close(even, torch.arange(1, 1001).float(), atol=1e-3, rtol=1e-5)


def test_v_prediction_noise_is_that_of_the_scheduler():
    from diffusers import CogVideoXDDIMScheduler, DDPMScheduler

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    x, noise, index = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2), torch.tensor([0, 400, 999])
    noising = noising_of(scheduler)
    torch.testing.assert_close(noising.add(x, noise, index), scheduler.add_noise(x, noise, noising.timesteps[index]))
    with pytest.raises(QuantConfigError, match="shift"):
        noising_of(scheduler, shift=3.0)
    with pytest.raises(UnsupportedModelError, match="epsilon"):
        noising_of(DDPMScheduler())


def test_other_flow_schedulers_say_their_shift():
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert noising_of(unipc).shift == 5.0
    with pytest.raises(QuantConfigError, match="shift"):
        noising_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def tiny_cogvideox(**settings):
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=toy.CHANNELS,
        out_channels=toy.CHANNELS,
        time_embed_dim=16,
        text_embed_dim=toy.WIDTH,
        num_layers=1,
        sample_width=toy.SIDE,
        sample_height=toy.SIDE,
        sample_frames=9,
        max_text_seq_length=toy.TEXT,
        **settings,
    )


def test_cogvideox_trains_with_its_own_noise_and_order_of_axes():
    from diffusers import CogVideoXDDIMScheduler

    model = tiny_cogvideox()
    x, t, prompt = torch.randn(2, toy.CHANNELS, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, toy.TEXT, toy.WIDTH)
    out = cogvideox_velocity(model, x, t, prompt)
    expected = model(x.permute(0, 2, 1, 3, 4), prompt, t).sample.permute(0, 2, 1, 3, 4)
    assert torch.equal(out, expected)
    training = train(
        model,
        toy.clips(5),
        CogVideoXDDIMScheduler(prediction_type="v_prediction"),
        TrainingConfig(**QUICK),
        empty_prompt=toy.empty_prompt(),
    )
    assert set(training.layers) == {
        f"transformer_blocks.0.{n}"
        for n in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }
    with pytest.raises(UnsupportedModelError, match="rotary"):
        velocity_of(tiny_cogvideox(use_rotary_positional_embeddings=True))


def test_models_that_need_more_inputs_are_refused():
    with pytest.raises(UnsupportedModelError, match="velocity="):
        velocity_of(nn.Linear(2, 2))
    model = toy.build_toy()
    model.register_to_config(in_channels=8)
    with pytest.raises(UnsupportedModelError, match="pictures"):
        velocity_of(model)


# ---------------------------------------------------------------------------------------- data


def test_clips_come_back_from_a_folder_as_they_were(tmp_path):
    made = toy.clips(7)
    made[3] = (made[3][0].bfloat16(), made[3][1])
    assert write_clips(iter(made), tmp_path, empty_prompt=toy.empty_prompt(), per_shard=3) == 7
    folder = ClipFolder(tmp_path)
    assert len(folder) == 7
    assert len(list(tmp_path.glob("clips-*.safetensors"))) == 3
    for i, (latents, prompt) in enumerate(made):
        assert torch.equal(folder[i][0], latents)
        assert folder[i][0].dtype == latents.dtype
        assert torch.equal(folder[i][1], prompt)  # padding is cut in the file and comes back
    assert torch.equal(folder.empty_prompt, toy.empty_prompt())
    with pytest.raises(IndexError):
        folder[7]
    with pytest.raises(ConfigError, match="already"):
        write_clips(made, tmp_path)


def test_broken_data_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ClipFolder(tmp_path / "none")
    with pytest.raises(DataError, match="no clips-"):
        ClipFolder(tmp_path)
    (tmp_path / "clips-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        ClipFolder(tmp_path)
    clips = toy.clips(3)
    clips[1] = (clips[1][0][:, :2], clips[1][1])
    with pytest.raises(DataError, match="clips 0 and 1"):
        collate(clips, [0, 1])
    clips[2][0][0, 0, 0, 0] = math.inf
    with pytest.raises(DataError, match="clip 2 holds NaN"):
        collate(clips, [2])


def test_encoding_normalises_latents_as_the_pipeline_undoes_it(tmp_path):
    from vlmeff.diffusion.qvgen.encode import encode_clips
    from vlmeff.models.tiny_wan.architecture import build_pipeline, build_vae

    torch.manual_seed(0)
    mean, std = [0.1 * i for i in range(8)], [1.0 + 0.2 * i for i in range(8)]
    pipe = build_pipeline(vae=build_vae(mean, std))
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pairs = [(video, "a red circle moving left")]
    assert encode_clips(pipe, pairs, tmp_path, max_sequence_length=16) == 1
    folder = ClipFolder(tmp_path)
    latents, prompt = folder[0]
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.mode()[0]
    shape = (8, 1, 1, 1)
    torch.testing.assert_close(latents * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape), raw)
    embedded, _ = pipe.encode_prompt("a red circle moving left", max_sequence_length=16)
    torch.testing.assert_close(prompt, embedded[0])
    empty, _ = pipe.encode_prompt("", max_sequence_length=16)
    torch.testing.assert_close(folder.empty_prompt, empty[0])
    with pytest.raises(DataError, match="6 frames"):
        encode_clips(pipe, [(video[[0, 1, 2, 3, 4, 4]], "x")], tmp_path / "six", max_sequence_length=16)
    with pytest.raises(UnsupportedModelError, match="WanPipeline"):
        encode_clips(object(), pairs, tmp_path / "other")


# ---------------------------------------------------------------------------------------- settings


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 50\nbits: 3\nlr: 3e-5\nphi: none\nrules:\n- [proj_out, keep]\n")
    config = TrainingConfig.from_yaml(file, steps=60)
    assert (config.steps, config.w_bits, config.a_bits, config.lr, config.phi) == (60, 3, 3, 3e-5, None)
    assert config.rules == (("proj_out", "keep"),)
    assert TrainingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(QuantConfigError, match="Did you mean 'decay_fraction'"):
        TrainingConfig.from_dict({"decay_fracton": 0.5})
    with pytest.raises(QuantConfigError, match="cannot be read"):
        TrainingConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", True),
        ("w_bits", 9),
        ("lr", 0.0),
        ("lr", math.nan),
        ("beta2", 1.0),
        ("condition_dropout", 1.0),
        ("grad_clip", -1),
        ("shift", 0),
        ("precision", "float16"),
        ("phi", "svdd"),
        ("rank", -1),
        ("decay", 1.5),
        ("decay_fraction", 0),
        ("warmup_steps", -1),
        ("rules", (("one",),)),
        ("gradient_checkpointing", "yes"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(QuantConfigError, match=setting):
        TrainingConfig(**{setting: value})


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    config = TrainingConfig(steps=100, warmup_steps=10)
    assert [config.lr_factor(t) for t in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.lr_factor(55) == pytest.approx(0.5)
    assert config.lr_factor(10) == 1.0
    assert 0 < config.lr_factor(99) < 0.001
