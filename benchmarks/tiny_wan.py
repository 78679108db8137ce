"""What tiny-wan can do before quantization: prompts shown correctly, the codec's PSNR, the probe on real clips.

    python benchmarks/tiny_wan.py --out benchmarks/results/tiny_wan.json --sheet benchmarks/results/tiny_wan.png

Each prompt is generated from several seeds with the arguments of ``call.json``; a clip counts when the shipped probe
finds its colour, shape and direction all right. The probe was trained on real clips only; its own accuracy on held-out
real clips, and on those after the codec, stands beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from rich.progress import track
from scipy.stats import binomtest

import vlmeff
from vlmeff.loading import embedded_folder
from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.architecture import CALL, digests, load_pipeline
from vlmeff.models.tiny_wan.autoencoding import heldout_psnr, video_tensor
from vlmeff.models.tiny_wan.probe import ANSWERS, Probe, classify, load_probe

GOAL = 0.9  # of the prompts, before quantization
BATCH = 12


def share(right: list[bool]) -> dict[str, Any]:
    low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return {
        "n": len(right),
        "right": sum(right),
        "share": round(sum(right) / len(right), 4),
        "share_95": [round(low, 4), round(high, 4)],
    }


def by_question(asked: list[tuple[str, str, str]], found: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Share right of every question, and of all three together."""
    out = {"all": share([a == f for a, f in zip(asked, found, strict=True)])}
    for i, name in enumerate(ANSWERS):
        out[name] = share([a[i] == f[i] for a, f in zip(asked, found, strict=True)])
    return out


def generated(pipe: Any, probe: Probe, seeds: range, frames: dict[str, np.ndarray]) -> dict[str, Any]:
    """One clip of every prompt and seed; those of the first seed are put into ``frames``."""
    asked, found, seconds = [], [], 0.0
    prompts = clips.prompts()
    for seed in seeds:
        for start in track(range(0, len(prompts), BATCH), f"seed {seed}"):
            some = prompts[start : start + BATCH]
            generators = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(some))]
            before = time.perf_counter()
            made = pipe(some, generator=generators, output_type="np", **CALL).frames
            seconds += time.perf_counter() - before
            asked += [clips.parse_prompt(p) for p in some]
            found += classify(probe, made)
            if seed == seeds[0]:
                frames.update(zip(some, made, strict=True))
    wrong = Counter(clips.prompt_of(*a) for a, f in zip(asked, found, strict=True) if a != f)
    failed = [p for p in prompts if wrong[p] > len(seeds) / 2]
    return {
        **by_question(asked, found),
        "prompts_right_by_majority": len(prompts) - len(failed),
        "prompts": len(prompts),
        "wrong_by_prompt": dict(wrong.most_common()),
        "seconds_per_clip": round(seconds / len(asked), 3),
    }


def real(pipe: Any, probe: Probe, count: int) -> dict[str, Any]:
    """The probe on held-out real clips, as they are and after the codec."""
    asked, found, coded = [], [], []
    for start in range(0, count, 16):
        pixels, drawn = clips.clip_batch("heldout", range(start, min(start + 16, count)))
        asked += [(clip.color, clip.shape, clip.direction) for clip in drawn]
        found += classify(probe, pixels)
        with torch.no_grad():
            shown = pipe.vae.decode(pipe.vae.encode(video_tensor(pixels)).latent_dist.mean, return_dict=False)[0]
        coded += classify(probe, (shown.permute(0, 2, 3, 4, 1).numpy() + 1) / 2)
    return {"real": by_question(asked, found), "after_codec": by_question(asked, coded)}


def sheet(frames: dict[str, np.ndarray], each: int = 4) -> Image.Image:
    """Every ``each``-th prompt a row of all its frames."""
    rows = [np.concatenate(list(made), axis=1) for made in list(frames.values())[::each]]
    pixels = np.rint(np.concatenate(rows, axis=0) * 255).astype(np.uint8)
    return Image.fromarray(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=embedded_folder("tiny_wan"), help="another folder")
    parser.add_argument("--seeds", type=int, default=4, help="clips of every prompt")
    parser.add_argument("--clips", type=int, default=192, help="held-out real clips")
    parser.add_argument("--sheet", type=Path, help="a picture of clips that were generated")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    pipe, probe = load_pipeline(args.weights), load_probe(args.weights / "probe.safetensors")
    frames: dict[str, np.ndarray] = {}
    codec = heldout_psnr(pipe.vae, args.clips)
    made = generated(pipe, probe, range(args.seeds), frames)
    result = {
        "model": "tiny-wan",
        "weights_sha256": digests(args.weights),
        "call": CALL,
        "seeds": args.seeds,
        "generated": made,
        "goal": {"share": GOAL, "passed": made["all"]["share"] >= GOAL},
        "probe": real(pipe, probe, args.clips),
        "codec": {
            "class": type(pipe.vae).__name__,
            "n": len(codec),
            "psnr_db": round(float(np.mean(codec)), 2),
            "psnr_db_min": round(min(codec), 2),
        },
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.sheet is not None:
        sheet(frames).save(args.sheet)
    print(json.dumps({"generated": made["all"], "codec": result["codec"]}, indent=2))


if __name__ == "__main__":
    main()
