"""Helpers: write a benchmark's folder of questions with pictures."""

from __future__ import annotations

import hashlib
import json

from PIL import Image

COLORS = ("red", "lime", "blue", "white", "black")


def row(number=0, **fields):
    """A good row; a field of None is left out."""
    fields = {"doc_id": f"doc/{number}", "image": f"images/{number % 5}.png", "question": f"q {number}?", **fields}
    if "answers" not in fields:
        fields.setdefault("answer", "yes")
    return {key: value for key, value in fields.items() if value is not None}


def write_folder(root, rows, *, split="test", manifest=None):
    """``rows``: dictionaries, or lines of text as they are. ``manifest``: what to add to a right one."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i, color in enumerate(COLORS):
        Image.new("RGB", (4, 3), color).save(root / "images" / f"{i}.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    data = "".join(line + "\n" for line in lines).encode()
    (root / f"{split}.jsonl").write_bytes(data)
    if manifest is not None:
        content = {
            "schema": "vlmeff.data/1",
            "benchmark": root.name,
            "split": split,
            "count": sum(bool(line.strip()) for line in lines),
            "sha256": {f"{split}.jsonl": hashlib.sha256(data).hexdigest()},
            **manifest,
        }
        (root / "manifest.json").write_text(json.dumps(content))
    return root
