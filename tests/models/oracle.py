"""The unwrapped language model on a prompt whose pictures, hidden tokens and positions are all given explicitly.

``Oracle`` on the whole prompt with the pruned placeholders hidden says what a shortened request must answer: its kept
tokens stand at the positions of the short prompt and see what they see there. On a short prompt made by hand it says
what resampled pictures must answer. Attention masks are written out, so that nothing rests on how the model makes them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_models import IMAGE, SPECIAL, VIDEO
from torch import Tensor

import vlmeff

# Both sides compute the same sums in float32, over key sets of different length and so in a different order. Logits
# reach 20; a rounding of 1e-7 in the first layer has grown some tenfold behind the third.
TOLERANCE = {"atol": 5e-5, "rtol": 2e-5}
TOKEN = {"image": IMAGE, "video": VIDEO}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def modalities(inputs: dict[str, Tensor]) -> list[str]:
    return [m for m in TOKEN if PIXELS[m] in inputs]


def encode(model: Any, inputs: dict[str, Tensor], modality: str) -> Any:
    """What the model's own encoder returns."""
    if model.config.model_type == "perception_lm":  # frames go the way of tiles
        return _without_gradients(model.model.get_image_features, pixel_values=inputs[PIXELS[modality]])
    function = getattr(model.model, f"get_{modality}_features")
    arguments = {key: inputs[key] for key in inspect.signature(function).parameters if key in inputs}
    return _without_gradients(function, **arguments)


def _without_gradients(function: Any, **arguments: Tensor) -> Any:
    with torch.no_grad():
        return function(**arguments, return_dict=True)


def flat(container: Any) -> Tensor:
    """[placeholders, D] from a tensor, list or tuple of features."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in container])


def encoded(model: Any, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Per modality the features of all placeholders [n, D]: of the encoder's output, then of each deepstack layer."""
    out = {}
    for modality in modalities(inputs):
        output = encode(model, inputs, modality)
        deep = getattr(output, "deepstack_features", None) or []
        out[modality] = [flat(output.pooler_output), *map(flat, deep)]
    return out


