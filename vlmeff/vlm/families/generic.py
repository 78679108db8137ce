"""Models without a family of their own: their geometry is found out by experiment at the first picture, or refused."""

from __future__ import annotations

import inspect
import threading
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenpruning import Layout
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families.base import EncoderInputs, Family, Kwargs, Modality
from vlmeff.vlm.families.geometry import Geometry, UnverifiedError, measure
from vlmeff.vlm.families.timm_attention import is_timm_attention, timm_query_key
from vlmeff.vlm.probe import QueryKey

TOWERS = ("vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder")
ENCODER_FIELDS = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}


class Generic(Family):
    """A model whose pictures all give the same grid of tokens, each from its own block of tower tokens.

    One object serves one wrapped model and keeps what was found out about it (per size of picture). The first picture
    of a size costs one pass of the tower and a few dozen of the connector more.
    """

    encoder_inputs: ClassVar[EncoderInputs] = {"image": ("pixel_values",)}

    def __init__(self, model: Any) -> None:
        self.model_type = model.config.model_type  # type: ignore[misc]
        self._known: dict[tuple[int, ...], Geometry] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}  # a lock can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @staticmethod
    def may_serve(model: Any) -> bool:
        """Whether the class has the public points that token reduction uses; not yet whether it can be reduced."""
        base = getattr(model, "base_model", None)
        if not hasattr(base, "get_image_features"):
            return False
        return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters

    # -- refusals ------------------------------------------------------------------------------------------------

    def _error(self, model: Any, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(model).__name__} (model_type {self.model_type!r}) has no family in vlmeff, and its tokens cannot "
            f"be reduced without one: {reason}. docs/adding-a-family.md shows how to write a family."
        )

    def refuse_model(self, model: Any) -> None:
        super().refuse_model(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise self._error(model, "it is an encoder-decoder, whose prompt is not continued")
        if hasattr(model.base_model, "get_rope_index") or hasattr(model, "get_rope_index"):
            raise self._error(model, "its positions have several dimensions (get_rope_index)")
        parameters = inspect.signature(model.base_model.get_image_features).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        others = ", ".join(name for name in needed if name != "pixel_values")
        if others:
            raise self._error(model, f"its encoder needs {others}, and what that does to the tokens is not known")
        self.tower(model)
        self.placeholder_id(model, "image")

    def refuse_unsupported(self, model: Any, kwargs: Kwargs) -> None:
        super().refuse_unsupported(model, kwargs)
        for name, parameter in inspect.signature(model.base_model.get_image_features).parameters.items():
            known = name == "pixel_values" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not known and kwargs.get(name) is not None:
                raise UnsupportedInputError(
                    f"{self.model_type} has no family in vlmeff, and what the encoder makes of {name} is not known: "
                    f"leave {name} out, or vlmeff.unwrap(model) first."
                )

    # -- geometry ------------------------------------------------------------------------------------------------

    def tower(self, model: Any) -> nn.Module:
        """The vision tower, under one of the names that transformers uses."""
        for name in TOWERS:
            tower = getattr(model.base_model, name, None)
            if isinstance(tower, nn.Module):
                return tower
        raise self._error(model, f"it has no vision tower under the names {', '.join(TOWERS)}")

    def layers(self, model: Any) -> list[tuple[nn.Module, nn.Module]]:
        """The tower's blocks with their attention modules: its longest list of blocks that hold one each."""
        best: list[tuple[nn.Module, nn.Module]] = []
        for blocks in self.tower(model).modules():
            if isinstance(blocks, nn.ModuleList) and len(blocks) > len(best):
                attentions = [[m for m in block.modules() if _is_attention(m)] for block in blocks]
                if all(len(found) == 1 for found in attentions):
                    best = [(block, found[0]) for block, found in zip(blocks, attentions, strict=True)]
        return best

    def geometry(self, model: Any, pixels: Any) -> Geometry:
        """Of pictures of the size of ``pixels`` [..., 3, h, w]; found out where it is not known yet."""
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            raise UnsupportedInputError(
                f"{self.model_type}: token reduction needs pixel_values as one tensor [pictures, 3, h, w] or [rows, "
                "pictures, 3, h, w]; what the encoder made of them (mm_encoder_outputs) is not enough."
            )
        size = tuple(pixels.shape[-3:])
        with self._lock:
            if size not in self._known:
                pair = pixels[:1].repeat(2, 1, 1, 1) if pixels.ndim == 4 else pixels[:1, :1].repeat(1, 2, 1, 1, 1)
                try:
                    self._known[size] = measure(
                        lambda pictures: self._features(model, pictures),
                        self.tower(model),
                        self.layers(model),
                        self.query_key,
                        pair,
                    )
                except UnverifiedError as error:
                    raise self._error(model, str(error)) from None
            return self._known[size]

    def _features(self, model: Any, pixels: Tensor) -> Tensor:
        """[tokens of all pictures, D] as they fill the placeholders."""
        output = model.base_model.get_image_features(pixel_values=pixels, return_dict=True)
        more = sorted(name for name, value in output.items() if value is not None and name not in ENCODER_FIELDS)
        if more:
            raise UnverifiedError(f"its encoder also returns {', '.join(more)}, whose meaning is not known")
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        pixels = kwargs.get("pixel_values")
        grid = self.geometry(model, pixels).grid
        return [Layout(grids=[grid])] * pixels.shape[:-3].numel()  # type: ignore[union-attr]

    def patches_per_token(self, model: Any) -> int:
        return next((geometry.block**2 for geometry in self._known.values()), 1)

    # -- scores of the vision tower ------------------------------------------------------------------------------

    def attention_layers(self, model: Any) -> list[nn.Module]:
        layers = self.layers(model)
        if not layers:
            raise UnsupportedModelError(
                f"{self.model_type} has no family in vlmeff, and {type(self.tower(model)).__name__} has no list of "
                "layers with one attention module each (q_proj, k_proj and v_proj, or timm's), so its tokens have no "
                "attention scores; use a method without them, as tokens='downsample', or write a family "
                "(docs/adding-a-family.md)."
            )
        return [attention for _, attention in layers]

    def deep_layer(self, model: Any) -> int:
        feeding = next((geometry.feeding for geometry in self._known.values()), ())
        if len(feeding) > 1:
            numbers = ", ".join(str(i + 1) for i in feeding)
            raise UnsupportedModelError(
                f"{self.model_type}: its tokens are made of several layers of the tower ({numbers}), and attention "
                "scores need one; use a method without them: tokens='downsample'."
            )
        return feeding[0] if feeding else len(self.attention_layers(model)) - 1

    def score_layers(self, model: Any, needs: tuple[str, ...], object_layer: int | None) -> dict[str, nn.Module]:
        found = super().score_layers(model, needs, object_layer)
        numbers = {attention: i for i, attention in enumerate(self.attention_layers(model))} if found else {}
        for geometry in self._known.values():
            wrong = sorted({numbers[attention] for attention in found.values()} - geometry.scored)
            if wrong:
                raise UnsupportedModelError(
                    f"{self.model_type}: layer {wrong[0] + 1} of the tower does more than softmax(q k^T) of all tokens "
                    "of a picture (rotary positions, windows or a mask), so its scores are not known; use a method "
                    "without attention scores, as tokens='downsample', or write a family (docs/adding-a-family.md)."
                )
        return found

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        if is_timm_attention(module):
            return timm_query_key(module, hidden, kwargs)
        q, k = module.q_proj(hidden), module.k_proj(hidden)
        count = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        width = getattr(module, "head_dim", None) or q.shape[-1] // count
        normed = (_normed(module, name, x, width) for name, x in (("q_norm", q), ("k_norm", k)))
        q, k = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in normed)
        scale = next((s for n in ("scale", "scaling") if isinstance(s := getattr(module, n, None), float)), width**-0.5)
        return QueryKey(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), scale)

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        geometry = self.geometry(model, kwargs["pixel_values"])
        count = kwargs["pixel_values"].shape[:-3].numel()
        if score.shape != (count, geometry.tower_tokens):
            raise UnsupportedInputError(
                f"{self.model_type}: the tower attends over {tuple(score.shape)} tokens where {count} pictures have "
                f"{geometry.tower_tokens} each; use a method without attention scores: tokens='downsample'."
            )
        return [[row] for row in geometry.pooled(score)]

    # -- the rest ------------------------------------------------------------------------------------------------

    def placeholder_id(self, model: Any, modality: Modality) -> int:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if isinstance(token := getattr(model.config, name, None), int):
                return token
        raise self._error(model, f"its config names no placeholder ({modality}_token_id)")

    def text_model(self, model: Any) -> nn.Module:
        base = model.base_model
        if not hasattr(base, "language_model") and not hasattr(base, "text_model"):
            raise self._error(model, "its language model is neither language_model nor text_model")
        return super().text_model(model)

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        return [[picture] for picture in kwargs["pixel_values"].flatten(0, -4)]


def _is_attention(module: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj")
    return is_timm_attention(module) or all(isinstance(getattr(module, n, None), nn.Module) for n in names)


def _normed(module: Any, name: str, x: Tensor, width: int) -> Tensor:
    """[B, M, H * D] normalised per head or over all heads, whichever the norm's weight is made for."""
    norm = getattr(module, name, None)
    if norm is None:
        return x
    weight = getattr(norm, "weight", None)
    per_head = weight is not None and weight.shape[-1] == width != x.shape[-1]
    return norm(x.unflatten(-1, (-1, width))).flatten(-2) if per_head else norm(x)
