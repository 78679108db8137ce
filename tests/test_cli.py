"""The command line, end to end on the shipped model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "demos/pictures/four-shapes.png"


def vlmeff(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vlmeff.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_ask_compares_and_draws_what_was_kept(tmp_path: Path) -> None:
    overlay = tmp_path / "kept.png"
    done = vlmeff("ask", PICTURE, "describe the picture.", "--json", "--save-overlay", str(overlay), "--warmup", "0")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    unwrapped, fast = result["runs"]
    assert unwrapped["label"] == "unwrapped"
    assert fast["report"]["visual_tokens_before"] == 324
    assert fast["report"]["visual_tokens_after"] == 108
    # The answers may differ in length; the bytes of a token may not.
    tokens = [run["report"]["prompt_tokens_before"] + run["report"]["new_tokens"] - 1 for run in (unwrapped, fast)]
    assert unwrapped["report"]["kv_bytes"] * tokens[1] == fast["report"]["kv_bytes_full"] * tokens[0]
    assert fast["report"]["kv_bytes"] < 0.5 * fast["report"]["kv_bytes_full"]
    assert fast["report"]["prompt_tokens_before"] - fast["report"]["prompt_tokens_after"] == 324 - 108
    assert fast["report"]["total_ms"] >= fast["report"]["prefill_ms"] > 0
    assert result["speedup"]["prefill"] > 0
    assert "circle" in unwrapped["answer"]
    assert "asking the unwrapped model" in done.stderr
    picture = np.asarray(Image.open(overlay).convert("RGB"))
    assert picture.shape[1] == 720
    assert (picture == (213, 94, 0)).all(-1).any(), "no anchor is drawn"


def test_ask_prints_a_table() -> None:
    done = vlmeff("ask", "demos/pictures/one-shape.png", "what color is the shape?", "--no-compare", "--warmup", "0")
    assert done.returncode == 0, done.stderr
    for words in ("visual tokens", "324 -> 108", "prompt tokens", "KV cache", "prefill ms", "total ms"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ask", "nowhere.png", "x"], 3, ["nowhere.png", "does not exist"]),
        (["ask", "README.md", "x"], 3, ["README.md", "cannot be decoded"]),
        (["ask", PICTURE, "x", "--preset", "fats"], 4, ["fats", "fast"]),
        (["ask", PICTURE, "x", "--model", "tiny-lava"], 4, ["tiny-lava", "tiny-llava"]),
        (["ask", PICTURE, "x", "--keep", "1.5"], 2, ["keep=1.5", "share in (0, 1]"]),
        (["ask", PICTURE, "x", "--tokens", "hipune"], 2, ["hipune", "hiprune"]),
        (["ask", PICTURE, "x", "--dtype", "int3"], 2, ["int3", "bfloat16"]),
        (["ask", PICTURE], 2, ["question"]),
        (["ask", PICTURE, " "], 2, ["question is empty"]),
        (["ask", PICTURE, "x", "--device", "cudax"], 2, ["cudax", "cannot be used"]),
        (["ask", PICTURE, "x", "--save-overlay", "overlay.txt"], 2, ["overlay.txt", ".png"]),
        (["zoo", "show", "tiny-llava/fats"], 4, ["tiny-llava/fast"]),
        (["zoo", "validate", "absent.yaml"], 2, ["E-ZOO-01", "absent.yaml"]),
    ],
)
def test_an_error_is_one_sentence_with_its_exit_code(arguments: list[str], code: int, words: list[str]) -> None:
    done = vlmeff(*arguments)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    for word in words:
        assert word.lower() in done.stderr.lower()
    assert done.stdout == ""


def test_the_zoo_and_the_presets_are_listed() -> None:
    listing = vlmeff("zoo", "list").stdout
    assert "tiny-llava/fast" in listing
    assert "qwen2.5-vl-7b/fast" in listing
    assert "324 -> 108" in vlmeff("presets", "--model", "tiny-llava").stdout
    assert vlmeff("zoo", "validate").returncode == 0
    assert "method: hiprune" in vlmeff("zoo", "show", "fast").stdout
    assert "vlmeff.zoo/1" in vlmeff("zoo", "schema").stdout
