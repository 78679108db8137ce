"""What vlmeff has to know of a model family: where the vision layers are, the grid, the placeholder.

A family is one small class of facts. Everything else (scoring, selecting, shortening the request, positions) is the
same for all of them. ``docs/adding-a-family.md`` shows how to write one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenpruning import Layout, Resampler
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.probe import QueryKey

Kwargs = Mapping[str, Any]
Modality = Literal["image", "video"]
Positions = Literal["repack", "keep"]
EncoderInputs = Mapping[Modality, tuple[str, ...]]
MODALITIES: tuple[Modality, ...] = ("image", "video")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(eq=False)
class Encoded:
    """What the vision encoder made of a request's pictures (or of its videos).

    ``output``: as the model's own encoder returned it. ``items``: per picture [placeholders, D]. ``deep``: for models
    that feed several language layers (deepstack), per layer the same. ``layouts``: per picture.
    """

    output: Any
    items: list[Tensor]
    deep: list[list[Tensor]]
    layouts: list[Layout]

    def rebuilt(self, items: Sequence[Tensor], deep: Sequence[Sequence[Tensor]]) -> Any:
        """An encoder output with other features, in the container that the model expects."""

        def like(container: Any, features: Sequence[Tensor]) -> Any:
            if not isinstance(container, Tensor):
                return list(features)
            if len({len(f) for f in features}) == 1:
                return torch.stack(list(features))
            # Pictures of unequal length as so many pictures of one token: beams are then dealt out rightly too.
            return torch.cat(list(features))[:, None]

        fields: dict[str, Any] = {"pooler_output": like(self.output.pooler_output, items)}
        if deep:
            fields["deepstack_features"] = [
                like(container, features)
                for container, features in zip(self.output.deepstack_features, deep, strict=True)
            ]
        kind = type(self.output)
        if any(f.default is MISSING and f.default_factory is MISSING for f in dataclass_fields(kind)):
            kind = BaseModelOutputWithPooling  # timm's output class insists on more than the tokens that are used
        return kind(**fields)


class Family(ABC):
    """Facts of one model class.

    ``positions``: "repack" numbers the shortened prompt from 0 (one-dimensional positions); "keep" leaves every
    surviving token its original multi-dimensional position (Qwen-VL). ``first_position``: where forward counts from.
    ``encoder_inputs``: per modality the arguments that the encoder consumes; they never reach the language model.
    ``grid_inputs``: further arguments that describe pictures and must not follow a shortened prompt.
    """

    model_type: ClassVar[str]
    positions: ClassVar[Positions] = "repack"
    first_position: ClassVar[int] = 0
    encoder_inputs: ClassVar[EncoderInputs]
    grid_inputs: ClassVar[tuple[str, ...]] = ()

    # -- geometry ------------------------------------------------------------------------------------------------

    @abstractmethod
    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        """How the tokens of each picture stand in the prompt, from the arguments alone (nothing is run)."""

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        """The layout of one picture of ``height`` x ``width`` pixels as the processor prepares it by default."""
        raise UnsupportedModelError(
            f"{self.model_type}: the number of tokens of a picture does not follow from its size alone; pass the "
            "processor's inputs instead."
        )

    def patches_per_token(self, model: Any) -> int:
        """Tower tokens that become one visual token."""
        return 1

    # -- scores of the vision tower ------------------------------------------------------------------------------

    @abstractmethod
    def attention_layers(self, model: Any) -> list[nn.Module]:
        """The attention module of every layer of the vision tower."""

    @abstractmethod
    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey | Iterator[QueryKey]:
        """q and k of an attention module from its input; an iterator gives groups of heads."""

    @abstractmethod
    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        """Per picture and segment the score [H * W] of its visual tokens, from the score of the tower's tokens."""

    def deep_layer(self, model: Any) -> int:
        """0-based index of the layer whose output is projected."""
        return len(self.attention_layers(model)) - 1

    def object_layer(self, model: Any) -> int:
        """Default object layer, 1-based."""
        return max(1, round(0.375 * len(self.attention_layers(model))))

    def legal_object_layers(self, model: Any) -> list[int]:
        """1-based numbers of the layers that see the whole picture."""
        return list(range(1, len(self.attention_layers(model)) + 1))

    def score_layers(self, model: Any, needs: tuple[str, ...], object_layer: int | None) -> dict[str, nn.Module]:
        """The attention modules behind the scores a selector needs; raises on an object layer that is not legal."""
        names = [name for name in needs if name in ("object", "deep")]
        if not names:
            return {}
        layers, legal = self.attention_layers(model), self.legal_object_layers(model)
        number = self.object_layer(model) if object_layer is None else object_layer
        if "object" in names and number not in legal:
            why = "uses windowed attention" if number <= len(layers) else f"does not exist (there are {len(layers)})"
            raise ConfigError(
                f"object_layer={number}: layer {number} of the vision tower {why}. "
                f"Legal (1-based) layers: {', '.join(map(str, legal))}."
            )
        deep = self.deep_layer(model)
        if "deep" in names and deep + 1 not in legal:
            raise UnsupportedModelError(
                f"the layer that feeds the projector ({deep + 1}) uses windowed attention, so its scores only rank "
                "tokens within a window; use a method without attention scores: tokens='downsample'."
            )
        found = {"object": layers[number - 1], "deep": layers[deep]} if legal else {}
        return {name: found[name] for name in names}

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, model: Any, kwargs: Kwargs, modality: Modality) -> Encoded:
        """Run the model's own encoder, or take what the caller encoded (``mm_encoder_outputs``)."""
        output = (kwargs.get("mm_encoder_outputs") or {}).get(modality)
        if output is None:
            names = self.encoder_inputs[modality]
            arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            output = getattr(model.base_model, f"get_{modality}_features")(**arguments, return_dict=True)
        return self.split(output, self.layouts(model, kwargs, modality))

    def split(self, output: Any, layouts: list[Layout]) -> Encoded:
        """Cut an encoder output into pictures: whatever its container, features fill the placeholders in order."""

        def pieces(container: Any) -> list[Tensor]:
            flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in container])
            expected = sum(layout.n_slots for layout in layouts)
            if len(flat) != expected:
                raise UnsupportedInputError(
                    f"{self.model_type}: the encoder returned {len(flat)} tokens where the pictures' sizes give "
                    f"{expected}. Make all inputs with the model's own processor, in one call."
                )
            return list(flat.split([layout.n_slots for layout in layouts]))

        deep = getattr(output, "deepstack_features", None) or []
        return Encoded(output, pieces(output.pooler_output), [pieces(layer) for layer in deep], layouts)

    def projector(self, model: Any) -> nn.Module | None:
        """The module before whose input [pictures, H * W, C] tokens are resampled; None: after the encoder."""
        return None

    def resampled_layouts(
        self, model: Any, kwargs: Kwargs, layouts: Sequence[Layout], method: Resampler
    ) -> list[Layout]:
        """What ``layouts`` become when every segment's grid is resampled."""
        if any(layout.slots is not None for layout in layouts):
            raise UnsupportedModelError(
                f"{self.model_type}: its pictures have separators, and the family does not say where they stand among "
                "resampled tokens (Family.resampled_layouts); use a method that selects tokens, such as HiPrune."
            )
        return [Layout(grids=[method.new_grid(g) for g in layout.grids], shares=layout.shares) for layout in layouts]

    def encode_resampled(self, model: Any, kwargs: Kwargs, modality: Modality, method: Resampler) -> Encoded:
        """Encode with every segment's grid resampled. Its ``layouts`` are those of the smaller grids."""
        projector = self.projector(model)
        if projector is None:
            full = self.encode(model, kwargs, modality)
            layouts = self.resampled_layouts(model, kwargs, full.layouts, method)
            items = [resample_item(item, layout, method) for item, layout in zip(full.items, full.layouts, strict=True)]
            deep = [
                [resample_item(item, layout, method) for item, layout in zip(layer, full.layouts, strict=True)]
                for layer in full.deep
            ]
            return Encoded(full.output, items, deep, layouts)
        if (kwargs.get("mm_encoder_outputs") or {}).get(modality) is not None:
            raise IncompatibleError(
                f"{self.model_type}: tokens are resampled before the projector, which mm_encoder_outputs have passed; "
                "pass the pixels instead."
            )
        layouts = self.layouts(model, kwargs, modality)
        grid = layouts[0].grids[0]

        def shrink(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (method.resample(args[0], grid), *args[1:])

        handle = projector.register_forward_pre_hook(shrink)
        try:
            names = self.encoder_inputs[modality]
            arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            output = getattr(model.base_model, f"get_{modality}_features")(**arguments, return_dict=True)
        finally:
            handle.remove()
        return self.split(output, self.resampled_layouts(model, kwargs, layouts, method))

    # -- what the language model gets ----------------------------------------------------------------------------

    def placeholder_id(self, model: Any, modality: Modality) -> int:
        return model.config.image_token_id if modality == "image" else model.config.video_token_id

    def regrid(self, model: Any, kwargs: Kwargs, new_layouts: Mapping[Modality, list[Layout]]) -> dict[str, Any]:
        """Arguments that describe the resampled pictures, for families whose positions follow the grid ("keep")."""
        raise UnsupportedModelError(
            f"{self.model_type}: the family does not say how positions follow a resampled grid (Family.regrid); use a "
            "method that selects tokens, such as HiPrune."
        )

    def text_model(self, model: Any) -> nn.Module:
        """The language model: a stack of decoder layers."""
        base = model.base_model
        return base.language_model if hasattr(base, "language_model") else base.text_model

    # -- text relevance ------------------------------------------------------------------------------------------

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        """Per picture and segment what the tower saw of it, [3, h, w] normalised."""
        raise UnsupportedModelError(
            f"{self.model_type}: this text source looks at pixels, which cannot be recovered from the inputs of this "
            "model; use the default text source (the language model's embeddings)."
        )

    def tower_module(self, model: Any) -> nn.Module:
        """The module whose forward input [pictures, M, C] are the tower's tokens before the projector."""
        raise UnsupportedModelError(
            f"{self.model_type}: TowerText needs a CLIP tower whose tokens are projected one by one; use the default "
            "text source (the language model's embeddings)."
        )

    # -- refusals ------------------------------------------------------------------------------------------------

    def refuse_model(self, model: Any) -> None:
        """Raise ``UnsupportedModelError`` for a model of the class whose tokens cannot be reduced."""
        if not hasattr(model, "generate"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language model head: wrap the ...ForConditionalGeneration model."
            )

    def refuse_unsupported(self, model: Any, kwargs: Kwargs) -> None:
        """Raise ``UnsupportedInputError`` for inputs that would silently stay unpruned."""
        if "video" not in self.encoder_inputs and "video" in present(kwargs):
            raise UnsupportedInputError(
                f"{self.model_type}: token reduction for video is not supported; pass the frames as pictures, or "
                "vlmeff.unwrap(model) first."
            )


def present(kwargs: Kwargs) -> list[Modality]:
    """The modalities of a request."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return [m for m in MODALITIES if kwargs.get(PIXELS[m]) is not None or encoded.get(m) is not None]


def resample_item(item: Tensor, layout: Layout, method: Resampler) -> Tensor:
    """[tokens, D] of a picture -> its resampled segments, one after another."""
    parts = zip(layout.segments(item), layout.grids, strict=True)
    return torch.cat([method.resample(part, grid) for part, grid in parts])


def separate_heads(module: Any) -> Callable[[Tensor], Tensor]:
    """[B, M, H * D] -> [B, H, M, D] for an attention module with ``head_dim``."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, module.head_dim).transpose(1, 2)

    return heads


def pooled_scores(score: Tensor, block: int) -> Tensor:
    """[n, s*H * s*W] scores of a square map -> [n, H * W]: the mean of each ``block`` x ``block`` square."""
    side = round(score.shape[-1] ** 0.5)
    square = score.view(-1, side // block, block, side // block, block)
    return square.mean((2, 4)).flatten(1)
