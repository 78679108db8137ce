"""Stage 3 of training tiny-qwen: the language model learns to answer, with the tower and its merger frozen.

What the tower sees is computed once and kept (float16). A row holds one picture and several questions: they share the
picture's tokens as a prefix, a block mask hides them from each other and their positions restart behind the picture,
so each is computed exactly as if it stood alone.

What makes it learn to look things up within minutes: at first a row holds only the visual tokens at the centres of
things and as many others, at their own places (with all 64 the answers stayed guesses for 1,300 steps); after
``EARLY_LAYER`` layers every token of a question has to name the answer, so that looking up starts at the word that
names the thing; after ``PLACE_LAYER`` layers every visual token has to say its row and column, which M-RoPE gives only
relative to the tokens before the picture.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.evaluation import mosaics
from vlmeff.models.tiny_qwen.architecture import SHORT_ANSWER, build_processor
from vlmeff.models.tiny_qwen.pictures import (
    Grid,
    Picture,
    Question,
    centres,
    easy_vqa_questions_of,
    mosaic_picture,
    patches_of,
    scene_picture,
    scene_questions,
    scene_things,
    single_picture,
)
from vlmeff.models.tiny_qwen.tower import FULL_GRID, SMALL_GRIDS, tower_forward

BATCH = {"scenes": 11, "small": 1, "mosaics": 2, "single": 2}
POOL = {"scenes": 8000, "small": 800, "mosaics": 1600, "single": 3600}  # pictures to draw from
FIRST_SCENE = 1_000_000  # scenes that the tower was not trained on
CONVERSATIONS = 12  # per picture
SUFFIX_SHARE = 0.25
LENGTHS = 64  # rows are padded to a multiple of this: few lengths to compile for
PLACE_LAYER, PLACE_WEIGHT = 2, 0.1
EARLY_LAYER, EARLY_WEIGHT = 4, 0.3
# Shares of training until which rows hold few visual tokens only, and from which on all.
FEW_UNTIL = (0.35, 0.6)
LARGEST_SIDE = 16  # tokens: rows or columns that the place head knows
EOS_WEIGHT = 0.2  # the end of an answer is easy
# How often a kind is asked, where not once: places are the hardest to learn.
OFTEN = {"color": 1.5, "size": 0.7, "larger": 0.7, "beside": 2.0, "extreme": 1.5, "mosaic occupied": 0.5}


@dataclass(frozen=True, eq=False)
class Seen:
    """``tokens`` [rows * columns, width] as the merger gives them; ``centres``: which of them hold a thing's centre."""

    tokens: Tensor
    grid: Grid
    questions: Sequence[Question]
    centres: Sequence[int] = ()


class SeenPictures:
    """Pictures of each kind of ``POOL`` as the frozen tower sees them, computed in parts that stay in ``folder``."""

    PART = 200

    def __init__(
        self, visual: Any, mean: Tensor, std: Tensor, folder: Path, seed: int, pool: dict[str, int] | None = None
    ) -> None:
        self.seed = seed
        self.pool = POOL if pool is None else pool
        self.tiles = mosaics.load_tiles("train")
        self.of_image = easy_vqa_questions_of()
        self.sizes = {**self.pool, "single": min(self.pool["single"], len(self.tiles))}
        folder.mkdir(parents=True, exist_ok=True)
        self.tokens: dict[str, list[Tensor]] = {}
        for kind, number in self.sizes.items():
            self.tokens[kind] = []
            for start in range(0, number, self.PART):
                file = folder / f"{kind}-{start}.pt"
                if not file.exists():
                    print(f"looking at {kind} {start}/{number}", flush=True)
                    numbers = range(start, min(start + self.PART, number))
                    torch.save(self._look(visual, mean, std, kind, numbers), file.with_suffix(".part"))
                    file.with_suffix(".part").replace(file)
                self.tokens[kind] += torch.load(file, weights_only=True)

    def grid(self, kind: str, number: int) -> Grid:
        if kind == "small":
            return SMALL_GRIDS[number % len(SMALL_GRIDS)]
        return (5, 5) if kind == "single" else FULL_GRID

    def _picture(self, kind: str, number: int) -> Picture:
        if kind == "mosaics":
            return mosaic_picture(self._rng(number))
        if kind == "single":
            return single_picture(self.tiles[number], ())
        return scene_picture(self._scene(kind, number), seed=self.seed)

    def _rng(self, number: int) -> random.Random:
        return random.Random(f"tiny-qwen-mosaic-{self.seed}-{number}")

    def _scene(self, kind: str, number: int) -> int:
        return FIRST_SCENE + number + (self.pool["scenes"] if kind == "small" else 0)

    @torch.no_grad()
    def _look(self, visual: Any, mean: Tensor, std: Tensor, kind: str, numbers: Sequence[int]) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        by_grid: dict[Grid, list[int]] = {}
        for number in numbers:
            by_grid.setdefault(self.grid(kind, number), []).append(number)
        for grid, alike in by_grid.items():
            for start in range(0, len(alike), 20):
                some = alike[start : start + 20]
                with torch.autocast("cpu", torch.bfloat16):
                    patches = patches_of([self._picture(kind, number) for number in some], grid, mean, std)
                    tokens = tower_forward(visual, patches, grid)[1]
                out.update(zip(some, tokens.half(), strict=True))
        return [out[number].clone() for number in numbers]

    def get(self, kind: str, number: int) -> Seen:
        if kind == "mosaics":
            picture = self._picture(kind, number)
            things, questions = picture.things, picture.questions
        elif kind == "single":
            things = single_picture(self.tiles[number], ()).things
            questions = tuple(self.of_image[self.tiles[number].image_id])
        else:
            things = scene_things(self._scene(kind, number), seed=self.seed)
            questions = scene_questions(self._scene(kind, number), seed=self.seed)
        grid = self.grid(kind, number)
        return Seen(self.tokens[kind][number], grid, questions, tuple(centres(things, grid).values()))


