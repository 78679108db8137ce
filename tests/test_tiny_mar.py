"""tiny-mar and its draft: files, scores, the command that draws them."""

from __future__ import annotations

import hashlib
import json
from functools import cache

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from vlmeff.cli_generate_image import image, make_config
from vlmeff.errors import CheckpointError, ConfigError, UnknownModelError, UnsupportedModelError
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.loading import is_mar_folder, load_draft, load_mar, save_mar, shipped
from vlmeff.models.mar.trunk import MAR

LARGEST_BYTES = 4 * 2**20
ROLES = {"target": shipped(), "draft": shipped() / "draft"}


@cache
def models() -> dict[str, MAR]:
    return {"target": load_mar(shipped()), "draft": load_draft()}


def training_record() -> dict:
    return json.loads((shipped() / "training.json").read_text())


@pytest.mark.parametrize(("role", "name", "parameters"), [("target", "tiny", 509_480), ("draft", "nano", 74_312)])
def test_files_are_the_recorded_ones(role, name, parameters):
    made, record = models()[role], training_record()["models"][role]
    assert made.config == MARConfig.named(f"mar_{name}_digits")
    assert sum(p.numel() for p in made.parameters()) == record["parameters"] == parameters
    digest = hashlib.sha256((ROLES[role] / "model.safetensors").read_bytes()).hexdigest()
    assert digest == record["sha256"]
    assert digest in (shipped() / "README.md").read_text()
    assert is_mar_folder(ROLES[role])


def test_pair_is_small_and_fits_together():
    total = sum(file.stat().st_size for file in shipped().rglob("*") if file.is_file())
    assert total < LARGEST_BYTES
    target, draft = (models()[role].config for role in ROLES)
    assert (target.seq_len, target.token_dim, target.latent_scale) == (
        draft.seq_len,
        draft.token_dim,
        draft.latent_scale,
    )


def test_samples_are_pictures_and_depend_on_the_seed_only():
    made = models()["target"]
    out = made.sample([7, 1], seed=5)
    assert out.images.shape == (2, 1, 8, 8)
    assert float(out.images.abs().max()) <= 1
    assert 0.6 < float(out.latents.std()) < 1.4
    assert torch.equal(made.sample([7, 1], seed=5).latents, out.latents)
    assert not torch.allclose(made.sample([7, 1], seed=7).latents, out.latents)


@pytest.mark.parametrize("role", list(ROLES))
def test_samples_are_recognised_by_a_classifier_of_real_digits(role):
    """50 samples, of which three may be missed; the recorded share is 99 %."""
    pytest.importorskip("sklearn")
    from vlmeff.models.tiny_mar import digits

    machine, accuracy = digits.classifier()
    assert accuracy == pytest.approx(training_record()["classifier_accuracy"], abs=0.005)
    labels = torch.arange(50) % 10
    drawn = models()[role].sample(labels, cfg=2.0, num_iter=8, seed=500).images
    assert digits.recognised(machine, drawn, labels) >= 0.94
    assert digits.recognised(machine, drawn, (labels + 1) % 10) < 0.1


def test_samples_are_spread_like_the_digits():
    """The mean picture of each class is nearer to that of its own digits than to any other's."""
    pytest.importorskip("sklearn")
    from vlmeff.models.tiny_mar import digits

    images, labels = digits.pictures()
    real = torch.stack([images[labels == digit].mean(0).flatten() for digit in range(10)])
    drawn = models()["target"].sample(torch.arange(60) % 10, seed=900).images
    means = torch.stack([drawn[digit::10].mean(0).flatten() for digit in range(10)])
    assert torch.equal(torch.cdist(means, real).argmin(1), torch.arange(10))
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    latents = models()["target"].encode_images(images)
    assert float(latents.mean()) == pytest.approx(0, abs=2e-3)
    assert float(latents.std()) == pytest.approx(1, abs=2e-3)


def test_training_resumes_to_the_same_weights(tmp_path):
    """12 steps in one go, and stopped after a checkpoint at 8."""
    pytest.importorskip("sklearn")
    from vlmeff.models.tiny_mar import train as training

    settings = training.Settings(steps={"target": 0, "draft": 12}, batch=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 4)
        (tmp_path / "whole").mkdir()
        (tmp_path / "parts").mkdir()
        whole = training.train("draft", tmp_path / "whole", settings)

        def interrupted(step, steps, s):
            if step == 10:
                raise KeyboardInterrupt
            return real(step, steps, s)

        real = training.learning_rate
        patch.setattr(training, "learning_rate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train("draft", tmp_path / "parts", settings)
        patch.setattr(training, "learning_rate", real)
        resumed = training.train("draft", tmp_path / "parts", settings)
    state = torch.load(tmp_path / "parts" / "draft.pt", weights_only=True)
    assert state["step"] == 12
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=0)
    with pytest.raises(SystemExit, match="12 steps, not 20"):
        training.train("draft", tmp_path / "parts", training.Settings(steps={"target": 0, "draft": 20}))


