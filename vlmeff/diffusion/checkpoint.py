"""Quantized models on disk: safetensors in diffusers' layout, with a list of the quantized layers beside them.

The list is exhaustive: a linear layer that it does not name is in full precision. It stands in ``config.json`` under
``quantization_config`` (``quant_method: "vlmeff"``) and, the same, in the metadata of every weights file under
``vlmeff_quant``. Loading builds the model without storage, swaps the listed layers and loads strictly, so what comes
back is bit for bit what was saved.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmeff.diffusion.convert import dtype_of, link_siblings, place, save_as_quantized
from vlmeff.diffusion.generating import CALL_FILE, call_defaults
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.schemes import LayerSpec
from vlmeff.errors import CheckpointError, ConfigError

VERSION = 1
METHOD = "vlmeff"
KEY = "quantization_config"
METADATA = "vlmeff_quant"
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name; transformers' is below
TRANSFORMERS_WEIGHTS = "model"
SHARD = "5GB"


def quantization_record(model: nn.Module, *, producer: str, base_model: str | None = None) -> dict[str, Any]:
    """What is written beside the tensors: version, class, and every quantized layer with shape and scheme.

    Raises:
        ConfigError: the model has no quantized layer.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    if not layers:
        raise ConfigError(f"save_quantized: {type(model).__name__} has no quantized layer; quantize it first.")
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "transformer_class": type(model).__name__,
        "base_model": base_model,
        "torch_dtype": str(dtype_of(model)).removeprefix("torch."),
        "producer": producer,
        "layers": {
            name: {
                **layer.spec.to_dict(),
                "n": layer.out_features,
                "k": layer.in_features,
                "bias": layer.bias is not None,
                "dtype": str(layer.orig_dtype).removeprefix("torch."),
            }
            for name, layer in layers.items()
        },
    }


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    producer: str = "rtn",
    base_model: str | None = None,
    max_shard_size: str = SHARD,
) -> Path:
    """Write a diffusers (or transformers) model that has quantized layers.

    Args:
        producer: how the codes came about: "rtn", "svdq" or "qvgen".  base_model: what was quantized, if it has a name.
    Returns:
        The folder, with ``config.json`` and the weights.
    Raises:
        ConfigError: nothing is quantized, or the model cannot write its configuration.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    record = quantization_record(model, producer=producer, base_model=base_model)
    config = _config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    stem = WEIGHTS if "_class_name" in config else TRANSFORMERS_WEIGHTS
    for stale in [*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{stem}*.index.json")]:
        stale.unlink()  # shards of an earlier, larger model would be mixed in
    tensors = {name: tensor.contiguous() for name, tensor in _without_aliases(model).items()}
    pattern = stem + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    metadata = {"format": "pt", METADATA: json.dumps(record)}
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata=metadata)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps({**config, KEY: record}, indent=2, sort_keys=True) + "\n")
    return folder


def save_pipeline(pipe: Any, folder: str | os.PathLike[str], *, producer: str = "rtn") -> Path:
    """Write a pipeline of diffusers whose transformer, text encoder or both have quantized layers.

    Raises:
        ConfigError: no component has one.
    """
    folder = Path(folder)
    parts = {name: part for name, part in pipe.components.items() if hasattr(part, "save_pretrained")}
    quantized = {name for name, part in parts.items() if isinstance(part, nn.Module) and has_quantized(part)}
    if not quantized:
        raise ConfigError(f"save_pipeline: no component of {type(pipe).__name__} is quantized; quantize it first.")
    for name, part in parts.items():
        if name in quantized:
            save_quantized(part, folder / name, producer=producer)
        else:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)
    defaults = call_defaults(pipe)
    if defaults:
        (folder / CALL_FILE).write_text(json.dumps(defaults, indent=2) + "\n")
    return folder


def has_quantized(model: nn.Module) -> bool:
    """Whether a model has a quantized layer."""
    return any(isinstance(layer, QuantLinear) for layer in model.modules())


def load_quantized(folder: str | os.PathLike[str], cls: Any = None, *, device: Any = None) -> nn.Module:
    """Load what ``save_quantized`` wrote, in evaluation mode.

    Args:
        cls: the model's class; None takes the one that the configuration names.
    Raises:
        CheckpointError: not such a checkpoint, written in an unknown version, or its tensors do not fit the model.
    """
    from accelerate import init_empty_weights

    folder = Path(folder)
    config, record = _read(folder)
    model_class = cls or _class_of(config, folder)
    with init_empty_weights(include_buffers=False):  # buffers that are not saved (rotary tables) must be real
        if "_class_name" in config:
            model = model_class.from_config({k: v for k, v in config.items() if k != KEY})
        else:
            model = model_class(model_class.config_class(**{k: v for k, v in config.items() if k != KEY}))
    layers: dict[str, QuantLinear] = {}
    for name, facts in record["layers"].items():
        layers[name] = _empty_layer(model, name, facts)
        place(model, name, layers[name])
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _open(file) as opened:
            if json.loads((opened.metadata() or {}).get(METADATA, "null")) != record:
                raise CheckpointError(f"{file} was not written together with {folder / 'config.json'}; save again.")
        # Copied to memory of its own: a file's tensors are not aligned, and products then round differently.
        tensors.update({name: tensor.clone() for name, tensor in load_file(file).items()})
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    expected = _without_aliases(model)
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: "
            + "; ".join(_listing(what, names) for what, names in (("missing", missing), ("unknown", unknown)) if names)
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise CheckpointError(f"{folder}: {_listing('missing', left)}")
    link_siblings(layers)
    save_as_quantized(model)
    model.eval()
    return model if device is None else model.to(device)


def is_quantized_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model (not a pipeline) that ``save_quantized`` wrote."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_text())[KEY]["quant_method"] == METHOD
    except (ValueError, KeyError, TypeError):
        return False


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not is_quantized_folder(folder):
        raise CheckpointError(f"{folder} holds no config.json with {KEY}: it was not written by vlmeff quantize.")
    config = json.loads((folder / "config.json").read_text())
    record = config[KEY]
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} was written in version {record.get('version')!r} of the layout; this vlmeff reads {VERSION}."
        )
    return config, record


def _config_of(model: Any) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(model, "to_json_string") and hasattr(model, "config_name"):  # diffusers' ConfigMixin
        return json.loads(model.to_json_string())
    if hasattr(config, "to_diff_dict"):
        return {**config.to_dict(), "architectures": [type(model).__name__]}
    raise ConfigError(f"save_quantized: {type(model).__name__} is neither a diffusers nor a transformers model.")


def _class_of(config: dict[str, Any], folder: Path) -> Any:
    library, names = (
        ("diffusers", [config.get("_class_name")])
        if "_class_name" in config
        else (
            "transformers",
            config.get("architectures") or [None],
        )
    )
    found = getattr(importlib.import_module(library), str(names[0]), None)
    if found is None:
        raise CheckpointError(f"{folder}: {library} has no class {names[0]!r}; pass cls=.")
    return found


def _empty_layer(model: nn.Module, name: str, facts: dict[str, Any]) -> QuantLinear:
    fields = LayerSpec.__dataclass_fields__
    try:
        original = model.get_submodule(name)
        spec = LayerSpec(**{key: value for key, value in facts.items() if key in fields})
        dtype = getattr(torch, facts["dtype"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the layer {name!r} of the checkpoint cannot be built: {error}") from error
    if not isinstance(original, nn.Linear) or (original.out_features, original.in_features) != (facts["n"], facts["k"]):
        raise CheckpointError(
            f"the checkpoint has {name!r} as a linear layer {facts['n']}x{facts['k']}, the model as {original}."
        )
    return QuantLinear(facts["k"], facts["n"], spec, bias=facts["bias"], dtype=dtype, device="meta")


def _without_aliases(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, one name for each; tied weights come back when the model ties them."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)  # the parameters themselves: aliases are then the same object
    return {name: tensor.detach() for name, tensor in state.items() if seen.setdefault(id(tensor), name) == name}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _listing(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} tensors {', '.join(names[:3])}{more}"