class EarlyHeads(nn.Module):
    """Row and column of a visual token, and the answer at a question's token; thrown away after training."""

    def __init__(self, width: int, words: int, side: int = LARGEST_SIDE) -> None:
        super().__init__()
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * side))
        self.answer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))


def few_tokens(row: Seen, rng: random.Random) -> list[int]:
    """Raster indices of the tokens at centres and of as many others."""
    others = [i for i in range(len(row.tokens)) if i not in row.centres]
    return sorted({*row.centres, *rng.sample(others, min(len(others), len(row.centres)))})


def choose(questions: Sequence[Question], rng: random.Random, often: dict[str, float]) -> list[Question]:
    """Kinds by ``often``, then an answer, then a question: rare answers come as often as common ones."""
    by_kind: dict[str, dict[str, list[Question]]] = {}
    for q in questions:
        by_kind.setdefault(q.kind, {}).setdefault(q.answer, []).append(q)
    kinds = sorted(by_kind)
    weights = [often.get(kind, 1.0) for kind in kinds]
    out = []
    for kind in rng.choices(kinds, weights, k=CONVERSATIONS):
        by_answer = by_kind[kind]
        out.append(rng.choice(by_answer[rng.choice(sorted(by_answer))]))
    return out


@dataclass
class Row:
    """One packed row: per token its id, conversation (0: seen by all), place, weight as a target, early answer."""

    ids: list[int]
    branch: list[int]
    places: list[Any]
    weight: list[float]
    early: list[int]


def padded_batch(rows: Sequence[Row], *, pad: int, nowhere: Any) -> dict[str, Tensor]:
    """input_ids, labels, early, weight [B, L], position_ids [B, L, ...] and the additive block mask [B, 1, L, L]."""
    length = -(-max(len(row.ids) for row in rows) // LENGTHS) * LENGTHS

    def padded(values: Sequence[Any], fill: Any) -> Tensor:
        return torch.tensor([[*v, *[fill] * (length - len(v))] for v in values])

    input_ids = padded([row.ids for row in rows], pad)
    branches = padded([row.branch for row in rows], -1)  # padding sees padding
    weight = padded([row.weight for row in rows], 0.0)
    order = torch.arange(length)
    sees = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == 0)
    sees &= order[None, None, :] <= order[None, :, None]
    return {
        "input_ids": input_ids,
        "labels": torch.where(weight > 0, input_ids, -100),
        "early": padded([row.early for row in rows], -100),
        "weight": weight,
        "position_ids": padded([row.places for row in rows], nowhere),
        "mask": torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None],
    }


