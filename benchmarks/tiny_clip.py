"""What tiny-clip can do: retrieval among 32 captions, patches that follow the text, easy-vqa's shapes by name.

    python benchmarks/tiny_clip.py --out benchmarks/results/tiny_clip.json

Pictures are drawn from seeds that training does not use. easy-vqa's test pictures are taken when that package is
installed; the model has never seen one.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

import vlmeff
from vlmeff.errors import MissingExtraError
from vlmeff.evaluation.mosaics import load_tiles
from vlmeff.models import tiny_clip
from vlmeff.models.tiny_clip.architecture import GRID, folder
from vlmeff.models.tiny_clip.captions import COLORS, SHAPES, distinct_pairs, named_pair
from vlmeff.models.tiny_clip.train import on_thing
from vlmeff.vlm.relevance import dense_tokens

CANDIDATES = 32
# The last two have words that tiny-clip lacks: one is what is left of a chat template, decoded.
FORMS = ("{}", "where is {}?", "what is the size of {} on the screen?", "\nis there {}? ASSISTANT:")


class Clip:
    """Unit vectors of pictures, of their patches and of texts."""

    def __init__(self) -> None:
        self.model, self.preprocess, self.tokenizer = tiny_clip.load()

    def images(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(i) for i in images]), normalize=True)

    def patches(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([self.preprocess(i) for i in images])
        return F.normalize(dense_tokens(self.model.visual, pixels).flatten(1, 2), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(texts), normalize=True)


def retrieval(clip: Clip, rounds: int) -> dict[str, Any]:
    """Recall at 1 among 32 pictures and captions, each caption true of one picture only."""
    to_text = to_picture = 0
    for number in range(rounds):
        pictures, captions = distinct_pairs(random.Random(f"retrieval-{number}"), CANDIDATES)
        similarity = clip.images([p.image() for p in pictures]) @ clip.texts([c.text for c in captions]).T
        right = torch.arange(CANDIDATES)
        to_text += int((similarity.argmax(1) == right).sum())
        to_picture += int((similarity.argmax(0) == right).sum())
    n = rounds * CANDIDATES
    return {
        "n": n,
        "candidates": CANDIDATES,
        "image_to_text_recall_at_1": round(to_text / n, 4),
        "text_to_image_recall_at_1": round(to_picture / n, 4),
        "chance": round(1 / CANDIDATES, 4),
    }


def relevance(clip: Clip, n: int) -> dict[str, Any]:
    """Two shapes, one named: is the best patch on it, and are its patches above those of the other on average?"""
    drawn = [named_pair(random.Random(f"relevance-{number}")) for number in range(n)]
    patches = clip.patches([picture.image() for picture, _, _ in drawn])
    out: dict[str, Any] = {"n": n, "grid": [GRID, GRID]}
    for form in FORMS:
        texts = clip.texts([form.format(text) for _, _, text in drawn])
        scores = torch.einsum("bne,be->bn", patches, texts)
        best, above, chance = 0, 0, 0.0
        for (picture, named, _), score in zip(drawn, scores, strict=True):
            (other,) = (thing for thing in picture.things if thing is not named)
            here = on_thing(named)
            best += bool(here[score.argmax()])
            above += bool(score[here].mean() > score[on_thing(other)].mean())
            chance += float(here.float().mean())
        out[form.format("a red circle")] = {
            "best_patch_on_named": round(best / n, 4),
            "named_above_other": round(above / n, 4),
        }
    out["best_patch_chance"] = round(chance / n, 4)
    return out


def easy_vqa(clip: Clip) -> dict[str, Any] | None:
    """Pictures of easy-vqa's test split named as "a <colour> <shape>" among all 24; None without the package."""
    try:
        tiles = load_tiles("test")
    except MissingExtraError:
        return None
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    texts = clip.texts([f"a {color} {shape}" for color, shape in kinds])
    found = [kinds[i] for i in (clip.images([Image.fromarray(t.pixels) for t in tiles]) @ texts.T).argmax(1).tolist()]
    n = len(tiles)
    return {
        "n": n,
        "color_and_shape": round(sum(f == (t.color, t.shape) for f, t in zip(found, tiles, strict=True)) / n, 4),
        "color": round(sum(f[0] == t.color for f, t in zip(found, tiles, strict=True)) / n, 4),
        "shape": round(sum(f[1] == t.shape for f, t in zip(found, tiles, strict=True)) / n, 4),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30, help="sets of 32 captions")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures with two shapes")
    args = parser.parse_args()
    clip = Clip()
    result = {
        "model": "tiny-clip",
        "weights_sha256": hashlib.sha256((folder() / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in clip.model.parameters()),
        "retrieval": retrieval(clip, args.rounds),
        "relevance": relevance(clip, args.pictures),
        "easy_vqa_test": easy_vqa(clip),
        "device": "cpu",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
