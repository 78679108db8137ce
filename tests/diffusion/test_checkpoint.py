"""Quantized checkpoints: what was saved comes back bit for bit, and what does not fit is an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_video import generate, wan_inputs, wan_pipeline, wan_transformer

import vlmeff
from vlmeff.diffusion.checkpoint import is_quantized_folder, load_quantized, save_pipeline, save_quantized
from vlmeff.diffusion.convert import convert, quantize_
from vlmeff.diffusion.families import text_encoder_rules
from vlmeff.diffusion.schemes import SCHEMES
from vlmeff.errors import CheckpointError, ConfigError, ModelLoadError

pytest.importorskip("diffusers")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = wan_transformer()
    quantize_(model, "w4a8_int8")
    return save_quantized(model, tmp_path / "saved")


def edit(folder: Path, change) -> None:
    """Change the record of quantized layers everywhere where it is written."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"vlmeff_quant": json.dumps(config["quantization_config"])})


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(scheme, tmp_path):
    model, inputs = wan_transformer(), wan_inputs()
    quantize_(model, scheme, calibrate=lambda: model(**inputs))
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))
    assert torch.equal(model(**inputs).sample, loaded(**inputs).sample)


@torch.no_grad()
def test_low_precision_models_keep_their_dtypes(tmp_path):
    model = wan_transformer().to(torch.bfloat16)
    quantize_(model, "svdq_w4a8")
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes
    assert dtypes["blocks.0.attn1.to_q.lr_up"] == torch.bfloat16
    assert dtypes["blocks.0.attn1.to_q.smooth"] == torch.float32


@torch.no_grad()
def test_shards_and_the_file_layout(tmp_path):
    model = wan_transformer()
    quantize_(model, "w4a16")
    save_quantized(model, tmp_path, max_shard_size="4KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    with safe_open(files[0], "pt") as opened:
        record = json.loads(opened.metadata()["vlmeff_quant"])
    assert record["version"] == 1
    assert record["transformer_class"] == "WanTransformer3DModel"
    facts = record["layers"]["blocks.0.ffn.net.2"]
    assert (facts["n"], facts["k"], facts["scheme"], facts["group"], facts["zero"]) == (24, 40, "w4a16", 128, "float")
    packed = load_file(tmp_path / index["weight_map"]["blocks.0.ffn.net.2.qweight"])["blocks.0.ffn.net.2.qweight"]
    assert packed.shape == (24, 20)
    assert packed.dtype == torch.uint8
    codes = model.blocks[0].ffn.net[2].codes()
    assert torch.equal(packed & 15, codes[:, 0::2])  # even k in the low nibble
    assert torch.equal(packed >> 4, codes[:, 1::2])
    loaded = load_quantized(tmp_path)
    assert torch.equal(loaded(**wan_inputs()).sample, model(**wan_inputs()).sample)
    save_quantized(model, tmp_path)  # once more in one file: no shard of the first may stay
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    load_quantized(tmp_path)


def test_saving_needs_a_quantized_layer(tmp_path):
    with pytest.raises(ConfigError, match="no quantized layer"):
        save_quantized(wan_transformer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_version_is_refused(saved):
    edit(saved, lambda record: record.update(version=2))
    with pytest.raises(CheckpointError, match="version 2"):
        load_quantized(saved)


def test_a_missing_and_an_unknown_tensor_are_refused(saved):
    file = next(saved.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "blocks.1.attn2.to_v.w_scale"
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"missing tensors {name}"):
        load_quantized(saved)
    save_file({**tensors, "blocks.9.extra": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"unknown tensors blocks\.9\.extra"):
        load_quantized(saved)
    save_file({**tensors, name: torch.zeros(3, 1)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"\(3, 1\).*\(24, 1\)"):
        load_quantized(saved)


def test_layers_that_do_not_fit_the_model_are_refused(saved):
    edit(saved, lambda record: record["layers"]["blocks.0.attn1.to_q"].update(k=25))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_q"):
        load_quantized(saved)
    edit(
        saved, lambda record: record["layers"].update({"blocks.7.attn1.to_q": record["layers"]["blocks.0.attn1.to_k"]})
    )
    with pytest.raises(CheckpointError):
        load_quantized(saved)


def test_a_layer_that_is_not_listed_is_not_guessed(saved):
    edit(saved, lambda record: record["layers"].pop("blocks.0.attn1.to_q"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_q"):
        load_quantized(saved)


def test_files_of_two_models_are_not_mixed(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["producer"] = "svdq"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not written together"):
        load_quantized(saved)


def test_a_broken_file_and_a_foreign_folder_are_refused(saved, tmp_path):
    next(saved.glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_quantized(saved)
    with pytest.raises(CheckpointError, match="not written by vlmeff"):
        load_quantized(tmp_path)
    assert not is_quantized_folder(tmp_path)


@torch.no_grad()
def test_a_text_encoder_with_tied_embeddings_comes_back(tmp_path):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(config).eval()
    convert(encoder, "w8a16_int8", text_encoder_rules(encoder))
    ids = torch.randint(0, 50, (2, 7))
    save_quantized(encoder, tmp_path)
    loaded = load_quantized(tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, encoder(ids).last_hidden_state)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight


@torch.no_grad()
def test_a_pipeline_comes_back_through_load(tmp_path):
    pipe = wan_pipeline()
    vlmeff.wrap(pipe, None, quant="w8a8_int8", text_encoder="w8a16_int8")
    latents = generate(pipe)
    save_pipeline(pipe, tmp_path / "pipe")
    loaded, processor = vlmeff.load(tmp_path / "pipe")
    assert processor is None
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), latents)
    transformer, _ = vlmeff.load(tmp_path / "pipe" / "transformer")
    assert type(transformer).__name__ == "WanTransformer3DModel"
    with pytest.raises(ConfigError, match="no component"):
        save_pipeline(wan_pipeline(), tmp_path / "other")


def test_a_broken_pipeline_says_what_to_check(tmp_path):
    pipe = wan_pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        vlmeff.load(tmp_path)


@torch.no_grad()
def test_save_pretrained_of_a_wrapped_pipeline_is_a_quantized_checkpoint(tmp_path):
    pipe = wan_pipeline()
    vlmeff.wrap(pipe, None, quant="w8a8_int8")
    latents = generate(pipe)
    pipe.save_pretrained(tmp_path / "wrapped")
    vlmeff.unwrap(pipe)
    loaded, _ = vlmeff.load(tmp_path / "wrapped")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), latents)
    loaded.save_pretrained(tmp_path / "again")
    assert is_quantized_folder(tmp_path / "again" / "transformer")
    pipe.save_pretrained(tmp_path / "plain")
    assert not is_quantized_folder(tmp_path / "plain" / "transformer")


def test_what_a_pipeline_is_called_with_travels_along(tmp_path):
    pipe, _ = vlmeff.load("tiny-wan")
    vlmeff.wrap(pipe, None, quant="w4a16")
    save_pipeline(pipe, tmp_path)
    assert json.loads((tmp_path / "call.json").read_text())["height"] == 64
    vlmeff.unwrap(pipe)


def test_a_dtype_that_is_asked_for_is_used(saved):
    model, _ = vlmeff.load(saved, dtype=torch.bfloat16)
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.blocks[0].attn1.to_q.w_scale.dtype == torch.bfloat16  # groups are stored so
    assert model.blocks[0].attn1.to_q.qweight.dtype == torch.uint8