def grid_positions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[3, B, L] positions of Qwen-VL."""
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
    )
    known = inspect.signature(model.model.get_rope_index).parameters
    return model.model.get_rope_index(**{n: inputs[n] for n in names if n in inputs and n in known})[0]


class Oracle:
    """``features``: as ``encoded`` returns them. ``seen`` [B, L]: what may be looked at."""

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        features: dict[str, list[Tensor]],
        seen: Tensor | None = None,
    ) -> None:
        self.model, self.family = model, model.config.model_type
        ids = inputs["input_ids"]
        self.seen = (inputs["attention_mask"] if seen is None else seen).bool()
        self.embeds = model.get_input_embeddings()(ids)
        self.visual = torch.zeros_like(ids, dtype=torch.bool)
        layers = max([len(parts) - 1 for parts in features.values()], default=0)
        self.deep = [torch.zeros_like(self.embeds) for _ in range(layers)]
        for modality, (tokens, *deep) in features.items():
            here = ids == TOKEN[modality]
            assert int(here.sum()) == len(tokens)
            self.embeds[here] = tokens
            self.visual |= here
            for layer, of_layer in zip(self.deep, deep, strict=True):
                layer[here] = of_layer
        # Tokens of one block >= 0 see each other in both directions.
        self.block = torch.full_like(ids, -1)
        if self.family == "gemma3":
            starts = torch.nn.functional.pad(self.visual, (1, 0))[:, :-1] < self.visual
            self.block = torch.where(self.visual, starts.cumsum(1), -1)
        elif self.family == "paligemma":
            self.block = torch.where(inputs["token_type_ids"] == 0, 0, -1)
        if self.family.startswith("qwen"):
            self.positions = grid_positions(model, inputs)
        else:
            first = 1 if self.family == "paligemma" else 0
            self.positions = (self.seen.cumsum(1) - 1).clamp(min=0) + first  # numbered anew

    def masks(self) -> Any:
        """Additive masks [B, 1, L, L], as the language model takes them."""
        length = self.seen.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        together = (self.block[:, :, None] == self.block[:, None, :]) & (self.block >= 0)[:, :, None]
        allowed = (causal | together) & self.seen[:, None, :]
        if self.family != "gemma3":
            return self.additive(allowed)
        place = self.seen.cumsum(1)  # the window counts the tokens that are there
        near = place[:, :, None] - place[:, None, :] < self.model.config.text_config.sliding_window
        return {"full_attention": self.additive(allowed), "sliding_attention": self.additive(allowed & near)}

    def additive(self, allowed: Tensor) -> Tensor:
        allowed = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool)  # no row without any key
        lowest = torch.finfo(self.embeds.dtype).min
        return torch.zeros(allowed.shape, dtype=self.embeds.dtype).masked_fill(~allowed, lowest)[:, None]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, L, V]."""
        base = self.model.model
        text = base.language_model if hasattr(base, "language_model") else base.text_model
        arguments = {}
        if self.deep:
            stacked = [layer[self.visual] for layer in self.deep]
            arguments = {"visual_pos_masks": self.visual, "deepstack_visual_embeds": stacked}
        out = text(
            inputs_embeds=self.embeds,
            attention_mask=self.masks(),
            position_ids=self.positions,
            use_cache=False,
            **arguments,
        )
        return self.model.lm_head(out.last_hidden_state)

    def append(self, tokens: Tensor) -> None:
        """One more token [B, 1] of text in every row."""
        new = self.model.get_input_embeddings()(tokens)
        self.embeds = torch.cat([self.embeds, new], 1)
        self.deep = [torch.cat([layer, torch.zeros_like(new)], 1) for layer in self.deep]
        self.seen = torch.cat([self.seen, torch.ones_like(tokens, dtype=torch.bool)], 1)
        self.visual = torch.cat([self.visual, torch.zeros_like(tokens, dtype=torch.bool)], 1)
        self.block = torch.cat([self.block, torch.full_like(tokens, -1)], 1)
        highest = self.positions.amax(-1, keepdim=True)
        if self.positions.ndim == 3:
            highest = highest.amax(0, keepdim=True).expand(3, -1, -1)
        self.positions = torch.cat([self.positions, highest + 1], -1)

    @torch.no_grad()
    def greedy(self, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, steps] and the logits [B, V] behind each."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.logits()[:, -1])
            allowed = logits[-1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            tokens.append(allowed.argmax(1, keepdim=True))
            self.append(tokens[-1])
        return torch.cat(tokens, 1), logits


def pruned(
    inputs: dict[str, Tensor], features: dict[str, list[Tensor]], plan: Any, newline: str = "drop"
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """What a plan's selections should make of a request: ``seen`` [B, L], and the features with tokens merged.

    Takes from the plan what was selected and how tokens and separators stand, nothing of what became of it.
    """
    seen = inputs["attention_mask"].bool().clone()
    out = {modality: [part.clone() for part in parts] for modality, parts in features.items()}
    for modality, parts in out.items():
        stays: list[bool] = []
        for item in (item for item in plan.items if item.modality == modality):
            slots = list(range(item.layout.n_tokens)) if item.layout.slots is None else item.layout.slots.tolist()
            place, start, chosen = {token: slot for slot, token in enumerate(slots)}, 0, set()
            for (height, width), pick in zip(item.layout.grids, item.selections, strict=True):
                index = pick.index.tolist()
                chosen |= {start + i for i in index}
                for number, i in enumerate(index if pick.into is not None else []):
                    members = (pick.into == number).nonzero()[:, 0].tolist()
                    rows = [len(stays) + place[start + member] for member in members]
                    for part, before in zip(parts, features[modality], strict=True):
                        part[len(stays) + place[start + i]] = before[rows].float().mean(0)
                start += height * width
            stays += _slots_that_stay(slots, chosen, item, newline)
        here = inputs["input_ids"] == TOKEN[modality]
        seen[here] &= torch.tensor(stays)
    return seen, out


def _slots_that_stay(slots: list[int], chosen: set[int], item: Any, newline: str) -> list[bool]:
    height, width = item.layout.grids[0]
    thumbnail = height * width if len(item.layout.grids) > 1 else 0  # its tokens are in no row of the mosaic
    out, row = [], []
    for slot, token in enumerate(slots):
        row = [] if slot == thumbnail else row
        if token >= 0:
            out.append(token in chosen)
            row.append(out[-1])
        else:
            out.append(item.modality == "video" or newline == "keep" or (newline == "rows" and any(row)))
            row = []
    return out


@torch.no_grad()
def check_answers(wrapped: Any, inputs: dict[str, Tensor], oracle: Oracle, steps: int = 4) -> None:
    """Forward and generate of ``wrapped`` give the oracle's logits at its seen slots and its greedy tokens."""
    output, full = wrapped(**inputs), oracle.logits()
    for row, slots in enumerate(oracle.seen):
        torch.testing.assert_close(output.logits[row, -int(slots.sum()) :], full[row, slots], **TOLERANCE)
    settings = {"max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True}
    generated = wrapped.generate(**inputs, **settings)
    tokens, logits = oracle.greedy(steps)
    assert torch.equal(generated.sequences, torch.cat([inputs["input_ids"], tokens], 1))
    for a, b in zip(generated.logits, logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@torch.no_grad()
def check_selection(model: Any, wrapped: Any, inputs: dict[str, Tensor], newline: str = "drop") -> Any:
    """A wrapped model that selects equals the masked oracle; returns the plan."""
    output = wrapped(**inputs)
    plan = vlmeff.report(wrapped).plan
    seen, features = pruned(inputs, encoded(model, inputs), plan, newline)
    assert torch.equal(output.vlmeff_keep & inputs["attention_mask"].bool(), seen)
    assert 0 < seen.sum() < inputs["attention_mask"].sum()
    check_answers(wrapped, inputs, Oracle(model, inputs, features, seen))
    return plan
