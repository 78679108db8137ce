"""What KV retention costs on tiny-llava: perplexity of descriptions and second-turn accuracy over the share kept.

    python benchmarks/kv_quality.py --out benchmarks/results/kv_quality.json

One document is a mosaic of test images with the prompt "describe the picture." and its reference description. The
prompt goes through once and is evicted from; then the whole continuation goes through the retained cache in one causal
pass, which equals token by token. Scored are

* ``perplexity``: of the reference, its first token excluded, which is predicted before anything is evicted;
* ``second_turn``: share of right answers to a question about a place, asked behind the whole reference, which says the
  answer, so that text can be copied;
* ``second_turn_unsaid``: the same behind a reference that leaves the asked object out: only the picture can tell.

Random places are averaged over seeds: the places of one seed are the same for every prompt of a length. Every PrefixKV
is compared with the others document by document; the intervals are over documents, with the seeds as they are. Beside
the JSON a chart is drawn (the same name, .png). The file is written after every setting; a second run skips what is
there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import hashlib
import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from rich.progress import Progress
from torch import Tensor

import vlmeff
from kvcache.policy import policies
from vlmeff.evaluation.questions import Item, is_right, mosaic_items
from vlmeff.loading import embedded_folder

KEEP_RATIOS = (0.05, 0.1, 0.3, 0.5, 1.0)
SEEDS = (0, 1, 2, 3, 4)
# Name of a curve -> (policy, arguments, seeds). "paper ends" are the one first and one last token that the paper's
# evaluation protects; "random with ends" is chance with the first and last tokens that PrefixKV protects by default.
CURVES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "prefixkv": ("prefixkv", {}, ()),
    "prefixkv mean": ("prefixkv", {"metric": "mean"}, ()),
    "prefixkv window 8": ("prefixkv", {"metric": "window", "window": 8}, ()),
    "prefixkv window 32": ("prefixkv", {"metric": "window", "window": 32}, ()),
    "prefixkv paper ends": ("prefixkv", {"sink": 1, "recent": 1}, ()),
    "snapkv": ("snapkv", {}, ()),
    "snapkv window 8": ("snapkv", {"window": 8}, ()),
    "streaming_llm": ("streaming_llm", {}, ()),
    "random": ("random", {}, SEEDS),
    "random with ends": ("random", {"sink": 4, "recent": 8}, SEEDS),
}
OURS = tuple(curve for curve, (policy, _, _) in CURVES.items() if policy == "prefixkv")
AGAINST = ("random", "random with ends", "streaming_llm", "snapkv window 8", "prefixkv")
TURNS = ("second_turn", "second_turn_unsaid")
RESAMPLES = 10_000
BATCH = 16


@dataclass(frozen=True, eq=False)
class Batch:
    """``inputs`` of the prompts, left-padded, as embeddings with the pictures in them; continuations as token ids."""

    inputs: dict[str, Tensor]
    answers: list[list[int]]
    said: list[list[int]]  # the answer, its end, the question of the second turn
    unsaid: list[list[int]]
    questions: list[Item]


def documents(count: int) -> list[tuple[Item, Item]]:
    """(describe, position) items about the same mosaic."""
    items = mosaic_items(count, kinds=("describe", "position"), per_scene=1)
    return list(zip(items[::2], items[1::2], strict=True))


def without(description: str, question: str) -> str:
    """The description without the object at the place that the question asks about."""
    match = re.search(r"in the (.*)\?", question)
    assert match is not None
    rest = [part for part in description.removesuffix(".").split(", ") if not part.endswith(match[1])]
    return ", ".join(rest) + "."


@torch.no_grad()
def embedded(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts behind the vision tower, which no setting changes."""
    caught: list[Tensor] = []
    text_model = model.model.language_model
    handle = text_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs, use_cache=False, logits_to_keep=1)
    handle.remove()
    return {"inputs_embeds": caught[0], "attention_mask": inputs["attention_mask"]}


