"""Accuracy of tiny-llava unwrapped, with each preset and with the control methods at the same budget.

    python benchmarks/tiny_llava_accuracy.py --out benchmarks/results/tiny_llava_accuracy.json

The unwrapped model answers every open question of easy-vqa's test split; every other setting answers the same evenly
spread part of them (``--limit``, for which the unwrapped model's score stands beside: ``open_part``), and all answer
the same questions about mosaics of test images and about ``scenes`` (``--pictures`` of them; the unwrapped model three
times as many, ``scenes_part`` are those of the others; the types that it answers below 60 % say nothing about pruning).
The result file is written after every setting; a second run skips what is there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import Progress

import vlmeff
from tokenpruning import methods
from vlmeff.evaluation import scenes
from vlmeff.evaluation.questions import (
    Item,
    ask_items,
    blind_prior,
    easy_vqa_items,
    is_right,
    mosaic_items,
    objects_right,
)
from vlmeff.loading import embedded_folder
from vlmeff.vlm.wrapped import STATE

TRAIN_PICTURES = 3000
PRESETS = ("quality", "balanced", "fast", "smallest")
RANDOM_SEEDS = {"fast": (0, 1, 2)}  # one seed for the other presets
# Other methods at the budgets of two presets: 108 and 36 of 324 tokens (Fourier: the nearest square).
METHODS: dict[str, tuple[Any, ...]] = {
    "fast": ("hiprune++", "text", "divprune", "scope", "visionzip", vlmeff.Fourier(side=10)),
    "smallest": ("hiprune++", "divprune", "scope", "visionzip", vlmeff.Fourier(side=6)),
}


def scene_items(pictures: int) -> list[Item]:
    """The questions of the benchmark ``scenes`` but reading, which the model was not trained for."""
    types = [name for name in scenes.TYPES if name != "reading"]
    return [
        Item(np.asarray(s.images[0]()), s.question, s.answers[0], str(s.category))
        for s in scenes.samples(pictures, types=types)
    ]


def question_only(pictures: int) -> dict[str, float]:
    """Per type of scenes: right answers of the most frequent training answer of each question."""
    return scenes.question_only_accuracy(scenes.samples(TRAIN_PICTURES, split="train"), scenes.samples(pictures))


def share(items: list[Item], answers: list[str], kind: str) -> float:
    hits = [is_right(i, a) for i, a in zip(items, answers, strict=True) if i.kind == kind]
    return round(sum(hits) / len(hits), 4)


def measure(model: Any, processor: Any, args: argparse.Namespace, label: str, *, full: bool = False) -> dict[str, Any]:
    """All scores of one setting. ``full`` takes every open question, adds yes/no questions and the grey control."""
    open_items = easy_vqa_items(limit=None if full else args.limit)
    mosaics = mosaic_items(args.scenes, kinds=("position",), per_scene=2)
    describe = mosaic_items(args.scenes, kinds=("describe",), per_scene=1)
    drawn = scene_items(3 * args.pictures if full else args.pictures)
    parts = [("open", open_items, 3), ("position", mosaics, 3), ("describe", describe, 30), ("scenes", drawn, 2)]
    if full:
        others = mosaic_items(
            args.scenes, kinds=("where", "count", "exists", "occupied", "position_object"), per_scene=1
        )
        parts += [
            ("yesno", easy_vqa_items(kinds=("yesno",), limit=args.limit), 3),
            ("grey", easy_vqa_items(limit=args.limit, grey=True), 3),
            ("others", others, 4),
        ]
    out: dict[str, Any] = {}
    with Progress() as bar:
        for name, items, length in parts:
            task = bar.add_task(f"{label}: {name}", total=len(items))
            answers = list(
                ask_items(model, processor, items, max_new_tokens=length, progress=lambda n, t=task: bar.advance(t, n))
            )
            if name in ("open", "grey"):
                hits = [is_right(i, a) for i, a in zip(items, answers, strict=True)]
                out[name] = {
                    "n": len(items),
                    "open": round(sum(hits) / len(hits), 4),
                    "color": share(items, answers, "color"),
                    "shape": share(items, answers, "shape"),
                }
                if full and name == "open":
                    part = [hits[i * len(hits) // args.limit] for i in range(args.limit)]
                    out["open_part"] = {"n": len(part), "open": round(sum(part) / len(part), 4)}
            elif name == "describe":
                pairs = [objects_right(i, a) for i, a in zip(items, answers, strict=True)]
                exact = [is_right(i, a) for i, a in zip(items, answers, strict=True)]
                objects = sum(t for _, t in pairs)
                out[name] = {
                    "n": len(items),
                    "objects_right": round(sum(r for r, _ in pairs) / objects, 4),
                    "sentences_right": round(sum(exact) / len(exact), 4),
                }
            else:
                kinds = sorted({i.kind for i in items})
                out[name] = {"n": len(items), **{kind: share(items, answers, kind) for kind in kinds}}
                if full and name == "scenes":
                    out["below_60"] = [kind for kind in kinds if out[name][kind] < 0.6]
                    n = len(scene_items(args.pictures))
                    out["scenes_part"] = {"n": n, **{kind: share(items[:n], answers[:n], kind) for kind in kinds}}
    return out


def settings() -> list[tuple[str, dict[str, Any]]]:
    """(label, arguments of wrap); the control methods take the preset's own budget."""
    out: list[tuple[str, dict[str, Any]]] = [("unwrapped", {})]
    for preset in PRESETS:
        out.append((preset, {"preset": preset}))
        for seed in RANDOM_SEEDS.get(preset, (0,)):
            out.append((f"{preset}, random {seed}", {"preset": preset, "tokens": "random", "seed": seed}))
        out.append((f"{preset}, downsample", {"preset": preset, "tokens": "downsample"}))
        for method in METHODS.get(preset, ()):
            name = method if isinstance(method, str) else methods.name_of(method)
            out.append((f"{preset}, {name}", {"preset": preset, "tokens": method}))
    out.append(("adaptinfer", {"preset": None, "tokens": "adaptinfer"}))
    out += [(f"{preset}, repack", {"preset": preset, "positions": "repack"}) for preset in PRESETS]
    # What is compared above are token methods: the presets' KV step is left out of it, and shown by itself here.
    out = [(label, {**arguments, "kv": False} if arguments else {}) for label, arguments in out]
    return out + [(f"{preset}, with KV step", {"preset": preset}) for preset in PRESETS if preset != "quality"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--limit", type=int, default=300, help="open questions of every setting but the unwrapped one")
    parser.add_argument("--scenes", type=int, default=200, help="mosaics")
    parser.add_argument("--pictures", type=int, default=60, help="pictures of the benchmark scenes")
    args = parser.parse_args()

    model, processor = vlmeff.load(args.model)
    folder = Path(args.model) if Path(args.model).is_dir() else embedded_folder("tiny_llava")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    header = {
        "model": "tiny-llava",
        "weights_sha256": weights,
        "limit": args.limit,
        "scenes": args.scenes,
        "pictures": args.pictures,
        "question_only": {kind: round(value, 4) for kind, value in question_only(3 * args.pictures).items()},
        "blind_prior_open": round(blind_prior(easy_vqa_items()), 4),
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    results: dict[str, Any] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if all(before.get(k) == header[k] for k in ("weights_sha256", "limit", "scenes", "pictures")):
            results = before["settings"]
    for label, arguments in settings():
        if label in results:
            continue
        if arguments:
            vlmeff.wrap(model, **arguments)
        scores = measure(model, processor, args, label, full=label == "unwrapped")
        if arguments:
            report, state = vlmeff.report(model), model.__dict__[STATE].plan  # of the last batch: equal pictures
            visual = report.visual_tokens_before, report.visual_tokens_after
            tokens = dict(zip(("in", "kept"), (n // report.rows for n in visual), strict=True))
            if report.visual_tokens_processed is not None:
                tokens["processed"] = round(report.visual_tokens_processed / report.rows, 1)
            vlmeff.unwrap(model)
            results[label] = {
                "method": " + ".join(map(str, state.methods)),
                "positions": state.reduction.positions or "repack",
                "tokens": tokens,
                **scores,
            }
        else:
            results[label] = scores
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**header, "settings": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
