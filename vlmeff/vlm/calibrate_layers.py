"""Measure what ``tokenpruning.hiprune_calibration`` needs: how far apart the tokens are that a vision layer looks at.

Each picture goes through the model's own encoder once, with score hooks on every layer that may be the object layer and
one more hook that takes the embeddings: the output of the layer that is projected. The official notebook takes the last
layer of CLIP, which LLaVA throws away (its layer -2 is projected) and which training may never have reached; where the
last layer is projected, as in Qwen-VL and InternVL, the two are the same.

Scores and embeddings are both brought to visual tokens by the family's own rule (``Family.token_scores``, for the
embeddings once for all channels): the class token is dropped, patches that are merged into a token are averaged, and
windows are put back in order.
"""

from __future__ import annotations

import datetime
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpruning.hiprune_calibration import TOP, LayerCurve, check_top, suggest_object_layer, top_distance
from vlmeff.errors import IncompatibleError, NonFiniteScoreError, UnsupportedModelError
from vlmeff.vlm.families import Family, family_of
from vlmeff.vlm.families.base import Kwargs, Modality, present
from vlmeff.vlm.probe import probe

FILE_FORMAT, FILE_VERSION = "vlmeff hiprune layers", 1


@torch.no_grad()
def calibrate_hiprune(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    top: float = TOP,
    progress: Callable[[int], None] | None = None,
) -> LayerCurve:
    """Suggest the object layer of a model's vision tower from pictures.

    Args:
        model: an unwrapped transformers VLM of a supported family, in eval mode. Its language model is not run.
        samples: outputs of its processor, one picture or several each; the text is not looked at. The paper took the
            5000 pictures of COCO's val2017. Samples without pictures are passed over.
        top: share of the tokens whose distances are taken, in each tile (frame) of a picture.
        progress: called with the number of pictures measured so far.
    Returns:
        the curve over the legal object layers up to the projected one. A picture of several tiles counts once, as the
        mean of its tiles.
    Memory: of one sample the tower's output as float32, twice; of all samples a number per layer and picture.
    Raises:
        UnsupportedModelError, IncompatibleError: the model.  DataError: no sample has a picture.
    """
    check_top(top)
    if "_vlmeff" in model.__dict__:
        raise IncompatibleError("calibrate hiprune: the model is wrapped; call vlmeff.unwrap(model) first.")
    if model.training:
        raise IncompatibleError("calibrate hiprune: the model is in training mode; call model.eval() first.")
    family = family_of(model)
    family.refuse_model(model)
    layers: dict[int, nn.Module] = {}
    curves: list[list[float]] = []
    for sample in samples:
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in sample.items()}
        family.refuse_unsupported(model, inputs)
        for modality in present(inputs):
            if not layers:
                family.layouts(model, inputs, modality)  # a generic family finds out here which layers it can score
                layers = measured_layers(model, family)
            curves += _curves(model, family, inputs, modality, layers, top)
            if progress is not None:
                progress(len(curves))
    return suggest_object_layer(curves, list(layers or measured_layers(model, family)), top=top)


def measured_layers(model: Any, family: Family) -> dict[int, nn.Module]:
    """1-based number -> attention module of the layers that may vote for objects, up to the one that is projected.

    Raises ``UnsupportedModelError`` where fewer than two can.
    """
    found = {}
    for number in family.legal_object_layers(model):
        if number <= family.deep_layer(model) + 1:
            try:
                found[number] = family.score_layers(model, ("object",), number)["object"]
            except UnsupportedModelError:  # a generic family could not verify this layer's scores
                continue
    if len(found) < 2:
        raise UnsupportedModelError(
            f"calibrate hiprune: {len(found)} layer(s) of the vision tower of {family.model_type} see the whole "
            "picture, and a turning point needs two; choose object_layer by hand, or a method without it."
        )
    return found


def write_layers(path: str | Path, model: Any, curve: LayerCurve, about: Mapping[str, Any] | None = None) -> Path:
    """Write the curve and the suggestion as JSON, with how they came to be (and ``about``); read by people and plots.

    Use the suggestion with ``vlmeff.HiPrune(object_layer=...)``.
    """
    import transformers

    from vlmeff import __version__

    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "object_layer": curve.object_layer,
        "default_object_layer": family_of(model).object_layer(model),
        "agreement": round(curve.agreement, 4),
        "layers": curve.layers,
        "distances": [round(d, 6) for d in curve.distances],
        "top": curve.top,
        "samples": curve.samples,
        "about": {
            "model_class": type(model).__name__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"vlmeff": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
            **(about or {}),
        },
    }
    path = Path(path)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _curves(
    model: Any, family: Family, inputs: Kwargs, modality: Modality, layers: Mapping[int, nn.Module], top: float
) -> list[list[float]]:
    """Per picture that has two tokens in one tile: the distance of each layer."""
    block = block_of(model, family.attention_layers(model)[family.deep_layer(model)])
    probed = {str(number): module for number, module in layers.items()}
    with probe(probed, family.query_key) as recorded, outputs_of(block) as outputs:
        encoded = family.encode(model, inputs, modality)
    embeddings = token_embeddings(model, family, inputs, modality, torch.cat(outputs))
    scores = [family.token_scores(model, inputs, modality, torch.cat(recorded[name])) for name in probed]
    out = []
    for picture in range(len(encoded.layouts)):
        rows = []
        for segment, x in enumerate(embeddings[picture]):
            distances = [top_distance(score[picture][segment], x, top=top) for score in scores]
            if distances[0] is not None:
                rows.append(torch.stack(distances))  # type: ignore[arg-type]
        if not rows:
            continue
        curve = torch.stack(rows).mean(0).tolist()
        votes = [torch.cat(score[picture]) for score in scores]
        for number, vote, distance in zip(layers, votes, curve, strict=True):
            if not bool(vote.isfinite().all()) or not math.isfinite(distance):
                raise NonFiniteScoreError(
                    f"calibrate hiprune: attention scores of layer {number}, or the tower's output, are not finite: "
                    "activations overflowed. Load the model in bfloat16 or float32."
                )
        out.append(curve)
    return out


def token_embeddings(
    model: Any, family: Family, inputs: Kwargs, modality: Modality, hidden: Tensor
) -> list[list[Tensor]]:
    """[B, M, C] or packed [T, C] tokens of the tower -> per picture and segment [H * W, C] float32.

    ``Family.token_scores`` is linear in the score, so each channel is brought to visual tokens as a score would be.
    """
    channels = hidden.movedim(-1, 0).float().contiguous()

    def to_tokens(channel: Tensor) -> list[list[Tensor]]:
        return family.token_scores(model, inputs, modality, channel)

    return torch.func.vmap(to_tokens, out_dims=-1)(channels)


def block_of(model: nn.Module, attention: nn.Module) -> nn.Module:
    """The layer that an attention module belongs to: its innermost ancestor that stands in a list of modules."""
    name = next(name for name, module in model.named_modules() if module is attention)
    while "." in name:
        parent = name.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
            return model.get_submodule(name)
        name = parent
    raise UnsupportedModelError(
        f"calibrate hiprune: {type(attention).__name__} of the vision tower does not stand in a list of layers, so the "
        "output of its layer cannot be taken; choose object_layer by hand."
    )


@contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of a layer inside the block, by this thread."""
    owner, seen = threading.get_ident(), []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == owner:
            seen.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
