"""Stage 3 of training tiny-llava: projector and Llama learn to answer, with the tower frozen.

As tiny-qwen's (``tiny_qwen/language.py``): what the tower sees is computed once, a row holds one picture and several
conversations that do not see each other, every answer weighs the same, and after ``EARLY_LAYER`` layers every token of
a question has to name the answer already. Moreover, after ``NAMED_LAYER`` layers the word that ends the name of a thing
("the red *circle*", "the top *left*") has to say in which row and column the thing lies, or that there is none: without
that, everything that needs two words to find a thing stayed at chance for 1,500 steps.

Three kinds of rows, because a row with all 324 visual tokens costs three times as much and teaches no more about
looking things up: ``few`` visual tokens (those at the centres of things and as many others), ``some`` (SOME) and all.
Tokens always stand at their own places. In ``some`` the centres of a scene's things are always there, those of a mosaic
or easy-vqa image are not: its large shapes have to be answerable from any of their tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.evaluation import mosaics
from vlmeff.evaluation.scenes.composition import SIZE_NAMES
from vlmeff.models.tiny_llava.architecture import GRID, SHORT_ANSWER, build_processor
from vlmeff.models.tiny_llava.tower import pixels_of, tower_forward
from vlmeff.models.tiny_qwen import language as qwen
from vlmeff.models.tiny_qwen.language import Row, few_tokens, padded_batch, text_forward
from vlmeff.models.tiny_qwen.pictures import COLORS, SHAPES, Grid, Question, Thing, scene_things, single_picture

BATCH = {"scenes": 9, "mosaics": 5, "single": 2}
POOL = {"scenes": 5000, "mosaics": 2000, "single": 1600}  # pictures to draw from
OFTEN = {**qwen.OFTEN, "mosaic position": 1.5, "mosaic where": 2.0, "describe": 1.5}
SECOND_TURN = 0.12  # share of conversations with a second question
SUFFIX_SHARE = 0.25
DESCRIBE_WEIGHT = 2.0  # of a whole description; other answers weigh 1
EOS_WEIGHT = 0.2  # the end of an answer is easy
PLACE_LAYER, PLACE_WEIGHT = 1, 0.1
EARLY_LAYER, EARLY_WEIGHT = 3, 0.3
NAMED_LAYER, NAMED_WEIGHT = 2, 0.5
NOWHERE = GRID  # row and column of a thing that is not there
SOME = 108
FEW_UNTIL = (0.45, 0.6)  # shares of training until which rows are ``few`` only, and from which on none is
SOME_UNTIL, SOME_LAST = (0.6, 0.75), 0.3  # of the other rows: ``some`` only until, and their share at the end


_EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}  # (axis, sign)


@dataclass(frozen=True, eq=False)
class Seen(qwen.Seen):
    things: tuple[Thing, ...] = ()


class Heads(qwen.EarlyHeads):
    """Also row and column of the thing that a word names."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__(width, words, GRID)
        self.named = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * (GRID + 1)))


def named_place(words: Sequence[str], at: int, things: Sequence[Thing]) -> tuple[int, int] | None:
    """(row, column) of the one thing that ``words[at]`` and the words before it name, NOWHERE if there is none.

    None where they name nothing, or several things. Understands "[small] [red] circle", "[small] red one", "top left"
    and "leftmost shape".
    """
    word, found = words[at], list(things)
    before = words[at - 1] if at else ""
    if word in SHAPES or word == "one":
        start = at
        while start and words[start - 1] in (*COLORS, *SIZE_NAMES):
            start -= 1
        if start == at and word == "one":
            return None
        for name in words[start : at + 1]:
            if name in SIZE_NAMES:
                found = [t for t in found if t.size == SIZE_NAMES.index(name)]
            elif name in COLORS:
                found = [t for t in found if t.color == COLORS.index(name)]
            elif name in SHAPES:
                found = [t for t in found if t.shape == SHAPES.index(name)]
    elif before in ("top", "bottom") and word in ("left", "right"):
        found = [t for t in found if (t.y < 0.5) == (before == "top") and (t.x < 0.5) == (word == "left")]
    elif word == "shape" and before in _EXTREMES:
        axis, sign = _EXTREMES[before]
        found = sorted(found, key=lambda t: sign * (t.x, t.y)[axis])[:1]
    else:
        return None
    if not found:
        return NOWHERE, NOWHERE
    return (int(found[0].y * GRID), int(found[0].x * GRID)) if len(found) == 1 else None


