"""Loads video pipelines and transformers: from the hub, from diffusers' folders, and what ``vlmeff quantize`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlmeff.diffusion.checkpoint import KEY, is_quantized_folder, load_quantized
from vlmeff.errors import MissingExtraError, ModelLoadError
from vlmeff.zoo_schema import ModelRecord

PIPELINE_INDEX = "model_index.json"


def require_diffusers() -> Any:
    """diffusers, or an error that names the extra."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingExtraError("diffusers", "diffusion", "video models") from error
    return diffusers


def is_video(source: str, record: ModelRecord | None = None, *, local_files_only: bool = False) -> bool:
    """Whether a local folder or hub id is a pipeline or model of diffusers.

    ``record``: what the zoo knows of it. An unknown hub id is asked for the index of a pipeline.
    """
    if record is not None:
        return record.task == "text-to-video"
    if Path(source).is_dir():
        return is_pipeline(source) or is_transformer(source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(source, PIPELINE_INDEX, local_files_only=local_files_only)
    except (OSError, HfHubHTTPError, HFValidationError, ConnectionError):  # no such file, or no network: not known
        return False
    return True


def is_pipeline(source: str) -> bool:
    """Whether a local folder holds a pipeline of diffusers."""
    return (Path(source) / PIPELINE_INDEX).is_file()


def is_transformer(source: str) -> bool:
    """Whether a local folder holds one model of diffusers."""
    file = Path(source) / "config.json"
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text())
    except ValueError:
        return False
    return isinstance(config, dict) and "_class_name" in config


def load_video(
    source: str, *, revision: str | None = None, dtype: Any = "auto", device: Any = None, **kwargs: Any
) -> Any:
    """A pipeline of diffusers, or one transformer, in evaluation mode.

    Components that ``vlmeff quantize`` wrote come back quantized, bit for bit.

    Args:
        source: local folder or hub id.
        dtype: "auto" is float32 on the CPU and, on CUDA, bfloat16 with the VAE in float32, which these models want.
        **kwargs: passed to ``from_pretrained``.
    Raises:
        MissingExtraError: diffusers is not installed.  CheckpointError: a quantized component is broken.
    """
    diffusers = require_diffusers()
    if is_quantized_folder(source):
        model = load_quantized(source)
        if dtype != "auto":
            model = model.to(dtype)  # codes and scales stay
        return model if device is None else model.to(device)
    if dtype == "auto":
        on_cuda = device is not None and str(device).startswith("cuda")
        dtype = {"default": torch.bfloat16, "vae": torch.float32} if on_cuda else torch.float32
        saved = _saved_dtype(source)
        if saved is not None:  # as it was when it was quantized
            dtype = saved
    try:
        if Path(source).is_dir() and is_transformer(source) and not is_pipeline(source):
            pipe = _transformer(diffusers, source, dtype=dtype, **kwargs)
        else:
            pipe = _pipeline(diffusers, source, revision=revision, dtype=dtype, **kwargs)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise ModelLoadError(
            f"pipeline {source!r} could not be loaded: {reason}. Check the name, the network, or pass a local folder "
            f"with {PIPELINE_INDEX} and its components."
        ) from error
    return pipe if device is None else pipe.to(device)


def _transformer(diffusers: Any, source: str, *, dtype: Any, **options: Any) -> Any:
    name = json.loads((Path(source) / "config.json").read_text())["_class_name"]
    one = dtype["default"] if isinstance(dtype, dict) else dtype
    return getattr(diffusers, name).from_pretrained(source, dtype=one, **options).eval()


def _saved_dtype(source: str) -> torch.dtype | None:
    """The dtype of a quantized pipeline's transformer; None for other folders."""
    file = Path(source) / "transformer" / "config.json"
    if not is_pipeline(source) or not is_quantized_folder(file.parent):
        return None
    return getattr(torch, json.loads(file.read_text())[KEY]["torch_dtype"], None)


def _pipeline(diffusers: Any, source: str, **options: Any) -> Any:
    if not is_pipeline(source):
        return diffusers.DiffusionPipeline.from_pretrained(source, **options)
    index = json.loads((Path(source) / PIPELINE_INDEX).read_text())
    parts = [name for name in index if is_quantized_folder(Path(source) / name)]
    quantized = {name: load_quantized(Path(source) / name) for name in parts}
    # Not DiffusionPipeline: diffusers 0.42 asks the class that is named here which components are optional, and ignores
    # those it does not know (Wan's transformer is one).
    return getattr(diffusers, index["_class_name"]).from_pretrained(source, **options, **quantized)