class Conversations:
    """Tokenizes questions and packs several conversations behind one picture."""

    def __init__(self) -> None:
        self.tokenizer = build_processor().tokenizer
        self.before = self.ids("<|im_start|>user\n<|vision_start|>")
        self.image = self.ids("<|image_pad|>")[0]
        self.end = self.ids("<|im_end|>")[0]
        self.ids = functools.cache(self.ids)  # type: ignore[method-assign]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def turn(self, question: Question, rng: random.Random) -> tuple[list[int], list[float]]:
        """(ids behind the picture, weight of each as a target)."""
        text = question.text
        if rng.random() < SUFFIX_SHARE:
            suffix = SHORT_ANSWER if rng.random() < 0.5 else SHORT_ANSWER.removesuffix(".") + " or phrase."
            text = f"{text}\n{suffix}"
        asked = self.ids(f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")
        answer = self.ids(question.answer)
        return [*asked, *answer, self.end], [0.0] * len(asked) + [1 / len(answer)] * len(answer) + [EOS_WEIGHT]

    def choose(self, questions: Sequence[Question], rng: random.Random) -> list[Question]:
        return choose(questions, rng, OFTEN)

    def pack(
        self, rows: Sequence[Seen], rng: random.Random, kept: Sequence[Sequence[int] | None] | None = None
    ) -> dict[str, Tensor]:
        """input_ids, labels, early, weight [B, L], position_ids [3, B, L] and the additive block mask [B, 1, L, L].

        ``kept``: for each row the visual tokens that stand in it, None for all. ``early``: at every token of a question
        the first token of its answer, -100 elsewhere.
        """
        packed = []
        for row, stay in zip(rows, kept or [None] * len(rows), strict=True):
            start, columns = len(self.before), row.grid[1]
            visual = range(len(row.tokens)) if stay is None else stay
            ids = self.before + [self.image] * len(visual)
            places = [(i, i, i) for i in range(start)]
            places += [(start, start + i // columns, start + i % columns) for i in visual]
            branch, target, early = [0] * len(ids), [0.0] * len(ids), [-100] * len(ids)
            for number, question in enumerate(self.choose(row.questions, rng), start=1):
                tokens, weights = self.turn(question, rng)
                ids += tokens
                target += weights
                asked = weights.count(0.0)
                early += [tokens[asked]] * asked + [-100] * (len(tokens) - asked)
                branch += [number] * len(tokens)
                places += [(start + max(row.grid) + i,) * 3 for i in range(len(tokens))]
            packed.append(Row(ids, branch, places, target, early))
        batch = padded_batch(packed, pad=self.tokenizer.pad_token_id, nowhere=(0, 0, 0))
        return {**batch, "position_ids": batch["position_ids"].permute(2, 0, 1).contiguous()}


def text_layer(layer: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder layer with written-out attention; ``mask`` [B, 1, L, L] additive, ``cos`` and ``sin`` [B, L, D]."""
    attention, batch, length = layer.self_attn, x.shape[0], x.shape[1]
    normed = layer.input_layernorm(x)
    q, k, v = (
        project(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
    q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
    k, v = (t.repeat_interleave(attention.num_key_value_groups, 1).to(q.dtype) for t in (k, v))
    score = (q * attention.scaling) @ k.transpose(-2, -1) + mask.to(q.dtype)
    mixed = score.softmax(-1, dtype=score.dtype) @ v
    x = x + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def text_forward(
    text: Any, embeds: Tensor, mask: Tensor, position_ids: Tensor, *, run_layer: Any = text_layer
) -> tuple[Tensor, list[Tensor]]:
    """(final states, [states before the first layer, after the first, ..., after the last but one]), each [B, L, D].

    The same as ``text(...)`` (tested), written out because on a CPU the backward pass of the fused attention is slow at
    these sizes, and so that ``run_layer`` can be a compiled ``text_layer``.
    """
    cos, sin = text.rotary_emb(embeds, position_ids)
    x, after = embeds, []
    for layer in text.layers:
        after.append(x)
        x = run_layer(layer, x, mask, cos, sin)
    return text.norm(x), after


def language_step(
    model: Any,
    heads: EarlyHeads,
    seen: SeenPictures,
    packer: Conversations,
    step: int,
    steps: int,
    seed: int,
    *,
    run_layer: Any = text_layer,
) -> tuple[Tensor, str]:
    """The loss of one step of ``steps``; its pictures and questions follow from the seed and the step's number."""
    rng = random.Random(f"tiny-qwen-language-{seed}-{step}")
    rows = [seen.get(kind, rng.randrange(seen.sizes[kind])) for kind, n in BATCH.items() for _ in range(n)]
    few = min(1.0, max(0.0, (FEW_UNTIL[1] - step / steps) / (FEW_UNTIL[1] - FEW_UNTIL[0])))
    kept = [few_tokens(row, rng) if rng.random() < few else None for row in rows]
    batch = packer.pack(rows, rng, kept)
    tokens = torch.cat(
        [r.tokens.float() if k is None else r.tokens[k].float() for r, k in zip(rows, kept, strict=True)]
    )
    is_image, is_asked = batch["input_ids"] == packer.image, batch["early"] != -100
    with torch.autocast("cpu", torch.bfloat16):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
        final, after = text_forward(
            model.model.language_model, embeds, batch["mask"], batch["position_ids"], run_layer=run_layer
        )
        places = heads.place(after[PLACE_LAYER][is_image]).float().chunk(2, -1)
        early = heads.answer(after[EARLY_LAYER][is_asked]).float()
    labels = batch["labels"][:, 1:]
    answered = labels != -100
    logits = model.lm_head(final[:, :-1][answered].float())
    weight = batch["weight"][:, 1:][answered]
    loss = (F.cross_entropy(logits, labels[answered], reduction="none") * weight).sum() / weight.sum()
    where = batch["position_ids"][1:, is_image] - len(packer.before)
    place_loss = F.cross_entropy(places[0], where[0]) + F.cross_entropy(places[1], where[1])
    early_loss = F.cross_entropy(early, batch["early"][is_asked])
    content = labels[answered] != packer.end
    right = (logits.argmax(-1) == labels[answered])[content]
    # Rows stand in the order of BATCH: scenes first.
    of_scene = (torch.arange(len(rows)) < BATCH["scenes"])[:, None].expand_as(labels)[answered][content]
    found = (places[0].argmax(-1) == where[0]).float().mean()
    hit = f"answers {right.float().mean():.3f} scenes {right[of_scene].float().mean():.3f}"
    total = loss + PLACE_WEIGHT * place_loss + EARLY_WEIGHT * early_loss
    return total, f"{hit} early {early_loss.item():.3f} rows {found:.3f} few {few:.2f}"