class SeenPictures(qwen.SeenPictures):
    """Pictures of each kind of ``POOL`` as the frozen tower sees them; mosaics and images also have descriptions."""

    def __init__(self, vision: Any, mean: Tensor, std: Tensor, folder: Path, seed: int) -> None:
        super().__init__(vision, mean, std, folder, seed, POOL)

    def grid(self, kind: str, number: int) -> Grid:
        return GRID, GRID

    @torch.no_grad()
    def _look(self, visual: Any, mean: Tensor, std: Tensor, kind: str, numbers: Sequence[int]) -> list[Tensor]:
        out: list[Tensor] = []
        for start in range(0, len(numbers), 20):
            pictures = [self._picture(kind, number) for number in numbers[start : start + 20]]
            with torch.autocast("cpu", torch.bfloat16):
                out += [t.clone() for t in tower_forward(visual, pixels_of(pictures, mean, std))[0].half()]
        return out

    def get(self, kind: str, number: int) -> Seen:
        row = super().get(kind, number)
        if kind == "mosaics":
            things = self._picture(kind, number).things
            sentence = mosaics.make_scene(self._rng(number), "train").description()
        elif kind == "single":
            tile = self.tiles[number]
            things = single_picture(tile, ()).things
            sentence = mosaics.single_description(tile.color, tile.shape)
            row = replace(row, questions=(*row.questions, Question("count", "how many shapes are there?", "one")))
        else:
            things = scene_things(self._scene(kind, number), seed=self.seed)
            return Seen(row.tokens, row.grid, row.questions, row.centres, things)
        described = [Question("describe", text, sentence) for text in mosaics.DESCRIBE]
        return Seen(row.tokens, row.grid, (*row.questions, *described), row.centres, things)


class Conversations:
    """Tokenizes questions and packs several conversations behind one picture."""

    def __init__(self) -> None:
        self.tokenizer = build_processor().tokenizer
        self.before = self.tokenizer("USER:").input_ids
        self.image, self.end = self.tokenizer.convert_tokens_to_ids(["<image>", "</s>"])
        self.ids = functools.cache(self.ids)  # type: ignore[method-assign]
        self.words = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def turn(self, question: Question, rng: random.Random, *, first: bool) -> tuple[list[int], list[float]]:
        """(ids of question and answer, weight of each as a target)."""
        text = question.text
        if question.kind != "describe" and rng.random() < SUFFIX_SHARE:
            suffix = SHORT_ANSWER if rng.random() < 0.5 else SHORT_ANSWER.removesuffix(".") + " or phrase."
            text = f"{text}\n{suffix}"
        asked = self.ids(f"{text} ASSISTANT:" if first else f"USER: {text} ASSISTANT:")
        answer = self.ids(question.answer)
        share = (DESCRIBE_WEIGHT if question.kind == "describe" else 1.0) / len(answer)
        return [*asked, *answer, self.end], [0.0] * len(asked) + [share] * len(answer) + [EOS_WEIGHT]

    def choose(self, questions: Sequence[Question], rng: random.Random) -> list[list[Question]]:
        """The turns of each conversation."""
        chosen = qwen.choose(questions, rng, OFTEN)
        out: list[list[Question]] = []
        for question in chosen:
            if out and rng.random() < SECOND_TURN:
                out[-1] = [out[-1][0], question]
            else:
                out.append([question])
        return out

    def pack(
        self, rows: Sequence[Seen], rng: random.Random, kept: Sequence[Sequence[int] | None] | None = None
    ) -> dict[str, Tensor]:
        """``padded_batch`` of the rows; ``kept``: the visual tokens that stand in each, None for all.

        And ``named`` [B, L, 2]: at the words of questions that end a name, ``named_place``; -100 elsewhere.
        """
        packed, named = [], []
        for row, stay in zip(rows, kept or [None] * len(rows), strict=True):
            start, behind = len(self.before), len(self.before) + len(row.tokens)
            visual = range(len(row.tokens)) if stay is None else stay
            ids = self.before + [self.image] * len(visual)
            places = [*range(start), *(start + i for i in visual)]
            branch, weight, early = [0] * len(ids), [0.0] * len(ids), [-100] * len(ids)
            places_of: list[tuple[int, int]] = [(-100, -100)] * len(ids)
            for number, turns in enumerate(self.choose(row.questions, rng), start=1):
                at = behind
                for index, question in enumerate(turns):
                    tokens, weights = self.turn(question, rng, first=index == 0)
                    ids += tokens
                    weight += weights
                    asked = weights.count(0.0)
                    words = [self.words[token] for token in tokens[:asked]]
                    found = [named_place(words, i, row.things) for i in range(asked)]
                    places_of += [(-100, -100) if f is None else f for f in found]
                    places_of += [(-100, -100)] * (len(tokens) - asked)
                    early += [tokens[asked]] * asked + [-100] * (len(tokens) - asked)
                    branch += [number] * len(tokens)
                    places += range(at, at + len(tokens))
                    at += len(tokens)
            packed.append(Row(ids, branch, places, weight, early))
            named.append(places_of)
        batch = padded_batch(packed, pad=self.tokenizer.pad_token_id, nowhere=0)
        length = batch["input_ids"].shape[1]
        padded = [values + [(-100, -100)] * (length - len(values)) for values in named]
        return {**batch, "named": torch.tensor(padded)}


