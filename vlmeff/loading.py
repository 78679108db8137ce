"""``load``: a model and its processor by zoo name, local folder or hub id."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmeff import zoo
from vlmeff.environment import check_torchvision
from vlmeff.errors import ConfigError, ModelLoadError, UnknownModelError
from vlmeff.models.mar.loading import is_mar_folder, load_mar
from vlmeff.wrapping import wrap

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def load(
    name: str | os.PathLike[str],
    preset: str | None = None,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name: a model of the zoo ("tiny-llava" ships with the package), a zoo entry ("tiny-llava/fast", which also
            sets the preset), a local folder, or a hub id.
        preset: wrap the model with it; None leaves the model as it is.
        revision: commit or tag on the hub.  dtype: as in ``from_pretrained``.  device: moves the model there.
        trust_remote_code: run the Python files that come with the model, where it needs them.
        local_files_only: never ask the network; what is not in the hub's cache is an error.
        **kwargs: passed to ``from_pretrained`` of the model.
    Returns:
        (model in evaluation mode, processor); the processor of a text-only model is its tokenizer, that of a video
        pipeline or transformer or of a MAR generator is None.
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
    record = zoo.find_model(os.fspath(name))
    if (record is not None and record.task == "class-to-image") or is_mar_folder(source):
        options = {} if dtype == "auto" else {"dtype": dtype}
        generator = load_mar(source, device=device, **options, **kwargs)
        preset = preset if preset is not None else entry_preset
        return (wrap(generator, preset) if preset is not None else generator), None
    from vlmeff.diffusion import loading as video

    with _without_network(local_files_only):
        is_video = video.is_video(source, record, local_files_only=local_files_only)
    if is_video:
        pipe = video.load_video(source, revision=revision, dtype=dtype, device=device, **kwargs)
        preset = preset if preset is not None else entry_preset
        return (wrap(pipe, preset) if preset is not None else pipe), None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    common = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    try:
        with _without_network(local_files_only):
            config = AutoConfig.from_pretrained(source, **common)
            # A class of the model's own is not in transformers' table; its auto_map says what it is.
            remote = getattr(config, "auto_map", None) or {}
            takes_pictures = (
                type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote
            )
            model_class = AutoModelForImageTextToText if takes_pictures else AutoModelForCausalLM
            processor_class = AutoProcessor if takes_pictures else AutoTokenizer
            processor = processor_class.from_pretrained(source, **common)
            model = model_class.from_pretrained(source, dtype=dtype, **common, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise ModelLoadError(
            f"model {os.fspath(name)!r} could not be loaded: {reason}. {_remedy(source, revision, str(error), common)}"
        ) from error
    model.eval()
    if device is not None:
        model.to(device)
    preset = preset if preset is not None else entry_preset
    return (wrap(model, preset) if preset is not None else model), processor


@contextmanager
def _without_network(asked: bool) -> Iterator[None]:
    """huggingface_hub's own offline mode: without it, it asks for other things than the files it was told to look for
    on this machine (who runs it, to report that)."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or asked
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _remedy(source: str, revision: str | None, reason: str, asked: dict[str, Any]) -> str:
    if "trust_remote_code" in reason and not asked["trust_remote_code"]:
        return (
            "The model comes with Python code of its own: read it, then pass trust_remote_code=True "
            "(--trust-remote-code) to run it."
        )
    if not Path(source).is_dir() and (asked["local_files_only"] or _hub_is_off()):
        pin = "" if revision is None else f" --revision {revision}"
        return (
            f"The network may not be used (offline) and the hub's cache lacks it: run `hf download {source}{pin}` "
            "where there is a network, pass a local folder, or go online."
        )
    return "Check the name, the network, or pass a local folder with config.json, weights and processor files."


def _hub_is_off() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_VARIABLES)


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
