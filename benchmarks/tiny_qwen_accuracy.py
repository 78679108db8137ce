"""Accuracy of tiny-qwen per type of question: all visual tokens, and a third of them by each method and control.

    python benchmarks/tiny_qwen_accuracy.py --out benchmarks/results/tiny_qwen_accuracy.json

Every setting answers the same questions of ``scenes`` (112 px), ``mosaics`` and easy-vqa's open questions. Intervals
are 95 % bootstrap intervals over pictures; ``loss`` is the paired difference to all tokens, in points. ``blank`` is
the unwrapped model on mid-grey pictures, ``question_only`` the most frequent training answer of each question. The
result file is written after every setting; a second run skips what is there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import Progress

import vlmeff
from vlmeff.evaluation import mosaics, scenes
from vlmeff.evaluation.questions import Item, ask_items, easy_vqa_items, is_right
from vlmeff.evaluation.samples import Sample
from vlmeff.evaluation.statistics import bootstrap_mean
from vlmeff.loading import embedded_folder

KEEP = 1 / 3
SEEDS = (0, 1, 2)  # of random: its places are the same in every picture, so one seed says little
HEADLINE = 0.6  # types that all tokens answer worse than this say nothing about pruning
GATE_POINTS, GATE_TYPES = 5.0, 2
TRAIN_PICTURES = 3000  # of which the question-only accuracy is counted


def questions(pictures: int, easy: int) -> dict[str, tuple[list[Item], list[str]]]:
    """{benchmark: (items, group of each)}."""
    out = {}
    for name, samples in (
        ("scenes", list(scenes.samples(pictures, types=[t for t in scenes.TYPES if t != "reading"]))),
        ("mosaics", list(mosaics.samples(pictures // 2))),
    ):
        out[name] = [_item(s) for s in samples], [str(s.group) for s in samples]
    items = easy_vqa_items(limit=easy)
    out["easy_vqa_open"] = items, [hashlib.sha256(i.pixels.tobytes()).hexdigest() for i in items]
    return out


def _item(sample: Sample) -> Item:
    return Item(np.asarray(sample.images[0]()), sample.question, sample.answers[0], str(sample.category))


def blanked(item: Item) -> Item:
    return Item(np.full_like(item.pixels, 128), item.question, item.answer, item.kind)


def scored(values: np.ndarray, groups: Sequence[str], baseline: np.ndarray | None) -> dict[str, Any]:
    """Per cent with its interval, and the loss against ``baseline`` in points."""
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {"n": len(values)}
    for name, data in (("score", values), ("loss", None if baseline is None else baseline - values)):
        if data is not None:
            result = bootstrap_mean(100 * data, groups, rng=rng)
            low, high = result.interval or (result.value, result.value)
            out |= {name: round(result.value, 1), f"{name}_95": [round(low, 1), round(high, 1)]}
    return out


def hits_of(model: Any, processor: Any, items: list[Item], label: str) -> np.ndarray:
    """[n] 1.0 where the answer is right."""
    with Progress() as bar:
        task = bar.add_task(label, total=len(items))
        answers = ask_items(model, processor, items, max_new_tokens=2, progress=lambda n: bar.advance(task, n))
        return np.array([float(is_right(i, a)) for i, a in zip(items, answers, strict=True)])


def settings() -> dict[str, list[dict[str, Any]]]:
    """{setting: arguments of wrap of each of its runs}; their hits are averaged."""
    return {
        "all tokens": [{}],
        "random": [{"tokens": "random", "seed": seed} for seed in SEEDS],
        "downsample": [{"tokens": "downsample"}],
        "hiprune": [{"tokens": "hiprune"}],
        "blank": [{}],
    }


def gate(results: dict[str, Any]) -> dict[str, Any]:
    """Which types are good enough to show, and on how many of them ``random`` loses at least ``GATE_POINTS``."""
    full = results["all tokens"]["scenes"]
    shown = [kind for kind in full if full[kind]["score"] >= 100 * HEADLINE]
    lost = [kind for kind in shown if results["random"]["scenes"][kind]["loss"] >= GATE_POINTS]
    return {
        "headline_types": shown,
        "below_60": [kind for kind in full if kind not in shown],
        "types_random_loses_5_points": lost,
        "passed": len(lost) >= GATE_TYPES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny-qwen", help="zoo name or folder")
    parser.add_argument("--pictures", type=int, default=200, help="scenes; half as many mosaics")
    parser.add_argument("--easy", type=int, default=300, help="open questions of easy-vqa")
    args = parser.parse_args()

    model, processor = vlmeff.load(args.model)
    folder = Path(args.model) if Path(args.model).is_dir() else embedded_folder("tiny_qwen")
    asked = questions(args.pictures, args.easy)
    prior = scenes.question_only_accuracy(scenes.samples(TRAIN_PICTURES, split="train"), scenes.samples(args.pictures))
    header = {
        "model": "tiny-qwen",
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "pictures": args.pictures,
        "easy": args.easy,
        "keep": round(KEEP, 4),
        "random_seeds": list(SEEDS),
        "question_only": {kind: round(100 * value, 1) for kind, value in prior.items()},
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    results: dict[str, Any] = {}
    hits: dict[str, dict[str, list[float]]] = {}
    kept = args.out.with_suffix(".hits.json")  # what the intervals are computed from; not committed
    if kept.exists() and args.out.exists():
        before = json.loads(args.out.read_text())
        if all(before.get(k) == header[k] for k in ("weights_sha256", "pictures", "easy")):
            hits, results = json.loads(kept.read_text()), before["settings"]
    for label, runs in settings().items():
        if label in results:
            continue
        results[label], hits[label] = {}, {}
        for arguments in runs:
            if arguments:
                vlmeff.wrap(model, preset=None, keep=KEEP, **arguments)
            for name, (items, _) in asked.items():
                shown = [blanked(i) for i in items] if label == "blank" else items
                got = hits_of(model, processor, shown, f"{label} {arguments.get('seed', '')} {name}")
                old = hits[label].get(name)
                hits[label][name] = got.tolist() if old is None else (np.array(old) + got).tolist()
                if arguments:
                    report = vlmeff.report(model)
                    visual = report.visual_tokens_before // report.rows, report.visual_tokens_after // report.rows
                    results[label].setdefault("tokens", {})[name] = dict(zip(("in", "kept"), visual, strict=True))
            if arguments:
                vlmeff.unwrap(model)
        for name, (items, groups) in asked.items():
            hits[label][name] = [h / len(runs) for h in hits[label][name]]
            kinds = list(dict.fromkeys(i.kind for i in items))
            results[label][name] = {}
            for kind in kinds:
                at = [i for i, item in enumerate(items) if item.kind == kind]
                values = np.array(hits[label][name])[at]
                base = None if label == "all tokens" else np.array(hits["all tokens"][name])[at]
                results[label][name][kind] = scored(values, [groups[i] for i in at], base)
        out: dict[str, Any] = {**header, "settings": results}
        if {"all tokens", "random"} <= results.keys():
            out["gate"] = gate(results)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(out, indent=2) + "\n")
        kept.write_text(json.dumps(hits))
    kept.unlink()


if __name__ == "__main__":
    main()