def falling(at: float, between: tuple[float, float]) -> float:
    """1 before, 0 behind, linear between."""
    return min(1.0, max(0.0, (between[1] - at) / (between[1] - between[0])))


def kept_tokens(row: Seen, kind: str, mode: str, rng: random.Random) -> list[int] | None:
    if mode == "all":
        return None
    if mode == "few":
        return few_tokens(row, rng)
    sure = row.centres if kind == "scenes" else ()
    others = [i for i in range(len(row.tokens)) if i not in sure]
    return sorted({*sure, *rng.sample(others, SOME - len(sure))})


def language_step(
    model: Any,
    heads: Heads,
    seen: SeenPictures,
    packer: Conversations,
    step: int,
    steps: int,
    seed: int,
) -> tuple[Tensor, str]:
    """The loss of one step of ``steps``; its pictures and questions follow from the seed and the step's number."""
    rng = random.Random(f"tiny-llava-language-{seed}-{step}")
    drawn = [(kind, rng.randrange(seen.sizes[kind])) for kind, n in BATCH.items() for _ in range(n)]
    rows = [seen.get(kind, number) for kind, number in drawn]
    some = max(SOME_LAST, falling(step / steps, SOME_UNTIL))
    few = rng.random() < falling(step / steps, FEW_UNTIL)
    mode = "few" if few else "some" if rng.random() < some else "all"
    kept = [kept_tokens(row, kind, mode, rng) for row, (kind, _) in zip(rows, drawn, strict=True)]
    batch = packer.pack(rows, rng, kept)
    tokens = torch.cat(
        [r.tokens.float() if k is None else r.tokens[k].float() for r, k in zip(rows, kept, strict=True)]
    )
    is_image, is_asked = batch["input_ids"] == packer.image, batch["early"] != -100
    is_name = batch["named"][..., 0] != -100
    with torch.autocast("cpu", torch.bfloat16):
        visual = model.model.multi_modal_projector(tokens)
        embeds = model.get_input_embeddings()(batch["input_ids"]).to(visual.dtype)
        embeds = embeds.masked_scatter(is_image[..., None], visual)
        final, after = text_forward(model.model.language_model, embeds, batch["mask"], batch["position_ids"])
        places = heads.place(after[PLACE_LAYER][is_image]).float().chunk(2, -1)
        early = heads.answer(after[EARLY_LAYER][is_asked]).float()
        named = heads.named(after[NAMED_LAYER][is_name]).float().chunk(2, -1)
    labels = batch["labels"][:, 1:]
    answered = labels != -100
    logits = model.lm_head(final[:, :-1][answered].float())
    weight = batch["weight"][:, 1:][answered]
    loss = (F.cross_entropy(logits, labels[answered], reduction="none") * weight).sum() / weight.sum()
    where = batch["position_ids"][is_image] - len(packer.before)
    place_loss = F.cross_entropy(places[0], where // GRID) + F.cross_entropy(places[1], where % GRID)
    early_loss = F.cross_entropy(early, batch["early"][is_asked])
    truth = batch["named"][is_name]
    named_loss = F.cross_entropy(named[0], truth[:, 0]) + F.cross_entropy(named[1], truth[:, 1])
    found = ((named[0].argmax(-1) - truth[:, 0]).abs() <= 1) & ((named[1].argmax(-1) - truth[:, 1]).abs() <= 1)
    content = labels[answered] != packer.end
    right = (logits.argmax(-1) == labels[answered])[content]
    # Rows stand in the order of BATCH: scenes first.
    of_scene = (torch.arange(len(rows)) < BATCH["scenes"])[:, None].expand_as(labels)[answered][content]
    hits = f"answers {right.float().mean():.3f} scenes {right[of_scene].float().mean():.3f}"
    total = loss + PLACE_WEIGHT * place_loss + EARLY_WEIGHT * early_loss + NAMED_WEIGHT * named_loss
    near = found.float().mean()
    return total, f"{hits} early {early_loss.item():.3f} place {place_loss.item():.3f} named {near:.3f} {mode}"