def test_learning_rate_warms_up_and_falls():
    pytest.importorskip("sklearn")
    from vlmeff.models.tiny_mar.train import Settings, learning_rate

    rates = [learning_rate(step, 1900, Settings()) for step in range(1900)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == rates[99] == pytest.approx(1e-3)
    assert rates[1000] == pytest.approx(5.25e-4, rel=0.01)
    assert rates[-1] == pytest.approx(5e-5, rel=0.01)


@pytest.mark.slow
def test_sixty_steps_of_training_bring_the_loss_below_1_2(tmp_path):
    pytest.importorskip("sklearn")
    from vlmeff.models.tiny_mar.train import Settings, train

    train("target", tmp_path, Settings(steps={"target": 60, "draft": 0}, warm_up=20))
    curve = torch.load(tmp_path / "target.pt", weights_only=True)["curve"]
    assert curve[0][1] > 1.2
    assert curve[-1][1] < 1.2


# -- vlmeff generate image ---------------------------------------------------------------------------------------------


def app() -> typer.Typer:
    made = typer.Typer()
    made.callback()(lambda: None)
    made.command("image")(image)
    return made


def run(*options: str, fails: bool = False):
    result = CliRunner().invoke(app(), ["image", *options])
    if not fails:
        assert result.exception is None, result.exception
    return result


def test_sheet_shows_accelerated_and_plain_samples_with_their_numbers(tmp_path):
    out = tmp_path / "sheet.png"
    result = run("--class", "7", "--count", "3", "--mode", "coupled", "--delta", "0.02", "--out", str(out), "--json")
    shown = json.loads(result.stdout)
    assert shown["labels"] == [7, 7, 7]
    labels = [entry["label"] for entry in shown["runs"]]
    assert labels == ["plain, 16 steps", "coupled, window 8, delta 0.02", "plain, 8 steps", "plain, 4 steps"]
    plain, coupled, half, quarter = shown["runs"]
    assert [entry["target_passes"] for entry in (plain, half, quarter)] == [16, 8, 4]
    assert coupled["target_passes"] < 16
    assert coupled["tokens_per_round"] > 1.5
    assert plain["deviation_rms"] == 0
    assert coupled["deviation_rms"] < half["deviation_rms"] < quarter["deviation_rms"]
    assert set(shown["speedups"]) == set(labels[1:])
    with Image.open(out) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width >= 3 * 96
        assert sheet.height > 4 * 96
        assert len(set(sheet.resize((64, 64)).getdata())) > 50


@pytest.mark.parametrize(
    "options", [("--no-compare",), ("--mode", "plain", "--no-compare"), ("--draft", str(shipped() / "draft"))]
)
def test_runs_that_were_asked_for_are_made(tmp_path, options):
    shown = json.loads(
        run(
            "--class", "1", "--count", "1", "--num-iter", "8", "--out", str(tmp_path / "a.png"), "--json", *options
        ).stdout
    )
    labels = [entry["label"] for entry in shown["runs"]]
    if "plain" in options:
        assert labels == ["plain, 8 steps"]
    elif "--no-compare" in options:
        assert labels == ["coupled, window 8, delta 0.02"]
        assert shown["runs"][0]["deviation_rms"] is None
    else:
        assert labels[1] == "coupled, window 8, delta 0.02, draft proposes"
        assert shown["runs"][1]["draft_passes"] > 0


def test_table_shows_what_each_run_cost(tmp_path):
    printed = run("--count", "1", "--num-iter", "4", "--out", str(tmp_path / "a.png")).stdout
    for word in ("passes", "tokens per round", "deviation", "speed-up", "plain, 4 steps", "plain, 1 steps"):
        assert word in printed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--out", "a.jpg"), ConfigError, "ends in .png"),
        (("--out", "nowhere/a.png"), ConfigError, "does not exist"),
        (("--mode", "plain", "--window", "4"), ConfigError, "--window: has no effect with --mode plain"),
        (("--mode", "exact", "--delta", "0.1"), ConfigError, "delta=0.1 has no effect"),
        (("--class", "10"), ConfigError, "10 is not a class"),
        (("--num-iter", "17"), ConfigError, "num_iter=17"),
        (("--model", "tiny-mra"), UnknownModelError, "tiny-mar"),
        (("--model", "tiny-llava"), UnsupportedModelError, "MAR generators"),
        (("--mode", "exact", "--model", str(shipped() / "draft")), CheckpointError, "without a draft"),
    ],
)
def test_options_that_cannot_work_are_named(tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    result = run(*(() if "--out" in options else ("--out", "a.png")), *options, fails=True)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_models_of_latents_need_their_vae(tmp_path):
    save_mar(MAR(MARConfig.named("mar_nano_digits", codec="kl16")), tmp_path / "latents")
    result = run("--model", str(tmp_path / "latents"), "--out", str(tmp_path / "a.png"), fails=True)
    assert isinstance(result.exception, ConfigError)
    assert "--vae" in str(result.exception)


def test_official_checkpoint_file_is_read_and_asks_for_its_vae(tmp_path):
    config = MARConfig.named("mar_nano_digits", latent_shift=0.0, latent_scale=1.0)
    torch.manual_seed(0)
    state = MAR(config).state_dict()
    torch.save({"model": state, "model_ema": state, "epoch": 1}, tmp_path / "checkpoint-last.pth")
    # Without a configuration the shapes decide: tokens of 4 numbers are those of a VAE with 4 channels.
    result = run("--model", str(tmp_path / "checkpoint-last.pth"), "--out", str(tmp_path / "a.png"), fails=True)
    assert isinstance(result.exception, ConfigError)
    assert "--vae" in str(result.exception)


def test_options_become_a_configuration():
    assert make_config("plain", window=None, delta=None, draft=None).mode is None
    made = make_config("coupled", window=4, delta=0.1, draft="x")
    assert (made.mode, made.window, made.delta, made.proposal) == ("coupled", 4, 0.1, "draft")
    assert make_config("cspd-official", window=None, delta=None, draft=None).variant == "official"
