"""The shipped model behind the gate of ``vlmeff serve``, as its tests ask it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmeff.errors import EnvironmentMismatchError
from vlmeff.integrations import server
from vlmeff.integrations.server_gate import RequestLimits
from vlmeff.integrations.server_images import PictureLimits

for _name in ("openai", "uvicorn", "fastapi"):
    pytest.importorskip(_name, reason=f"the extra serve is not installed ({_name} is missing)")
try:
    server.check_environment()
except EnvironmentMismatchError as _error:
    pytest.skip(str(_error), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "demos" / "pictures" / "four-shapes.png"
OTHER = ROOT / "demos" / "pictures" / "one-shape.png"
QUESTION = "how many shapes are there?"
LIMITS = RequestLimits(
    pictures=PictureLimits(max_images=3, max_image_mb=0.05, max_image_pixels=1_000_000),
    max_request_mb=0.3,
    max_text_chars=2_000,
    max_new_tokens=40,
)


def data_url(picture: Path | bytes, kind: str = "png") -> str:
    raw = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()


def chat(*urls: Any, question: str = QUESTION) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def expected(loaded: tuple[Any, Any], *pictures: Path, question: str = QUESTION) -> tuple[str, int]:
    """(answer, length of the prompt) of the same wrapped model's own generate."""
    model, processor = loaded
    content = [{"type": "image", "image": Image.open(p).convert("RGB")} for p in pictures]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=LIMITS.max_new_tokens, do_sample=False)
    return processor.decode(ids[0, length:], skip_special_tokens=True), length
