"""tiny-wan: clips, training, the shipped pipeline, and ``vlmeff generate video`` over it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("ftfy")

from diffusers import WanPipeline

from vlmeff import cli_generate
from vlmeff.diffusion import generating, sheet
from vlmeff.errors import ConfigError, MissingExtraError
from vlmeff.loading import embedded_folder
from vlmeff.models.tiny_wan import autoencoding, clips, fitting, flow, probe, train
from vlmeff.models.tiny_wan.architecture import (
    CALL,
    build_transformer,
    build_vae,
    digests,
    load_pipeline,
    save_pipeline,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = embedded_folder("tiny_wan")
RESULT = ROOT / "benchmarks" / "results" / "tiny_wan.json"
MAX_BYTES = 4_000_000
SETTINGS = train.Settings


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(FOLDER)


def generate(pipe: Any, prompt: Any, seed: int = 0, **call: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="np", **(CALL | call)).frames


def test_a_clip_is_the_same_every_time_and_no_two_splits_share_one() -> None:
    first, again = clips.draw("train", 7), clips.draw("train", 7)
    assert first == again
    assert (first.pixels() == again.pixels()).all()
    others = [clips.draw(split, 7) for split in clips.SPLITS] + [clips.draw("train", 8), clips.draw("train", 7, seed=1)]
    assert len({(c.x, c.y, c.radius, c.speed) for c in others}) == len(others)
    assert [clips.draw("train", i).prompt for i in range(48)] == clips.prompts()


@pytest.mark.parametrize("direction", clips.DIRECTIONS)
def test_shapes_move_as_the_prompt_says_and_stay_in_the_picture(direction: str) -> None:
    for index in range(12):
        shape = clips.SHAPES[index % 3]
        clip = clips.draw("heldout", index, kind=("blue", shape, direction))
        cover = clip.coverage()
        weight = cover.sum((1, 2))
        np.testing.assert_allclose(weight, weight.mean(), rtol=0.03)  # nothing is cut off
        y, x = np.mgrid[: clips.SIDE, : clips.SIDE] + 0.5
        centre = np.stack([(cover * x).sum((1, 2)) / weight, (cover * y).sum((1, 2)) / weight], 1)
        step = np.diff(centre, axis=0)
        expected = clip.speed * np.array({"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[direction])
        np.testing.assert_allclose(step, np.broadcast_to(expected, step.shape), atol=0.15)


def test_coverage_is_what_counting_points_gives() -> None:
    fine = (np.arange(64 * 8) + 0.5) / 8
    for shape in clips.SHAPES:
        clip = clips.Clip(color="red", shape=shape, direction="left", x=31.3, y=30.6, radius=9.2, speed=3.0)
        (x, y) = clip.centres()[4]
        px, py = np.meshgrid(fine - x, fine - y)
        if shape == "circle":
            inside = px**2 + py**2 <= clip.radius**2
        elif shape == "square":
            inside = np.maximum(abs(px), abs(py)) <= 0.9 * clip.radius
        else:
            corners = 1.45 * clip.radius * np.array([[0, -1], [np.sqrt(0.75), 0.5], [-np.sqrt(0.75), 0.5]])
            corners[:, 1] += 1.45 * clip.radius / 4  # the middle of the box, not the centroid, is the place
            inside = np.ones_like(px, bool)
            for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):
                inside &= (b[0] - a[0]) * (py - a[1]) - (b[1] - a[1]) * (px - a[0]) >= 0
        counted = inside.reshape(64, 8, 64, 8).mean((1, 3))
        # The distance's ramp is a pixel wide along the normal, not along the axes.
        assert abs(clip.coverage()[4] - counted).mean() < 0.002
        assert abs(clip.coverage()[4] - counted).max() < 0.3


def test_prompts_are_read_back_and_others_refused() -> None:
    for prompt in clips.prompts():
        assert clips.prompt_of(*clips.parse_prompt(f" {prompt.upper()} ")) == prompt
    with pytest.raises(ConfigError, match="purple"):
        clips.parse_prompt("a purple circle moving left")


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(folder: Path, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            module = nn.Linear(3, 2)

            def loss(step: int, module: nn.Module = module, stop: int = stop) -> tuple[torch.Tensor, str]:
                if step == stop:
                    raise KeyboardInterrupt
                x = torch.randn(4, 3, generator=fitting.seeded(1, step))
                return module(x).square().mean(), ""

            try:
                fitting.fit("s", module, loss, steps=30, peak_lr=0.1, work=folder, average=0.9, save_every=5)
            except KeyboardInterrupt:
                assert torch.load(folder / "s.pt", weights_only=True)["step"] == stop // 5 * 5
        return module.state_dict()

    unbroken, resumed = run(tmp_path / "a", (-1,)), run(tmp_path / "b", (13, 22, -1))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def small(steps: int) -> train.Settings:
    return SETTINGS(
        steps=dict.fromkeys(train.STAGES, steps),
        batch=dict.fromkeys(train.STAGES, 2),
        cycle={},
        latents=48,
        fast=False,
    )


def test_one_command_trains_exports_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_EVERY", 1)
    monkeypatch.setattr(train, "Settings", lambda seed: dataclasses.replace(small(2), seed=seed))
    # Any latents will do; encoding 48 clips takes seconds.
    monkeypatch.setattr(
        autoencoding, "encode_clips", lambda *_: torch.randn(48, 8, 3, 8, 8, generator=fitting.seeded(5))
    )
    monkeypatch.setattr(flow, "channel_weights", lambda *_: torch.ones(8))
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path)])
    train.main()
    files = {name: (tmp_path / "weights" / name).read_bytes() for name in digests(tmp_path / "weights")}
    assert set(files) == set(digests(FOLDER))
    pipe = WanPipeline.from_pretrained(tmp_path / "weights")
    trained = torch.load(tmp_path / "outline.pt", weights_only=True)["averaged"]
    for parameter, value in zip(pipe.transformer.parameters(), trained, strict=True):
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.data, value.half().float(), rtol=0, atol=0)
    # A second run finds all done and writes the same files.
    train.main()
    for name, data in files.items():
        assert (tmp_path / "weights" / name).read_bytes() == data
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path), "--steps", "whole=3"])
    with pytest.raises(SystemExit, match="2 steps, not 3"):
        train.main()


def test_training_of_the_transformer_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(48, 8, 3, 8, 8, generator=fitting.seeded(2))
    coded = train.Coded(latents=latents, mean=[0.0] * 8, std=[1.0] * 8, weights=torch.arange(8) / 3.5)
    settings = small(3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    unbroken = train.train_transformer(tmp_path / "a", settings, coded)
    real, fit = flow.flow_step, fitting.fit
    monkeypatch.setattr(train, "fit", lambda *a, **k: fit(*a, **k, save_every=1))
    for stops_weighted in (False, True):  # once in each stage

        def stopping(*arguments: Any, stops_weighted: bool = stops_weighted, **named: Any) -> Any:
            if arguments[4] == 2 and (named["weights"] is not None) == stops_weighted:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        monkeypatch.setattr(flow, "flow_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.train_transformer(tmp_path / "b", settings, coded)
    monkeypatch.setattr(flow, "flow_step", real)
    resumed = train.train_transformer(tmp_path / "b", settings, coded)
    for one, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_loss_is_of_the_velocity_and_weighs_channels() -> None:
    """A transformer that answers zero has the mean square of noise - clean, which is 1 + 1 for unit latents."""
    latents = torch.randn(480, 8, 3, 8, 8, generator=fitting.seeded(2))
    latents[:, 1] *= 3
    texts = flow.embed_prompts()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def silent(noisy: torch.Tensor, times: torch.Tensor, states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        seen.append((times, states))
        return (torch.zeros_like(noisy),)

    weights = torch.tensor([0.0, 8.0, *[0.0] * 6])
    for given, expected in ((None, (7 * 2 + 10) / 8), (weights, 10.0)):
        loss, _ = flow.flow_step(silent, flow.PaddedText(), latents, texts, 1, 0, batch=256, weights=given)
        assert loss.item() == pytest.approx(expected, rel=0.03)
    (times, states), (other, _) = seen
    assert not torch.equal(times, other)  # the second stage draws anew
    empty = (states == texts.states[-1]).flatten(1).all(1).float().mean()
    assert 0.04 < empty < 0.18  # the caption is dropped for a tenth


def test_channels_weigh_what_they_do_to_the_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    with torch.no_grad():
        vae.post_quant_conv.weight[:, 3] = 0  # the decoder cannot see channel 3
    weights = flow.channel_weights(vae, torch.randn(2, 8, 2, 4, 4), [1.0] * 8)
    assert weights[3] == 0
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[[0, 1, 2, 4, 5, 6, 7]] > 0).all()


def test_decoding_for_training_is_the_vaes_decoding_before_the_clamp() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    latents = torch.randn(1, 8, 2, 4, 4) * 3
    with torch.no_grad():
        ours = autoencoding.decode_unclamped(vae, latents)
        theirs = vae.decode(latents).sample
    assert ours.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("padded_to", [16, 512])
def test_one_weighted_key_stands_for_all_the_padding(padded_to: int, pipe: Any) -> None:
    texts = flow.embed_prompts()
    prompts = clips.prompts()
    rows = torch.tensor([5, len(prompts)])
    torch.manual_seed(0)
    transformer = build_transformer().eval()
    noisy, times = torch.randn(2, 8, 3, 8, 8), torch.tensor([900.0, 100.0])
    states, _ = pipe.encode_prompt([prompts[5], ""], do_classifier_free_guidance=False, max_sequence_length=padded_to)
    with torch.no_grad():
        expected = transformer(noisy, times, states, return_dict=False)[0]
        padding = flow.share_padding(transformer)
        padding.bias = texts.bias(rows, padded_to)
        found = transformer(noisy, times, texts.states[rows], return_dict=False)[0]
        flow.restore_padding(transformer)
        restored = transformer(noisy, times, states, return_dict=False)[0]
    # Attention with a mask takes another kernel, whose exponential is coarser.
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    torch.testing.assert_close(restored, expected, rtol=0, atol=0)


def test_noise_levels_are_spread_as_the_scheduler_spreads_them(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(1000)
    wanted = np.quantile(pipe.scheduler.sigmas[:-1].numpy(), [0.1, 0.5, 0.9])
    found = np.quantile(flow.shifted_sigmas(1000, fitting.seeded(0)).numpy(), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_word_vectors_tell_the_words_apart() -> None:
    """Every word's state is nearer to the same word's in any other prompt than to any other word's."""
    states = flow.embed_prompts().states[:-1, [1, 2, 4]].flatten(0, 1)
    words = [word for prompt in clips.prompts() for word in (prompt.split()[1], prompt.split()[2], prompt.split()[4])]
    unit = nn.functional.normalize(states, dim=-1)
    likeness = unit @ unit.T
    same = torch.tensor([[a == b for b in words] for a in words])
    assert likeness[same].min() > likeness[~same].max() + 0.1


