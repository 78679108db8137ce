"""The benchmark's questions as ``Sample``."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator

from vlmeff.errors import ConfigError
from vlmeff.evaluation.samples import Sample
from vlmeff.evaluation.scenes.composition import Split, compose
from vlmeff.evaluation.scenes.drawing import draw
from vlmeff.evaluation.scenes.questions import TYPES, ask


def samples(
    pictures: int,
    *,
    split: Split = "test",
    size: int = 112,
    seed: int = 0,
    types: Collection[str] = TYPES,
    start: int = 0,
) -> Iterator[Sample]:
    """Up to nine questions about each of ``pictures`` pictures, from number ``start`` on.

    ``group`` is the picture, ``category`` the type of the question, ``meta`` its form and the picture's seed.

    Raises:
        ConfigError: a type, the split or the size does not exist.
    """
    unknown = sorted(set(types) - set(TYPES))
    if unknown:
        raise ConfigError(f"scenes: types={unknown} do not exist. Use some of {', '.join(TYPES)}.")
    for index in range(start, start + pictures):
        scene = compose(index, split=split, size=size, seed=seed)
        image = functools.partial(draw, scene)
        for number, question in enumerate(ask(scene)):
            if question.type in types:
                yield Sample(
                    doc_id=f"{scene.name}/{number}",
                    images=(image,),
                    question=question.text,
                    answers=(question.answer,),
                    group=scene.name,
                    category=question.type,
                    split=split,
                    meta={"form": question.form, "size": size, "seed": seed, "index": index},
                )