def make_batches(model: Any, processor: Any, pairs: Sequence[tuple[Item, Item]], size: int = BATCH) -> list[Batch]:
    """``model`` unwrapped."""
    end = processor.tokenizer.eos_token

    def tokens(text: str) -> list[int]:
        return list(processor.tokenizer(text, add_special_tokens=False).input_ids)

    out = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}],
                add_generation_prompt=True,
            )
            for item, _ in part
        ]
        pictures = [[Image.fromarray(item.pixels)] for item, _ in part]
        inputs = processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        asked = [tokens(f"{end}USER: {question.question} ASSISTANT:") for _, question in part]
        answers = [tokens(" " + item.answer) for item, _ in part]
        short = [tokens(" " + without(item.answer, question.question)) for item, question in part]
        out.append(
            Batch(
                embedded(model, dict(inputs)),
                answers,
                [a + q for a, q in zip(answers, asked, strict=True)],
                [a + q for a, q in zip(short, asked, strict=True)],
                [question for _, question in part],
            )
        )
    return out


def go_on(model: Any, batch: Batch, cache: Any, rows: list[list[int]]) -> Tensor:
    """Logits [B, longest, vocabulary] of the rows behind the cached prompts.

    Short rows end in fillers, which no real token sees: they come behind it.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(ids)], 1)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return logits


@torch.no_grad()
def score(
    model: Any, processor: Any, batches: Sequence[Batch], *, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """``nll`` [documents] and ``tokens`` (sum and number over the scored tokens), and right answers per document."""
    out: dict[str, list[Any]] = {"nll": [], "tokens": [], "second_turn": [], "second_turn_unsaid": []}
    for batch in batches:
        cache = model(**batch.inputs, use_cache=True, logits_to_keep=1).past_key_values
        for name, rows in zip(TURNS, (batch.said, batch.unsaid), strict=True):
            logits = go_on(model, batch, copy.deepcopy(cache), rows).float()
            for i, (row, question) in enumerate(zip(rows, batch.questions, strict=True)):
                answer = processor.tokenizer.decode([int(logits[i, len(row) - 1].argmax())])
                out[name].append(is_right(question, answer))
            if name == "second_turn":
                for i, answer in enumerate(batch.answers):
                    targets = torch.tensor(answer[1:])
                    losses = -logits[i, : len(targets)].log_softmax(-1)[range(len(targets)), targets]
                    out["nll"].append(float(losses.double().sum()))
                    out["tokens"].append(len(targets))
        progress(len(batch.questions))
    return out


def merged(runs: list[dict[str, Any]], *, keep_documents: bool) -> dict[str, Any]:
    """The figures of one setting: of one run, or the mean over seeds (of NLLs, not of perplexities).

    Per document: ``document_nll``, and ``document_second_turn`` (``_unsaid``), one digit each: the runs that are right.
    """
    nll = torch.tensor([run["nll"] for run in runs], dtype=torch.float64)
    tokens = torch.tensor(runs[0]["tokens"])
    mean = nll.mean(0)
    out: dict[str, Any] = {
        "mean_nll": round(float(mean.sum() / tokens.sum()), 6),
        "perplexity": round(math.exp(float(mean.sum() / tokens.sum())), 5),
    }
    right = {name: torch.tensor([run[name] for run in runs]).long().sum(0) for name in TURNS}
    for name in TURNS:
        out[name] = round(float(right[name].double().mean()) / len(runs), 4)
    if len(runs) > 1:
        out["perplexity_of_seeds"] = [round(math.exp(float(n.sum() / tokens.sum())), 5) for n in nll]
        for name in TURNS:
            out[f"{name}_of_seeds"] = [round(sum(run[name]) / len(run[name]), 4) for run in runs]
    if keep_documents:
        out["document_nll"] = [round(float(n), 4) for n in mean / tokens]
        for name in TURNS:
            out[f"document_{name}"] = "".join(map(str, right[name].tolist()))
    return out


def settings() -> Iterator[tuple[str, float, list[Any]]]:
    """(curve, keep_ratio, one policy per seed)."""
    for keep_ratio in KEEP_RATIOS:
        for curve, (name, arguments, seeds) in CURVES.items():
            if keep_ratio == 1.0 and arguments:
                continue  # everything is kept whatever the arguments: one run of each policy shows it
            kind: Any = policies.get(name)
            seeded: list[dict[str, int]] = [{"seed": seed} for seed in seeds] or [{}]
            seeded = seeded[:1] if keep_ratio == 1.0 else seeded
            yield curve, keep_ratio, [kind(keep_ratio=keep_ratio, **arguments, **seed) for seed in seeded]


@functools.cache
def resampling(count: int, seed: int) -> Tensor:
    """[RESAMPLES, count] float64: the share of each document in each sample drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    shares = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return shares.scatter_add_(1, drawn, torch.full_like(shares, 1 / count))


