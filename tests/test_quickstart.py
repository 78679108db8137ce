"""demos/quickstart.py: what it prints is what transformers and arithmetic say, and it fails when it must."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmeff.loading import embedded_folder

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
SCRIPT = ROOT / "demos" / "quickstart.py"
SECTIONS = ["1. wrap", "2. compare", "3. report", "4. KV", "5. unwrap"]
VISUAL = (144 // 8) ** 2
BYTES_PER_TOKEN = 4 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, head size, float32


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """The text of each section; "" is what stands before the first."""
    done = run(str(SCRIPT))
    assert done.returncode == 0, done.stderr[-2000:]
    first, *rest = re.split(r"^== (.*)$", done.stdout, flags=re.MULTILINE)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


@pytest.fixture(scope="module")
def plain() -> tuple[str, int, int]:
    """The answer of the model without vlmeff, its tokens, and those of the prompt."""
    folder = embedded_folder("tiny_llava")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    picture = Image.open(ROOT / "demos" / "pictures" / "four-shapes.png").convert("RGB")
    inputs = processor(images=picture, text="USER: <image>\ndescribe the picture. ASSISTANT:", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    text = processor.decode(ids[0, prompt:], skip_special_tokens=True).strip()
    return text, ids.shape[1] - prompt, prompt


def figure(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text, flags=re.MULTILINE)
    assert found, f"{pattern!r} is not in {text!r}"
    return [int(group) for group in found.groups()]


def test_it_has_the_five_sections(printed: dict[str, str]) -> None:
    assert [name for name in printed if name] == SECTIONS
    assert printed[""].strip() == ""


def test_the_answers_are_those_of_the_model_alone(printed: dict[str, str], plain: tuple[str, int, int]) -> None:
    said = re.findall(r"^unwrapped: (.*)$", printed["2. compare"] + printed["5. unwrap"], flags=re.MULTILINE)
    assert said == [plain[0], plain[0]]
    assert f"wrapped:   {plain[0]}" in printed["2. compare"]


def test_the_report_counts_what_two_thirds_of_the_tokens_are(
    printed: dict[str, str], plain: tuple[str, int, int]
) -> None:
    _, new, prompt = plain
    kept = round(VISUAL * 2 / 3)
    report = printed["3. report"]
    assert figure(report, r"^visual tokens +(\d+) -> (\d+)") == [VISUAL, kept]
    assert figure(report, r"^prompt tokens +(\d+) -> (\d+)") == [prompt, prompt - VISUAL + kept]
    held = (prompt - VISUAL + kept + new - 1) * BYTES_PER_TOKEN
    assert figure(report, r"^KV cache +(\d+) KiB") == [held // 1024]


def test_the_cache_is_as_small_as_its_layers_say(printed: dict[str, str], plain: tuple[str, int, int]) -> None:
    text = printed["4. KV"]
    prompt = plain[2]
    layers = re.findall(r"^layer (\d+): +(\d+) of (\d+) entries", text, flags=re.MULTILINE)
    assert layers == [(str(layer), str(prompt // 2), str(prompt)) for layer in range(4)]
    held, full = figure(text, r"^KV cache: +(\d+) bytes instead of (\d+)$")
    # Per layer and KV head the dropped entries' keys and values are gone; a few bytes of bookkeeping came.
    dropped = (prompt - prompt // 2) * BYTES_PER_TOKEN
    assert full - dropped <= held <= full - dropped + 0.02 * full
    assert full % BYTES_PER_TOKEN == 0


def test_it_fails_when_unwrap_leaves_something_behind() -> None:
    code = (
        "import runpy, vlmeff; vlmeff.unwrap = lambda model: model;"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = run("-c", code)
    assert done.returncode == 1
    assert "bit for bit does not hold" in done.stderr
    assert "== 5. unwrap" in done.stdout
