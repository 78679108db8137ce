"""``load``: a model and its processor by zoo name, local folder or hub id."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmeff import zoo
from vlmeff.environment import check_torchvision
from vlmeff.errors import ConfigError, ModelLoadError, UnknownModelError
from vlmeff.wrapping import wrap


def load(
    name: str | os.PathLike[str],
    preset: str | None = None,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name: a model of the zoo ("tiny-llava" ships with the package), a zoo entry ("tiny-llava/fast", which also
            sets the preset), a local folder, or a hub id.
        preset: wrap the model with it; None leaves the model as it is.
        revision: commit or tag on the hub.  dtype: as in ``from_pretrained``.  device: moves the model there.
        **kwargs: passed to ``from_pretrained``.
    Returns:
        (model in evaluation mode, processor); the processor of a text-only model is its tokenizer.
    Raises:
        UnknownModelError: no such zoo name and neither a folder nor a hub id.
        ModelLoadError: the files are missing, broken or out of reach.
        EnvironmentMismatchError: torch and torchvision do not fit.
    """
    check_torchvision()
    _check_device(device)
    source, entry_preset, pinned = _find(os.fspath(name))
    if pinned is not None and revision is None:
        revision = pinned
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        takes_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model_class = AutoModelForImageTextToText if takes_pictures else AutoModelForCausalLM
        processor_class = AutoProcessor if takes_pictures else AutoTokenizer
        processor = processor_class.from_pretrained(source, revision=revision)
        model = model_class.from_pretrained(source, revision=revision, dtype=dtype, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise ModelLoadError(
            f"model {os.fspath(name)!r} could not be loaded: {reason}. Check the name, the network, or pass a local "
            "folder with config.json, weights and processor files."
        ) from error
    model.eval()
    if device is not None:
        model.to(device)
    preset = preset if preset is not None else entry_preset
    return (wrap(model, preset) if preset is not None else model), processor


def _check_device(device: Any) -> None:
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"device={device!r} cannot be used here: {reason}.") from error


def _find(name: str) -> tuple[str, str | None, str | None]:
    """(what from_pretrained takes, preset of a zoo entry, pinned revision)."""
    known = zoo.load_zoo()
    preset = None
    if name in known.entries:
        entry = known.entries[name]
        name, preset = entry.model, entry.preset
    if name in known.models:
        record = known.models[name]
        if record.embedded:
            return str(embedded_folder(record.embedded)), preset, None
        assert record.hub_id is not None
        return record.hub_id, preset, record.revision
    if Path(name).is_dir():
        return name, preset, None
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if not looks_like_hub_id:
        raise UnknownModelError("model (neither a zoo name, an existing folder nor a hub id)", name, known.models)
    return name, preset, None


def embedded_folder(package: str) -> Path:
    """The folder of a model that ships inside ``vlmeff.models``."""
    return Path(str(importlib.resources.files(f"vlmeff.models.{package}"))) / "weights"