def interval(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Mean of a - b over documents, with the 95 % interval of a paired percentile bootstrap."""
    difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    means = resampling(len(difference), seed) @ difference
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": round(float(difference.mean()), 5), "interval_95": [round(low, 5), round(high, 5)]}


def per_document(result: dict[str, Any], measure: str) -> list[float]:
    """``measure`` of each document: its mean NLL per token, or the share of the runs that answer right."""
    if measure == "nll":
        return list(result["document_nll"])
    return [int(digit) / result["runs"] for digit in result[f"document_{measure}"]]


def comparisons(results: dict[str, Any]) -> dict[str, Any]:
    """measure -> "a - b" -> keep_ratio -> interval, a any PrefixKV. Better is below 0 in NLL, above 0 in a turn."""
    out: dict[str, Any] = {}
    for measure in ("nll", *TURNS):
        for ours, other in itertools.product(OURS, AGAINST):
            for keep_ratio in KEEP_RATIOS[:-1]:
                pair = [results.get(label(curve, keep_ratio)) for curve in (ours, other)]
                if ours == other or pair[0] is None or pair[1] is None:
                    continue
                found = out.setdefault(measure, {}).setdefault(f"{ours} - {other}", {})
                found[str(keep_ratio)] = interval(*(per_document(result, measure) for result in pair if result))
    return out


def label(curve: str, keep_ratio: float) -> str:
    return f"{curve} {keep_ratio}"


# Hues of Okabe and Ito; PrefixKV in blues and black, disks; the others in warm hues, squares.
COLORS = dict(
    zip(
        CURVES,
        ("#000000", "#0072b2", "#56b4e9", "#9ad0f0", "#888888", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#7a3b5e"),
        strict=True,
    )
)
PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, SIZE = 640, 520, 70, 20, 120, 50, 14
INK, GRID = (20, 20, 20), (222, 222, 222)


def draw(results: dict[str, Any], *, title: str) -> Image.Image:
    """Mean NLL and second-turn accuracy over keep_ratio, side by side."""
    image = Image.new("RGB", (2 * PANEL, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.text((PANEL, 16), title, fill=INK, font_size=SIZE + 1, anchor="mm")
    for number, (curve, color) in enumerate(COLORS.items()):
        x, y = LEFT + number % 5 * 240, 44 + number // 5 * 22
        pen.line([(x, y), (x + 24, y)], fill=color, width=3)
        mark(pen, (x + 12, y), color, disk=curve in OURS)
        pen.text((x + 32, y), curve, fill=INK, font_size=SIZE, anchor="lm")
    panel(pen, results, "mean_nll", "mean NLL per token of the description", left=LEFT, log=True)
    panel(pen, results, TURNS[1], "second turn, object unsaid: share right", left=PANEL + LEFT, log=False)
    return image


def panel(pen: ImageDraw.ImageDraw, results: dict[str, Any], measure: str, title: str, *, left: int, log: bool) -> None:
    """One line per curve over the logarithm of keep_ratio; everything kept is the unwrapped model's point."""
    lines = {
        curve: [(r, results[label(curve, r)][measure]) for r in KEEP_RATIOS[:-1] if label(curve, r) in results]
        + [(KEEP_RATIOS[-1], results["unwrapped"][measure])]
        for curve in CURVES
    }
    values = [y for line in lines.values() for _, y in line]
    scale: Callable[[float], float] = math.log if log else float
    low, high = (scale(min(values) * 0.9), scale(max(values) * 1.1)) if log else (0.0, 1.0)
    first, last = math.log(KEEP_RATIOS[0]), math.log(KEEP_RATIOS[-1])
    right, bottom = left + PANEL - LEFT - RIGHT, HEIGHT - BOTTOM

    def place(x: float, height: float) -> tuple[int, int]:
        across, up = (math.log(x) - first) / (last - first), (height - low) / (high - low)
        return round(left + across * (right - left)), round(bottom - up * (bottom - TOP))

    pen.text(((left + right) // 2, TOP - 16), title, fill=INK, font_size=SIZE, anchor="mm")
    for number in range(6):
        height = low + number * (high - low) / 5
        pen.line([place(KEEP_RATIOS[0], height), place(KEEP_RATIOS[-1], height)], fill=GRID)
        text = f"{math.exp(height) if log else height:.2g}"
        pen.text((left - 8, place(KEEP_RATIOS[0], height)[1]), text, fill=INK, font_size=SIZE, anchor="rm")
    for x in KEEP_RATIOS:
        pen.text((place(x, low)[0], bottom + 10), f"{x:g}", fill=INK, font_size=SIZE, anchor="mt")
    about = "share of the prompt's entries kept"
    pen.text(((left + right) // 2, HEIGHT - 8), about, fill=INK, font_size=SIZE, anchor="mb")
    for curve, line in lines.items():
        points = [place(x, scale(y)) for x, y in line]
        pen.line(points, fill=COLORS[curve], width=2)
        for point in points:
            mark(pen, point, COLORS[curve], disk=curve in OURS)


def mark(pen: ImageDraw.ImageDraw, point: tuple[int, int], color: str, *, disk: bool) -> None:
    box = (point[0] - 4, point[1] - 4, point[0] + 4, point[1] + 4)
    (pen.ellipse if disk else pen.rectangle)(box, fill=color)


def write(out: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2)
    # Lists of numbers on one line, and intervals.
    text = re.sub(r"\[[-\d.,e\s]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
    text = re.sub(r'\{\s+("mean": [^{}]+?)\s+\}', lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=500)
    args = parser.parse_args()

    model, processor = vlmeff.load("tiny-llava")
    weights = (embedded_folder("tiny_llava") / "model.safetensors").read_bytes()
    header = {
        "model": "tiny-llava",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "documents": args.documents,
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    results: dict[str, Any] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if all(before.get(k) == header[k] for k in ("weights_sha256", "documents")):
            results = before["settings"]
    batches = make_batches(model, processor, documents(args.documents))
    with Progress() as bar:

        def run(name: str) -> dict[str, Any]:
            task = bar.add_task(name, total=args.documents)
            return score(model, processor, batches, progress=lambda n: bar.advance(task, n))

        if "unwrapped" not in results:
            results["unwrapped"] = merged([run("unwrapped")], keep_documents=False)
        for curve, keep_ratio, seeded in settings():
            name = label(curve, keep_ratio)
            policy_name, arguments, _ = CURVES[curve]
            setting = {"policy": policy_name, "arguments": arguments, "keep_ratio": keep_ratio, "runs": len(seeded)}
            if results.get(name, {}).items() >= setting.items():
                continue
            runs = []
            for policy in seeded:
                vlmeff.wrap(model, None, kv=policy)
                runs.append(run(name))
            retention = vlmeff.report(model).retention
            kept = None if retention is None else retention.keep_ratio  # of the last document
            vlmeff.unwrap(model)
            results[name] = {
                **setting,
                "kept": None if kept is None else round(kept, 4),
                **merged(runs, keep_documents=keep_ratio < 1.0),
            }
            write(args.out, {**header, "settings": results})
    write(args.out, {**header, "comparisons": comparisons(results), "settings": results})
    draw(results, title=f"tiny-llava, {args.documents} documents").save(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
