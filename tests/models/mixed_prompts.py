"""Requests with videos and pictures together, as a processor would deliver them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import prompts, video_prompts

ALONG = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}  # with what stands in their padding
KINDS = ["two videos in a row", "a picture and a video", "batch"]


def in_a_row(*parts: dict[str, Any]) -> dict[str, Any]:
    """Prompts of one row each, one behind the other."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            out[key] = torch.cat([out[key], value], 1 if key in ALONG else 0) if key in out else value
    return out


def rows_of(*rows: dict[str, Any]) -> dict[str, Any]:
    """Prompts of one row each as a left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    padded = []
    for row in rows:
        missing = width - row["input_ids"].shape[1]
        padded.append(
            {k: torch.nn.functional.pad(v, (missing, 0), value=ALONG[k]) if k in ALONG else v for k, v in row.items()}
        )
    return {key: torch.cat([row[key] for row in padded if key in row]) for row in padded for key in row}


def video_request(model: Any, kind: str) -> dict[str, Any]:
    """Frames of one call differ in number with Qwen only: the others take videos as one tensor."""
    several = model.config.model_type.startswith("qwen")

    def video(frames: int, seed: int = 1) -> dict[str, Any]:
        return video_prompts(model, [frames if several else 4], seed=seed)

    picture, text = prompts(model, [1], seed=5), prompts(model, [0], seed=6)
    if kind == "two videos in a row":
        return in_a_row(video(5), video(2, seed=2))
    if kind == "a picture and a video":
        return in_a_row(picture, video(4))
    first, second = in_a_row(video(4), picture), in_a_row(video(3, seed=3), video(2, seed=4))
    return rows_of(first, text, second)
