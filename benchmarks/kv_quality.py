"""What KV retention costs on tiny-llava: perplexity of descriptions and second-turn accuracy over the share kept.

    python benchmarks/kv_quality.py --out benchmarks/results/kv_quality.json

One document is a mosaic of test images with the prompt "describe the picture." and its reference description. The
prompt goes through once and is evicted from; then the whole continuation goes through the retained cache in one causal
pass, which equals token by token. Scored are

* ``perplexity``: of the reference, its first token excluded, which is predicted before anything is evicted;
* ``second_turn``: share of right answers to a question about a place, asked behind the whole reference, which says the
  answer, so that text can be copied;
* ``second_turn_unsaid``: the same behind a reference that leaves the asked object out: only the picture can tell.

Random places are averaged over seeds: the places of one seed are the same for every prompt of a length. Beside the
JSON a chart is drawn (the same name, .png). The file is written after every setting; a second run skips what is there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
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
# Name of a curve -> (policy, arguments, seeds). The last is chance with PrefixKV's own protected first and last tokens,
# at the ratios that are compared only.
CURVES: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {
    "prefixkv": ("prefixkv", {}, (0,)),
    "snapkv": ("snapkv", {}, (0,)),
    "streaming_llm": ("streaming_llm", {}, (0,)),
    "random": ("random", {}, (0, 1, 2)),
    "random with ends": ("random", {"sink": 4, "recent": 8}, (0,)),
}
PAIRED_RATIOS = (0.3, 0.5)
AGAINST = ("random", "random with ends", "streaming_llm")
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
        for name, rows in (("second_turn", batch.said), ("second_turn_unsaid", batch.unsaid)):
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
    """The figures of one setting: of one run, or the mean over seeds (of NLLs, not of perplexities)."""
    nll = torch.tensor([run["nll"] for run in runs], dtype=torch.float64)
    tokens = torch.tensor(runs[0]["tokens"])
    mean = nll.mean(0)
    out: dict[str, Any] = {
        "mean_nll": round(float(mean.sum() / tokens.sum()), 6),
        "perplexity": round(math.exp(float(mean.sum() / tokens.sum())), 5),
    }
    for name in ("second_turn", "second_turn_unsaid"):
        out[name] = round(float(torch.tensor([run[name] for run in runs]).double().mean()), 4)
    if len(runs) > 1:
        out["perplexity_of_seeds"] = [round(math.exp(float(n.sum() / tokens.sum())), 5) for n in nll]
    if keep_documents:
        out["document_nll"] = [round(float(n), 5) for n in mean / tokens]
    return out


def settings() -> Iterator[tuple[str, float, list[Any]]]:
    """(curve, keep_ratio, one policy per seed)."""
    for keep_ratio in sorted(KEEP_RATIOS, key=lambda r: (r not in PAIRED_RATIOS, r)):  # what is compared comes first
        for curve, (name, arguments, seeds) in CURVES.items():
            if arguments and keep_ratio not in PAIRED_RATIOS:
                continue
            seeds = seeds[:1] if keep_ratio == 1.0 else seeds
            seeded = [{"seed": seed} if name == "random" else {} for seed in seeds]
            kind: Any = policies.get(name)
            yield curve, keep_ratio, [kind(keep_ratio=keep_ratio, **arguments, **s) for s in seeded]


def interval(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Mean of a - b over documents, with the 95 % interval of a paired percentile bootstrap."""
    difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (RESAMPLES, len(difference)), generator=generator)
    low, high = torch.quantile(difference[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": round(float(difference.mean()), 5), "interval_95": [round(low, 5), round(high, 5)]}


def comparisons(results: dict[str, Any]) -> dict[str, Any]:
    """PrefixKV minus the others in the per-document mean NLL: below zero is better."""
    out = {}
    for keep_ratio in PAIRED_RATIOS:
        for other in AGAINST:
            pair = [results.get(label(curve, keep_ratio), {}).get("document_nll") for curve in ("prefixkv", other)]
            if None not in pair:
                out[f"prefixkv - {other} at {keep_ratio}"] = interval(*pair)
    return out


def label(curve: str, keep_ratio: float) -> str:
    return f"{curve} {keep_ratio}"


COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (120, 120, 120))  # hues of Okabe and Ito
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, SIZE = 760, 420, 70, 20, 70, 50, 14
INK, GRID = (20, 20, 20), (222, 222, 222)


def draw(results: dict[str, Any], *, title: str) -> Image.Image:
    """Mean NLL over keep_ratio, one line per curve; both axes logarithmic."""
    lines = {
        curve: [(r, results[label(curve, r)]["mean_nll"]) for r in KEEP_RATIOS if label(curve, r) in results]
        for curve in CURVES
    }
    values = [y for line in lines.values() for _, y in line]
    low, high = math.log(min(values) * 0.9), math.log(max(values) * 1.1)
    left, right = math.log(KEEP_RATIOS[0]), math.log(KEEP_RATIOS[-1])
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[int, int]:
        across, up = (math.log(x) - left) / (right - left), (math.log(y) - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT)), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))

    pen.text((WIDTH // 2, 16), title, fill=INK, font_size=SIZE, anchor="mm")
    for number in range(6):
        y = math.exp(low + number * (high - low) / 5)
        pen.line([place(KEEP_RATIOS[0], y), place(KEEP_RATIOS[-1], y)], fill=GRID)
        pen.text((LEFT - 8, place(KEEP_RATIOS[0], y)[1]), f"{y:.2g}", fill=INK, font_size=SIZE, anchor="rm")
    for x in KEEP_RATIOS:
        pen.text((place(x, math.exp(low))[0], HEIGHT - BOTTOM + 6), f"{x:g}", fill=INK, font_size=SIZE, anchor="mt")
    pen.text((WIDTH // 2, HEIGHT - 8), "share of the prompt's entries kept", fill=INK, font_size=SIZE, anchor="mb")
    column = LEFT
    for color, (curve, line) in zip(COLORS, lines.items(), strict=True):
        pen.line([(column, 44), (column + 20, 44)], fill=color, width=3)
        pen.text((column + 26, 44), curve, fill=INK, font_size=SIZE, anchor="lm")
        column += 44 + int(pen.textlength(curve, font_size=SIZE))
        points = [place(x, y) for x, y in line]
        pen.line(points, fill=color, width=2)
        for x, y in points:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    return image


def write(out: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2)
    # Lists of numbers on one line.
    text = re.sub(r"\[[-\d.,e\s]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
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
            if name in results:
                continue
            runs = []
            for policy in seeded:
                vlmeff.wrap(model, None, kv=policy)
                runs.append(run(name))
            retention = vlmeff.report(model).retention
            kept = None if retention is None else retention.keep_ratio  # of the last document
            vlmeff.unwrap(model)
            results[name] = {
                "policy": seeded[0].__class__.__name__,
                "keep_ratio": keep_ratio,
                "kept": None if kept is None else round(kept, 4),
                **merged(runs, keep_documents=keep_ratio in PAIRED_RATIOS),
            }
            write(args.out, {**header, "comparisons": comparisons(results), "settings": results})
    title = f"tiny-llava, {args.documents} descriptions: mean NLL per token"
    draw(results, title=title).save(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
