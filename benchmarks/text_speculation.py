"""Text speculation on the shipped models: passes, accepted tokens and wall clock beside plain decoding.

    PYTHONPATH=. python benchmarks/text_speculation.py --out benchmarks/results/text_speculation_cpu.json

Each model describes ``--pictures`` mosaics greedily, in float32, plainly and with every drafter; the settings take
turns picture by picture, and the text must be the same. ``recycling`` keeps what it learned from one picture to the
next, as a wrapped model does. The assistants are copies of the model itself: one sees the picture with a third of its
tokens (an upper bound of what pruning the draft's picture costs in acceptance), which saves passes but no time where
draft and target are of one size. ``layer_skipping`` says what self-speculation would gain: for each layer left out, how
often the rest chooses the same next token (along the plain text), and the best expected speed-up over draft lengths 1
to 8 if a draft pass costs its share of the layers. ``call_costs``: passes of several tokens over passes of one, on a
language model of 12 layers with random weights and 640 tokens in the cache.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import environment
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import vlmeff
from vlmeff.asking import prepare
from vlmeff.evaluation.questions import mosaic_items
from vlmeff.loading import embedded_folder
from vlmeff.speculative.tree import TREE, chain_template

MODELS = ("tiny-llava", "tiny-qwen")
MIDDLE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32064,
}
PAST, WIDTHS = 640, (1, 2, 5, 11, 1 + len(TREE))


def settings(model: Any) -> dict[str, vlmeff.TextSpeculation]:
    reduced = vlmeff.wrap(copy.deepcopy(model), None, tokens=vlmeff.HiPrune(keep=1 / 3))
    drafters = {
        "lookup": vlmeff.Lookup(),
        "recycle, tree": vlmeff.Recycle(),
        "recycle, chain": vlmeff.Recycle(tree=chain_template(5)),
        "assistant: itself with a third of the picture": vlmeff.Assistant(reduced),
    }
    return {name: vlmeff.TextSpeculation(drafter=drafter) for name, drafter in drafters.items()}


def on_shipped(name: str, *, pictures: int, new: int) -> dict[str, Any]:
    model, processor = vlmeff.load(name, dtype=torch.float32)
    items = mosaic_items(pictures, kinds=("describe",), per_scene=1)
    questions = [prepare(processor, Image.fromarray(item.pixels), item.question) for item in items]
    cases: dict[str, Any] = {"plain": None, **settings(model)}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    counts: dict[str, list[Any]] = {case: [] for case in cases}
    texts: list[Any] = []
    model.generate(**questions[0], max_new_tokens=2, do_sample=False)  # what is set up once
    for number, inputs in enumerate(questions):
        names = list(cases)
        shift = number % len(names)
        said = {}
        for case in names[shift:] + names[:shift]:
            if cases[case] is not None:
                vlmeff.wrap(model, None, text_speculation=cases[case])
            gc.collect()
            begun = time.perf_counter()
            said[case] = model.generate(**inputs, max_new_tokens=new, do_sample=False)
            seconds[case].append(time.perf_counter() - begun)
            if cases[case] is not None:
                counts[case].append(vlmeff.report(model).speculation)
                vlmeff.unwrap(model)
        assert all(torch.equal(text, said["plain"]) for text in said.values()), f"{name}: another text"
        texts.append(said["plain"])
    width = [inputs["input_ids"].shape[1] for inputs in questions]
    tokens = sum(text.shape[1] - w for text, w in zip(texts, width, strict=True))
    out: dict[str, Any] = {"plain": {"tokens": tokens, "target_passes": tokens, "tokens_per_pass": 1.0}}
    for case in list(cases)[1:]:
        total = {
            f: sum(getattr(c, f) for c in counts[case]) for f in ("target_passes", "drafted", "accepted", "rounds")
        }
        out[case] = {
            "tokens": tokens,
            **total,
            "tokens_per_pass": round(tokens / total["target_passes"], 3),
            "accept_rate": round(total["accepted"] / max(total["drafted"], 1), 3),
            "draft_share_of_time": round(sum(c.draft_time_s for c in counts[case]) / sum(seconds[case]), 3),
        }
    for case in cases:
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[case], strict=True)]
        out[case] |= {
            "ms_median": round(1000 * statistics.median(seconds[case]), 1),
            "times_faster_median": round(statistics.median(ratios), 3),
        }
    weights = embedded_folder(name.replace("-", "_")) / "model.safetensors"
    return {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "pictures": pictures,
        "prompt_tokens": width[0],
        "mean_new_tokens": round(tokens / pictures, 1),
        "settings": out,
        "layer_skipping": layer_skipping(model, questions, texts),
    }


@torch.no_grad()
def layer_skipping(model: Any, questions: list[Any], texts: list[Any]) -> list[dict[str, Any]]:
    layers = model.model.language_model.layers
    rows = []
    for skipped in range(len(layers)):
        same = total = 0
        for inputs, text in zip(questions, texts, strict=True):
            width = inputs["input_ids"].shape[1]
            whole = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
            if "mm_token_type_ids" in whole:
                whole["mm_token_type_ids"] = torch.nn.functional.pad(
                    inputs["mm_token_type_ids"], (0, text.shape[1] - width)
                )
            handle = layers[skipped].register_forward_hook(_identity, with_kwargs=True)
            try:
                guesses = model(**whole, use_cache=False).logits[0, width - 1 : -1].argmax(-1)
            finally:
                handle.remove()
            same += int((guesses == text[0, width:]).sum())
            total += text.shape[1] - width
        a, c = same / total, (len(layers) - 1) / len(layers)
        gain = max((sum(a**i for i in range(g + 1))) / (g * c + 1) for g in range(1, 9))
        rows.append({"layer": skipped, "agreement": round(a, 3), "cost": round(c, 3), "best_speedup": round(gain, 3)})
    return rows


def _identity(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@torch.no_grad()
def call_costs(repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MIDDLE)).eval()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.randint(0, 32000, (1, PAST)), past_key_values=cache, logits_to_keep=1)
    times: dict[int, list[float]] = {m: [] for m in WIDTHS}
    for round_ in range(repeats + 1):
        for m in WIDTHS:
            ids = torch.randint(0, 32000, (1, m))
            begun = time.perf_counter()
            model(input_ids=ids, past_key_values=cache)
            if round_:
                times[m].append(time.perf_counter() - begun)
            cache.crop(-m)
    rows = {
        str(m): {
            "ms_median": round(1000 * statistics.median(times[m]), 2),
            "of_one_token": round(statistics.median(a / b for a, b in zip(times[m], times[1], strict=True)), 3),
        }
        for m in WIDTHS
    }
    parameters = sum(p.numel() for p in model.parameters())
    return {"geometry": MIDDLE, "parameters": parameters, "past": PAST, "tokens_in_a_pass": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_speculation_cpu.json"))
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="of the call costs")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "models": {}}

    def keep() -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    result["call_costs"] = call_costs(options.repeats)
    for name in MODELS:
        result["models"][name] = on_shipped(name, pictures=options.pictures, new=options.new_tokens)
        keep()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
