"""Measure what ``tokenpruning.adaptinfer_calibration`` needs: how the text of samples looks at their pictures."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpruning.adaptinfer import write_schedule
from tokenpruning.adaptinfer_calibration import Calibration, calibrate, check_target
from vlmeff import ops
from vlmeff.errors import DataError, IncompatibleError
from vlmeff.vlm.families import family_of
from vlmeff.vlm.inner_request import check_layers, first_legal_layer
from vlmeff.vlm.voters import VisualRows, query_key, visual_rows


@torch.no_grad()
def calibrate_adaptinfer(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    target: float | None = None,
    name: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Derive a schedule for a model from samples of its use.

    Args:
        model: an unwrapped transformers VLM of a supported family, in eval mode.
        samples: outputs of its processor, one prompt or a batch each, pictures before the question. A few hundred of
            the kind that the model will see; the paper used about 1000. Held: layers * visual tokens floats each.
        target: mean share of the visual tokens that may be processed, averaged over layers; None: 0.3 where possible.
        name: of the schedule; what the model was loaded from when None.
        progress: called with the number of prompts measured so far.
    Raises:
        UnsupportedModelError, IncompatibleError: the model.  DataError: no sample has a picture.
        ConfigError: the target cannot be met.
    """
    if "_vlmeff" in model.__dict__:
        raise IncompatibleError("calibrate adaptinfer: the model is wrapped; call vlmeff.unwrap(model) first.")
    if model.training:
        raise IncompatibleError("calibrate adaptinfer: the model is in training mode; call model.eval() first.")
    family = family_of(model)
    text_model: Any = family.text_model(model)
    check_layers(text_model)
    target = check_target(target, layers=len(text_model.layers), first_layer=first_legal_layer(model))
    ids = [family.placeholder_id(model, "image")]
    if "video" in family.encoder_inputs:
        ids.append(family.placeholder_id(model, "video"))
    maps: list[Tensor] = []
    for sample in samples:
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in sample.items()}
        if "input_ids" not in inputs:
            raise DataError("calibrate adaptinfer: a sample has no input_ids; pass the processor's outputs.")
        visual = torch.isin(inputs["input_ids"], torch.tensor(ids, device=model.device))
        rows = visual_rows(visual, inputs.get("attention_mask"))
        if rows is None:
            continue
        with text_to_vision(text_model, rows) as mass:
            model.base_model(**inputs, use_cache=False)
        maps += torch.stack(mass, 1).cpu().unbind(0)
        if progress is not None:
            progress(len(maps))
    name = name or Path(str(getattr(model.config, "_name_or_path", ""))).name or model.config.model_type
    return calibrate(maps, target=target, first_layer=first_legal_layer(model), name=name)


def write_calibration(
    path: str | Path, model: Any, calibration: Calibration, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the schedule file that ``AdaptInfer(schedule=path)`` reads, with how it came to be (and ``about``)."""
    import transformers

    from vlmeff import __version__

    return write_schedule(
        path,
        calibration.schedule,
        model_class=type(model).__name__,
        samples=calibration.samples,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={"vlmeff": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        processed_share=round(calibration.processed, 4),
        retained_attention=round(calibration.retained, 4),
        shifts=[round(shift, 6) for shift in calibration.shifts],
        **(about or {}),
    )


@contextmanager
def text_to_vision(text_model: Any, rows: VisualRows) -> Iterator[list[Tensor]]:
    """Collect, for the one pass inside the block, per layer the attention [B, nv] float32 that the text behind the
    pictures gives each visual token: the mean over heads and text rows."""
    owner, mass = threading.get_ident(), []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        if threading.get_ident() != owner or kwargs is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        mass.append(_mass(layer, hidden, kwargs["position_embeddings"], rows))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in text_model.layers]
    try:
        yield mass
    finally:
        for handle in handles:
            handle.remove()


def _mass(layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], rows: VisualRows) -> Tensor:
    q, k = query_key(layer, hidden, position_embeddings, rows=rows.text)
    text, vision, valid, votes = (x.to(q.device) for x in (rows.text, rows.vision, rows.valid, rows.text_valid))
    scale, columns = layer.self_attn.scaling, torch.arange(k.shape[2], device=q.device).expand(len(k), -1)
    lse = ops.row_logsumexp(q, k, scale=scale, causal=True, q_pos=text, k_pos=columns, key_valid=valid)
    k_vision = k.gather(2, vision[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    # The text stands behind every picture: no further mask.
    mass = ops.attention_column_mass(q, k_vision, scale=scale, lse=lse, query_weight=votes, reduce="mean")
    return mass / votes.sum(1, keepdim=True)
