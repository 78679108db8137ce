"""``load_mar``: a MAR model from a folder (config.json, model.safetensors) or from an official checkpoint file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmeff.errors import CheckpointError, UnknownModelError
from vlmeff.models.mar.checkpoint import config_of, load_strictly, read_state
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.trunk import MAR

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPE = "mar"
DRAFT_FOLDER = "draft"
OFFICIAL_FILE = "checkpoint-last.pth"


def is_mar_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether ``load_mar`` can read this folder."""
    path = Path(folder)
    if (path / OFFICIAL_FILE).is_file():
        return True
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def load_mar(
    source: str | os.PathLike[str],
    config: MARConfig | str | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
) -> MAR:
    """Load a model in evaluation mode.

    Args:
        source: a folder written by ``save_mar``; a folder with the official ``checkpoint-last.pth``; or a file: an
            official ``.pth`` (its ``model_ema`` is used), a bare state dict or safetensors.
        config: of a file without one, where its shapes do not tell it: a ``MARConfig`` or the name of a preset.
        dtype: of the weights; None keeps what is stored.
    Raises:
        CheckpointError: the file is broken, holds code, or does not fit the configuration.
    """
    path = Path(source)
    if isinstance(config, str):
        config = MARConfig.named(config)
    file = path
    if path.is_dir():
        file = path / WEIGHTS_FILE
        if config is None and (path / CONFIG_FILE).is_file():
            config = read_config(path)
        if not file.is_file() and (path / OFFICIAL_FILE).is_file():
            file = path / OFFICIAL_FILE
    state = read_state(file)
    config = config if config is not None else config_of(state)
    with torch.device("meta"):
        model = MAR(config)
    model = model.to_empty(device="cpu")
    load_strictly(model, state, str(file))
    if dtype is not None:
        model.to(dtype)
    elif len({value.dtype for value in state.values()}) == 1:
        model.to(next(iter(state.values())).dtype)
    return (model if device is None else model.to(device)).eval()


def load_draft(source: str | os.PathLike[str] | None = None, **options: Any) -> MAR:
    """The draft beside a model's folder (its subfolder ``draft``); by default that of tiny-mar."""
    folder = Path(source if source is not None else shipped()) / DRAFT_FOLDER
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the model comes without a draft; pass one (--draft, draft=...).")
    return load_mar(folder, **options)


def find_mar(name: str | os.PathLike[str]) -> Path:
    """Where ``load_mar`` finds a model: "tiny-mar", or a folder or file that exists.

    Raises:
        UnknownModelError: neither.
    """
    if os.fspath(name) == "tiny-mar":
        return shipped()
    if Path(name).exists():
        return Path(name)
    raise UnknownModelError("MAR model (neither a folder nor a checkpoint file)", os.fspath(name), ["tiny-mar"])


def shipped() -> Path:
    """The folder of tiny-mar, which ships with the package."""
    return Path(__file__).parent.parent / "tiny_mar" / "weights"


def read_config(folder: Path) -> MARConfig:
    """``config.json`` of a folder.

    Raises:
        CheckpointError: it cannot be read, or is not that of a MAR model.
    """
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable configuration: {error}") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f'{file}: not the configuration of a MAR model ("model_type" is not "{MODEL_TYPE}").')
    return MARConfig.from_dict(values)


def save_mar(model: MAR, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (in ``dtype``, by default the model's) to a folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    values = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    (path / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    state = {
        name: value.detach().cpu().to(dtype or value.dtype).contiguous() for name, value in model.state_dict().items()
    }
    save_file(state, path / WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors makes files private; a package's data is for everybody.
    (path / WEIGHTS_FILE).chmod(0o644)
