"""Put questions to a model in batches and score the answers by exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmeff.evaluation.mosaics import COLORS, SHAPES, easy_vqa_images, easy_vqa_questions, make_scene, named_objects


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one picture ([h, w, 3] uint8). ``kind`` names the group it is scored in."""

    pixels: np.ndarray
    question: str
    answer: str
    kind: str


def easy_vqa_items(
    *, kinds: Sequence[str] = ("color", "shape"), limit: int | None = None, grey: bool = False
) -> list[Item]:
    """Questions of easy-vqa's test split. Kinds: color and shape (together the *open* questions), yesno.

    ``grey`` replaces every picture by mid-grey: what a blind model gets. ``limit`` takes that many, evenly spread.
    """
    images = easy_vqa_images("test")
    blank = np.full((64, 64, 3), 128, np.uint8)
    items = []
    for image_id, question, answer in easy_vqa_questions("test"):
        kind = "color" if answer in COLORS else "shape" if answer in SHAPES else "yesno"
        if kind in kinds:
            items.append(Item(blank if grey else images[image_id], question, answer, kind))
    return items if limit is None else [items[i * len(items) // limit] for i in range(limit)]


def mosaic_items(scenes: int, *, kinds: Sequence[str] = ("position",), per_scene: int = 2, seed: int = 0) -> list[Item]:
    """Questions about ``scenes`` mosaics of test images, ``per_scene`` drawn from each kind."""
    import random

    items = []
    for number in range(scenes):
        rng = random.Random(f"mosaic-{seed}-{number}")
        scene = make_scene(rng, "test")
        pixels, questions = scene.pixels(), scene.questions()
        for kind in kinds:
            of_kind = [q for q in questions if q.kind == kind]
            for q in rng.sample(of_kind, min(per_scene, len(of_kind))):
                items.append(Item(pixels, q.text, q.answer, kind))
    return items


def blind_answers() -> dict[str, str]:
    """What a model that never sees a picture should answer: the most frequent training answer of each question.

    Of equally frequent ones the first in the data's order; two questions have such answers.
    """
    counts: dict[str, Counter[str]] = {}
    for _, question, answer in easy_vqa_questions("train"):
        counts.setdefault(question, Counter())[answer] += 1
    return {question: by_answer.most_common(1)[0][0] for question, by_answer in counts.items()}


def blind_prior(items: Sequence[Item]) -> float:
    """Exact match of a model that never sees a picture (``blind_answers``)."""
    best = blind_answers()
    return sum(best.get(item.question) == item.answer for item in items) / len(items)


def ask_items(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    max_new_tokens: int = 4,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[str]:
    """The greedy answer to each item, in order."""
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}],
                add_generation_prompt=True,
            )
            for item in batch
        ]
        pictures = [[Image.fromarray(item.pixels)] for item in batch]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        yield from processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        progress(len(batch))


def is_right(item: Item, answer: str) -> bool:
    """Exact match after lower-casing and stripping one full stop; single-word answers compare the first word."""
    given = answer.strip().lower().removesuffix(".").strip()
    if " " not in item.answer:
        given = given.split(" ")[0] if given else ""
    return given == item.answer.lower().removesuffix(".")


def objects_right(item: Item, answer: str) -> tuple[int, int]:
    """(objects of the reference that the answer names rightly, objects of the reference)."""
    truth = named_objects(item.answer)
    return len(truth & named_objects(answer)), len(truth)