def test_the_folder_is_small_and_its_records_name_its_weights() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= MAX_BYTES
    for name, digest in digests(FOLDER).items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest
        assert digest in (FOLDER / "README.md").read_text()
        assert {v.dtype for v in load_file(FOLDER / name).values()} == {torch.float16}
    result = json.loads(RESULT.read_text())
    assert result["weights_sha256"] == digests(FOLDER)
    assert result["call"] == CALL == json.loads((FOLDER / "call.json").read_text())
    assert result["codec"]["psnr_db"] >= 25
    assert result["goal"]["passed"] == (result["generated"]["all"]["share"] >= 0.9)


def test_it_is_a_pipeline_of_diffusers_that_saves_and_loads(pipe: Any, tmp_path: Path) -> None:
    assert type(pipe) is WanPipeline
    parts = {name: type(getattr(pipe, name)).__name__ for name in ("transformer", "vae", "text_encoder", "scheduler")}
    assert parts == {
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "text_encoder": "UMT5EncoderModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    save_pipeline(pipe, tmp_path)
    names = [n for n in digests(FOLDER) if "/" in n]
    assert {n: digests(tmp_path)[n] for n in names} == {n: digests(FOLDER)[n] for n in names}


def test_a_seed_makes_the_same_clip_in_a_batch_or_alone(pipe: Any) -> None:
    prompts = ["a red circle moving left", "a blue square moving up"]
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = pipe(prompts, generator=generators, output_type="np", **(CALL | {"num_inference_steps": 3})).frames
    alone = [generate(pipe, p, s, num_inference_steps=3)[0] for p, s in zip(prompts, (3, 4), strict=True)]
    assert both.shape == (2, 9, 64, 64, 3)
    np.testing.assert_allclose(both, alone, atol=1e-3)
    np.testing.assert_array_equal(generate(pipe, prompts[0], 3, num_inference_steps=3)[0], alone[0])


def test_clips_show_what_their_prompts_say(pipe: Any) -> None:
    prompts = ["a red circle moving left", "a green square moving right", "a yellow triangle moving down"]
    found = probe.classify(probe.load_probe(), generate(pipe, prompts, seed=1))
    right = sum(clips.prompt_of(*f) == p for f, p in zip(found, prompts, strict=True))
    assert right >= 2  # 90 % of all prompts were measured


def test_a_long_padding_changes_little(pipe: Any) -> None:
    short = generate(pipe, "a red circle moving left", 0, num_inference_steps=4)
    long = generate(pipe, "a red circle moving left", 0, num_inference_steps=4, max_sequence_length=512)
    assert generating.frames_psnr(short, long) > 20


def test_the_probe_knows_real_clips() -> None:
    pixels, drawn = clips.clip_batch("heldout", range(48))
    asked = [(clip.color, clip.shape, clip.direction) for clip in drawn]
    found = probe.classify(probe.load_probe(), pixels)
    assert sum(a == f for a, f in zip(asked, found, strict=True)) >= 46
    assert probe.classify(probe.load_probe(), pixels[:4] / 255) == found[:4]
    # Played backwards, what moved left moves right.
    backwards = probe.classify(probe.load_probe(), pixels[:, ::-1])
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert sum(b == (a[0], a[1], turned[a[2]]) for a, b in zip(asked, backwards, strict=True)) >= 44


def test_the_codec_keeps_heldout_clips(pipe: Any) -> None:
    assert min(autoencoding.heldout_psnr(pipe.vae, 3)) >= 25


def test_differences_are_of_the_last_run_to_the_first() -> None:
    base = generating.VideoRun("unwrapped", np.zeros((9, 8, 8, 3), np.float32), torch.ones(4), 2.0, 100, None)
    other = generating.VideoRun("fast", np.full((9, 8, 8, 3), 0.1, np.float32), torch.full((4,), 1.5), 1.0, 25, None)
    videos = generating.Videos(prompt="p", seed=0, call={}, runs=[base, other])
    found = videos.differences
    assert found == pytest.approx({"latent_error": 0.5, "psnr_db": 20.0, "speedup": 2.0, "bytes_ratio": 0.25}, rel=1e-5)
    assert generating.Videos(prompt="p", seed=0, call={}, runs=[base]).differences == {}
    picture = np.asarray(sheet.draw_sheet(videos))
    assert (picture == 0).all(-1).any()  # the black frames
    assert (picture == 26).all(-1).any()  # those at 0.1


def test_the_mp4_holds_the_frames(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    frames = clips.draw("heldout", 3).pixels() / 255
    sheet.write_mp4(frames, tmp_path / "clip.mp4")
    read = np.stack(imageio.mimread(tmp_path / "clip.mp4"))
    assert read.shape == (9, 256, 256, 3)
    assert generating.frames_psnr(sheet.enlarged(frames) / 255, read / 255) > 25  # colours at half resolution


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    result = CliRunner().invoke(
        cli_generate.generate_app, ["video", "--prompt", "a", "--out", str(tmp_path / "clip.mp4")]
    )
    assert isinstance(result.exception, MissingExtraError)
    assert 'pip install "vlmeff[diffusion]"' in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " ", "--out", "clip.mp4"], "--prompt is empty"),
        (["--prompt", "a", "--out", "clip.gif"], "ends in .mp4"),
        (["--prompt", "a", "--out", "no/such/folder/clip.mp4"], "does not exist"),
        (["--prompt", "a", "--out", "clip.mp4", "--sheet", "sheet.jpg"], "ends in .png"),
        (["--prompt", "a", "--out", "clip.mp4", "--dtype", "int8"], "--dtype"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli_generate.generate_app, ["video", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_the_command_writes_a_clip_and_a_sheet(tmp_path: Path) -> None:
    files = tmp_path / "clip.mp4", tmp_path / "sheet.png"
    options = ["--prompt", "a red circle moving left", "--steps", "3", "--out", str(files[0]), "--sheet", str(files[1])]
    result = CliRunner().invoke(cli_generate.generate_app, ["video", *options, "--json"])
    assert result.exception is None, result.exception
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert [run["label"] for run in found["runs"]] == ["unwrapped", "fast"]
    before, after = (run["transformer_bytes"] for run in found["runs"])
    assert after < 0.6 * before  # the linears hold nearly all of it
    assert 0 < found["latent_error"] < 0.2
    assert found["psnr_db"] > 20
    assert all(file.stat().st_size > 1000 for file in files)
