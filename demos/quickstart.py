"""A tour of vlmeff in five steps, on the model that ships with it: no GPU, no download, some seconds.

    python demos/quickstart.py

Every step checks what it says; the first thing that is not so ends the tour with exit code 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import vlmeff

PICTURE = Path(__file__).resolve().parent / "pictures" / "four-shapes.png"
QUESTION = "describe the picture."


def section(title: str) -> None:
    print(f"\n== {title}")


def check(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"quickstart: {what} does not hold")
    print(f"checked: {what}")


def answer(**options: object) -> tuple[str, torch.Tensor]:
    """The model's text, and the logits behind every token of it. The call is the same, wrapped or not."""
    out = model.generate(
        **inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    text = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), torch.stack(out.logits)


# Any LLaVA, Qwen2.5-VL, ... of transformers would do; this one has 1.8 M parameters and knows coloured shapes.
model, processor = vlmeff.load("tiny-llava")
content = [{"type": "image", "image": Image.open(PICTURE).convert("RGB")}, {"type": "text", "text": QUESTION}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)  # fmt: skip
plain, plain_logits = answer()

section("1. wrap")
wrapped = vlmeff.wrap(model, preset="quality")
check(wrapped is model, "wrap returns the same object")
print(vlmeff.presets(model))

section("2. compare")
short, short_logits = answer()
print(f"question:  {QUESTION}")
print(f"unwrapped: {plain}")
print(f"wrapped:   {short}")
check(short == plain, "with two thirds of the visual tokens the answer is the same text")
check(not torch.equal(short_logits, plain_logits), "the logits are not: tokens were left out")

section("3. report")
report = vlmeff.report(model)
print(report)
check(report.visual_tokens_after < report.visual_tokens_before, "fewer visual tokens reached the language model")

section("4. KV")
vlmeff.wrap(model, None, kv=vlmeff.SnapKV(keep_ratio=0.5))  # all visual tokens, half of the cached prompt
evicted, _ = answer()
report = vlmeff.report(model)
print(f"wrapped:   {evicted}")
print(f"KV cache:  {report.kv_bytes} bytes instead of {report.kv_bytes_full}")
for layer in report.retention.layers:
    print(f"layer {layer.layer}:   {layer.kept[0]} of {layer.prompt_tokens[0]} entries of the prompt kept")
check(report.kv_bytes < report.kv_bytes_full, "the cache is smaller")

section("5. unwrap")
vlmeff.unwrap(model)
again, again_logits = answer()
print(f"unwrapped: {again}")
check(again == plain and torch.equal(again_logits, plain_logits), "every logit is what it was before wrap, bit for bit")
check(not vlmeff.is_wrapped(model), "nothing of vlmeff is left on the model")
