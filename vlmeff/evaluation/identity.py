"""What model and what machine a result is of; neither names a path, a user or a host."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmeff import __version__, zoo
from vlmeff.loading import embedded_folder

WHOLE_BELOW = 256 * 2**20  # bytes of weights that are hashed whole; of larger files the headers and sizes


def describe_model(name: str, model: Any) -> dict[str, Any]:
    """id, revision, dtype, attn_implementation, params, license.

    ``revision``: the commit that transformers resolved, or "sha256:..." of a local model's weights; None when unknown.
    """
    record = zoo.find_model(name) or zoo.find_model(model)
    commit = getattr(model.config, "_commit_hash", None)
    embedded = None if record is None or not record.embedded else embedded_folder(record.embedded)
    local = Path(name) if Path(name).is_dir() else None
    folder = local or (embedded if not Path(name).is_dir() else None)
    revision = commit if folder is None else f"sha256:{weights_hash(folder)}"
    known = local is None and record is not None
    return {
        "id": (record.hub_id or record.name) if known and record is not None else Path(name).name if local else name,
        "revision": revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config.get_text_config()._attn_implementation,
        "params": sum(p.numel() for p in model.parameters()),
        "license": None if not known or record is None else record.license,
    }


def weights_hash(folder: Path) -> str:
    """SHA-256 of a folder's weights: of the one file's content, or of name, size and header of each of several."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and files[0].stat().st_size < WHOLE_BELOW:
        return hashlib.sha256(files[0].read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in files or sorted(folder.glob("*.bin")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(2**20))
    return digest.hexdigest()


def environment(model: Any) -> dict[str, Any]:
    """Versions and hardware."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    return {
        "vlmeff": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "device_name": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "n_devices": torch.cuda.device_count() if cuda else 1,
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "ram_bytes": _memory(),
        "os": platform.system(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
