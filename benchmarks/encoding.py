"""One request to one model, and its vision encoder taken apart: with scores, with attention maps, and what the parts
that are timed alone get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.vlm.families import family_of
from vlmeff.vlm.probe import QueryKey, probe
from vlmeff.vlm.reduce import text_after
from vlmeff.vlm.relevance import EmbeddingText, Question


class Setup:
    """One model and one request, and what its encoder gives: recorded once for the parts that are timed alone."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs, self.device = model, inputs, inputs["input_ids"].device
        self.family: Any = family_of(model)
        self.layers = self.family.score_layers(model, ("object", "deep"), None)
        self.layout = self.family.layouts(model, inputs, "image")[0]
        self.grid = self.layout.grids[0]

    def encode(self, *needs: str) -> dict[str, Tensor]:
        """The vision encoder, with the scores that are needed; [N] each."""
        layers = {name: self.layers[name] for name in needs}
        with probe(layers, self.family.query_key) as recorded:
            self.encoded = self.family.encode(self.model, self.inputs, "image")
        return {name: self._token_scores(torch.cat(parts)) for name, parts in recorded.items()}

    def _token_scores(self, score: Tensor) -> Tensor:
        return self.family.token_scores(self.model, self.inputs, "image", score)[0][0]

    def encode_eagerly(self) -> dict[str, Tensor]:
        """The scores from all attention maps of the tower, which eager attention returns."""
        tower = self.model.base_model.vision_tower
        given = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        try:
            pixels = self.inputs["pixel_values"]
            maps = self.model.base_model.get_image_features(pixels, output_attentions=True, return_dict=True).attentions
        finally:
            tower.set_attn_implementation(given)
        modules = self.family.attention_layers(self.model)
        numbers = {name: modules.index(module) for name, module in self.layers.items()}
        return {name: self._token_scores(maps[i].float().mean((1, 2))) for name, i in numbers.items()}

    def hidden_states(self) -> dict[str, tuple[nn.Module, Tensor, dict[str, Any]]]:
        """Encode once; per score the attention module and the input it got."""
        seen: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {}
        handles = []
        for name, module in self.layers.items():

            def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                seen[name] = (module, args[0] if args else kwargs["hidden_states"], kwargs)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            self.encode()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def text_scores(self) -> Tensor:
        ids = self.inputs["input_ids"]
        token = self.family.placeholder_id(self.model, "image")
        last = int((ids[0] == token).nonzero()[-1])

        def never() -> Any:
            raise AssertionError("EmbeddingText looks at no pixels")

        question = Question(
            text_ids=text_after(self.inputs, self.family, self.model, token, (0, last)),
            features=self.encoded.items[0],
            grids=self.layout.grids,
            embed=self.model.get_input_embeddings(),
            tower_features=never,
            pixels=never,
        )
        return EmbeddingText().relevance(question)[0]


def maps_of(qk: QueryKey) -> Tensor:
    """The column mean as it is usually written, with the map of one layer; one sequence."""
    q, k = (qk.q, qk.k) if qk.cu_seqlens is None else (qk.q.transpose(0, 1)[None], qk.k.transpose(0, 1)[None])
    return (q @ k.transpose(-1, -2) * qk.scale).softmax(-1, dtype=torch.float32).mean((1, 2))
