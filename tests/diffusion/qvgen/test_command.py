"""``vlmeff train-qvgen`` on a saved pipeline: settings, clips, resuming, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import qvgen_toy as toy

from vlmeff.cli_qvgen import GENERATED_DEFAULTS, train_qvgen
from vlmeff.diffusion.checkpoint import load_quantized
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.qvgen.config import TrainingConfig
from vlmeff.diffusion.qvgen.data import write_clips
from vlmeff.diffusion.qvgen.training import CHECKPOINT, LOG, PLOT
from vlmeff.errors import ConfigError, DataError, UnsupportedModelError

SMALL = "steps: 10\nrank: 2\nbatch_size: 2\nvalidation_clips: 1\nlr: 1e-3\nbits: 4\n"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """tiny-wan's pipeline with the toy as its transformer, and clips to train on."""
    from diffusers import WanPipeline

    from vlmeff.models.tiny_wan.architecture import build_scheduler, build_text_encoder, build_tokenizer, build_vae

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    parts = {"tokenizer": build_tokenizer(), "text_encoder": build_text_encoder(), "scheduler": build_scheduler()}
    WanPipeline(**parts, vae=build_vae(), transformer=toy.build_toy()).save_pretrained(folder / "model")
    write_clips(toy.clips(6), folder / "clips", empty_prompt=toy.empty_prompt())
    (folder / "run.yaml").write_text(SMALL)
    return folder


def command(*arguments):
    app = typer.Typer()
    app.command()(train_qvgen)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def options(folder):
    return ["--model", folder / "model", "--data", folder / "clips", "--config", folder / "run.yaml"]


def test_a_run_writes_settings_log_plot_and_a_model_that_loads(pipeline_folder, tmp_path):
    result = command("--out", tmp_path, *options(pipeline_folder), "--bits", 3, "--steps", 8)
    assert result.exit_code == 0
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (settings["w_bits"], settings["a_bits"], settings["steps"], settings["rank"]) == (3, 3, 8, 2)  # flags win
    assert TrainingConfig.from_dict(settings).lr == 1e-3
    assert len([line for line in (tmp_path / LOG).read_text().splitlines() if "loss" in json.loads(line)]) == 8
    assert (tmp_path / PLOT).is_file()
    model = load_quantized(tmp_path / "quantized")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 20
    assert {layer.spec.scheme for layer in layers} == {"w3a3_sim"}
    assert (
        json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]["producer"] == "qvgen"
    )

    # The same folder again is a mistake; resuming takes the settings that are there and finds nothing to do.
    with pytest.raises(ConfigError, match="resume"):
        command("--out", tmp_path, *options(pipeline_folder))
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    resumed = command("--out", tmp_path, *options(pipeline_folder)[:4], "--resume")
    assert resumed.exit_code == 0
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before


def test_a_kept_phi_is_trained_and_not_exported(pipeline_folder, tmp_path):
    result = command("--out", tmp_path, *options(pipeline_folder), "--phi", "keep", "--steps", 4)
    assert result.exit_code == 0
    assert "nothing to export" in result.output
    assert not (tmp_path / "quantized").exists()


def test_videos_with_prompts_beside_them_are_encoded_once(pipeline_folder, tmp_path):
    iio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    from vlmeff.cli_qvgen import open_pipeline, prepare_data
    from vlmeff.diffusion.qvgen.data import ClipFolder
    from vlmeff.models.tiny_wan.clips import draw

    data = tmp_path / "videos"
    data.mkdir()
    for index in range(2):
        clip = draw("train", index)
        iio.imwrite(data / f"{index}.mp4", clip.pixels()[:7], fps=8)
        (data / f"{index}.txt").write_text(clip.prompt + "\n")
    model = str(pipeline_folder / "model")
    pipe = open_pipeline(model)
    folder = prepare_data(pipe, model, data, tmp_path / "out", clips=1, height=32, width=32)
    clips = ClipFolder(folder)
    assert len(clips) == 2
    assert clips[0][0].shape == (8, 2, 4, 4)  # seven frames are cut to five
    pipe.vae = None  # not needed a second time
    assert prepare_data(pipe, model, data, tmp_path / "out", clips=1) == folder


def test_tiny_wan_draws_its_own_clips_and_an_interrupted_encoding_starts_anew(pipeline_folder, tmp_path):
    from vlmeff.cli_qvgen import open_pipeline, prepare_data
    from vlmeff.diffusion.qvgen.data import ClipFolder
    from vlmeff.models.tiny_wan.architecture import MAX_TEXT, TEXT_DIM

    pipe = open_pipeline(str(pipeline_folder / "model"))
    part = tmp_path / "clips"
    part.mkdir()
    (part / "clips-00000.safetensors").write_bytes(b"half of a shard")
    clips = ClipFolder(prepare_data(pipe, "tiny-wan", None, tmp_path, clips=2))
    assert len(clips) == 2
    assert clips[0][0].shape == (8, 3, 8, 8)
    assert clips[0][1].shape == clips.empty_prompt.shape == (MAX_TEXT, TEXT_DIM)
    assert not torch.equal(clips[0][1], clips[1][1])


def test_data_and_models_that_cannot_be_used_are_refused(pipeline_folder, tmp_path):
    model = ["--model", pipeline_folder / "model"]
    with pytest.raises(ConfigError, match="--data is needed"):
        command("--out", tmp_path, *model)
    with pytest.raises(DataError, match="no such folder"):
        command("--out", tmp_path, *model, "--data", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither shards"):
        command("--out", tmp_path, *model, "--data", tmp_path / "empty")
    with pytest.raises(UnsupportedModelError, match="tiny-llava"):
        command("--out", tmp_path, "--model", "tiny-llava", "--data", pipeline_folder / "clips")


def test_the_settings_for_drawn_clips_are_legal():
    assert TrainingConfig.from_dict(GENERATED_DEFAULTS).schedule().phase_length > 10
