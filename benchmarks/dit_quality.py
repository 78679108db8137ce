"""What quantization, caches, training and dropped blocks cost tiny-wan's clips, against the full-precision pipeline.

    python benchmarks/dit_quality.py --out benchmarks/results/dit_quality.json --work FOLDER
    python benchmarks/dit_quality.py --show benchmarks/results/dit_quality.json

One clip of every prompt and seed, from the same noise as ``benchmarks/tiny_wan.py``. Compared are

* every scheme without training, those that smooth also with calibration on a few prompts of their own seeds;
* preset ``fast`` and first-block caches of other thresholds over 8-bit layers (one clip a call, as a user runs it);
* 4 and 3 bits trained as ``vlmeff train-qvgen`` does, plainly (``phi=None``) and as QVGen does (``phi="svd"``, gone
  after half of the training), with equal steps, data and seeds;
* blocks dropped in greedy order, without training.

Beside the JSON a chart is drawn (the same name, .png). The file is written after every setting; a second run skips what
is there, and training goes on where it stopped (``--train-only`` trains in processes of their own).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from dit_chart import draw
from rich.progress import Progress
from scipy.stats import binomtest

import vlmeff
from vlmeff.cli_qvgen import GENERATED, GENERATED_DEFAULTS, prepare_data
from vlmeff.diffusion import blocks
from vlmeff.diffusion.quality import Quality, Reference, transformer_bytes
from vlmeff.diffusion.qvgen.config import TrainingConfig
from vlmeff.diffusion.qvgen.data import ClipFolder
from vlmeff.diffusion.qvgen.export import export
from vlmeff.diffusion.qvgen.training import Training, train
from vlmeff.diffusion.schemes import SCHEMES
from vlmeff.loading import embedded_folder
from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.architecture import CALL, digests, load_pipeline
from vlmeff.models.tiny_wan.probe import Probe, classify, load_probe

THRESHOLDS = (0.05, 0.1, 0.2)  # of the first-block cache; 0.05 is the preset's
CALIBRATION = {"num_inference_steps": 8}
CALIBRATION_PROMPTS = 8
STEPS = 600
TRAINING_SEEDS = (42,)
KINDS: dict[str, dict[str, Any]] = {"plain": {"phi": None}, "QVGen": {"phi": "svd", "decay_fraction": 0.5}}
TRAINING_CLIPS = 480
BATCH = 12

Row = dict[str, Any]


def judge_of(probe: Probe) -> Callable[[np.ndarray, Sequence[str]], list[bool]]:
    """Right are clips in which the probe finds the prompt's colour, shape and direction."""

    def judge(frames: np.ndarray, prompts: Sequence[str]) -> list[bool]:
        found: list[tuple[str, str, str]] = []
        for start in range(0, len(frames), BATCH):
            found += classify(probe, frames[start : start + BATCH])
        return [clips.parse_prompt(prompt) == answer for prompt, answer in zip(prompts, found, strict=True)]

    return judge


def wrap_settings() -> dict[str, tuple[Row, int]]:
    """Name -> (arguments of ``vlmeff.wrap``, clips of a call)."""
    every_sixth = clips.prompts()[:: 48 // CALIBRATION_PROMPTS]
    calibrate = {"prompt": every_sixth, "generator": None, **CALL, **CALIBRATION}
    out: dict[str, tuple[Row, int]] = {}
    for name, spec in SCHEMES.items():
        out[name] = ({"preset": None, "quant": name}, BATCH)
        if spec.smooth:
            quant = vlmeff.Quant(name, calibrate=calibrate)
            out[f"{name}, calibrated"] = ({"preset": None, "quant": quant}, BATCH)
    out["preset fast"] = ({"preset": "fast"}, 1)
    for threshold in THRESHOLDS[1:]:
        cache = {"kind": "first_block", "threshold": threshold}
        out[f"fast, threshold {threshold}"] = ({"preset": "fast", "cache": cache}, 1)
    return out


def row_of(quality: Quality, **more: Any) -> Row:
    row = quality.to_dict()
    if quality.right is not None:
        low, high = binomtest(quality.right, quality.clips).proportion_ci(method="wilson")
        row["right_95"] = [round(low, 4), round(high, 4)]
    return row | more


def training_config(bits: int, kind: str, seed: int, steps: int) -> TrainingConfig:
    """What ``vlmeff train-qvgen --bits ... --phi ... --steps ... --seed ...`` takes for tiny-wan."""
    values = {**GENERATED_DEFAULTS, "steps": steps, "validate_every": 0, "bits": bits, "seed": seed, **KINDS[kind]}
    return TrainingConfig.from_dict(values)


def run_name(bits: int, kind: str, seed: int) -> str:
    return f"W{bits}A{bits} trained, {kind}, seed {seed}"


def training_data(weights: Path, work: Path, count: int) -> ClipFolder:
    pipe = load_pipeline(weights)
    return ClipFolder(prepare_data(pipe, GENERATED, None, work, clips=count))


def trained(weights: Path, data: ClipFolder, config: TrainingConfig, folder: Path) -> tuple[Training, float]:
    """The finished run and the seconds of the processor that it took; one that is done is read."""
    pipe = load_pipeline(weights)
    took = folder / "cpu_seconds.json"
    before = json.loads(took.read_text()) if took.exists() else 0.0
    start = time.process_time()
    with torch.enable_grad(), Progress() as bar:
        task = bar.add_task(folder.name, total=config.steps)

        def progress(row: dict[str, Any]) -> None:
            bar.update(task, completed=row["step"] + 1)

        run = train(pipe.transformer, data, pipe.scheduler, config, out=folder, resume=True, progress=progress)
    seconds = before + time.process_time() - start
    took.write_text(json.dumps(seconds))
    return run, seconds


def training_row(run: Training, seconds: float) -> Row:
    losses = [row["loss"] for row in run.history if "loss" in row]
    norms = [row["grad_norm"] for row in run.history if "grad_norm" in row]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "cpu_seconds": round(seconds, 1),
        "loss_first": float(f"{losses[0]:.4g}"),
        "loss_last_tenth": float(f"{sum(losses[-tenth:]) / tenth:.4g}"),
        "grad_norm_first_tenth": float(f"{sum(norms[:tenth]) / tenth:.4g}"),
        "held_out": None if run.final_validation is None else float(f"{run.final_validation:.4g}"),
        "seed": run.config.seed,
        "settings": {name: getattr(run.config, name) for name in ("w_bits", "phi", "rank", "lr", "batch_size")},
    }


def block_order(pipe: Any) -> tuple[list[blocks.Block], list[Row]]:
    """(blocks in the order of dropping, the curve on recorded calls)."""
    prompts = clips.prompts()[:: 48 // CALIBRATION_PROMPTS]
    with blocks.recorded_calls(pipe.transformer, limit=8) as calls:
        noise = [torch.Generator().manual_seed(10**6 + i) for i in range(len(prompts))]
        pipe(prompts, generator=noise, output_type="latent", **(CALL | CALIBRATION))
    order = [block for block, _ in blocks.rank_blocks(pipe.transformer, calls)]
    curve = blocks.quality_curve(pipe.transformer, calls, order)
    rows = [{"kept": p.kept, "keep": p.keep, "error_of_a_call": float(f"{p.error:.4g}")} for p in curve]
    return order, rows


def measure(args: argparse.Namespace, header: Row, results: dict[str, Row], save: Callable[[], None]) -> None:
    """Fill ``results`` with every setting that is not there yet."""
    torch.set_grad_enabled(False)
    pipe = load_pipeline(args.weights)
    judge = judge_of(load_probe(args.weights / "probe.safetensors"))
    prompts = clips.prompts()[: args.prompts]
    with Progress() as bar:
        total = len(prompts) * args.seeds
        task = bar.add_task("unwrapped", total=total)
        reference = Reference(
            pipe,
            prompts,
            range(args.seeds),
            call=CALL,
            batch=BATCH,
            judge=judge,
            progress=lambda done: bar.update(task, completed=done),
        )
        same = reference.measure(reference.rendering, transformer_bytes=transformer_bytes(pipe))
        results["unwrapped"] = row_of(same, group="unwrapped")
        for name, (plan, batch) in wrap_settings().items():
            if name in results or (args.only and not any(part in name for part in args.only)):
                continue
            bar.update(task, description=name, completed=0)
            if isinstance(plan.get("quant"), vlmeff.Quant):
                plan["quant"].calibrate["generator"] = torch.Generator().manual_seed(10**6)
            vlmeff.wrap(pipe, **plan)
            results[name] = row_of(reference.compare(pipe, batch=batch), group=group_of(name))
            vlmeff.unwrap(pipe)
            save()
        if not args.only:
            if "dropped_blocks" not in header:
                header["dropped_blocks"] = block_order(pipe)[1]
            for point in header["dropped_blocks"][1:]:
                name = f"{point['kept']} of {len(pipe.transformer.blocks)} blocks"
                bar.update(task, description=name, completed=0)
                if name not in results:
                    with blocks.drop_blocks(pipe.transformer, point["keep"]):
                        results[name] = row_of(reference.compare(pipe), group="dropped")
            save()
    if args.work is None:
        return
    data = training_data(args.weights, args.work, args.training_clips)
    for bits, kind, seed in runs(args):
        name = run_name(bits, kind, seed)
        if results.get(name, {}).get("training", {}).get("steps") == args.steps:
            continue
        config = training_config(bits, kind, seed, args.steps)
        run, seconds = trained(args.weights, data, config, args.work / name.replace(" ", "-"))
        export(run.transformer)
        student = load_pipeline(args.weights)
        student.transformer = run.transformer
        results[name] = row_of(reference.compare(student), group="trained", training=training_row(run, seconds))
        save()


def runs(args: argparse.Namespace) -> list[tuple[int, str, int]]:
    return [(bits, kind, seed) for seed in args.training_seeds for bits in (4, 3) for kind in KINDS]


def group_of(name: str) -> str:
    if name.startswith(("preset", "fast")):
        return "cache"
    return "svdq" if name.startswith("svdq") else "8 bit" if name.startswith("w8") else "4 bit"


def table(result: Row) -> str:
    """Markdown."""
    base = result["settings"]["unwrapped"]
    head = "transformer, MiB | of unwrapped | latent error | worst | PSNR, dB | SSIM | clips right | blocks skipped"
    lines = [f"| setting | {head} |", "|" + "---|" * (head.count("|") + 2)]
    for name, row in result["settings"].items():
        same = name == "unwrapped"
        skipped = row.get("blocks_skipped")
        cells = [
            name,
            f"{row['transformer_bytes'] / 2**20:.2f}",
            f"{row['transformer_bytes'] / base['transformer_bytes']:.2f}",
            "-" if same else f"{row['latent_error']:.4f}",
            "-" if same else f"{row['latent_error_worst']:.3f}",
            "-" if same else f"{row['psnr_db']:.1f}",
            "-" if same else f"{row['ssim']:.3f}",
            f"{row['right']} of {row['clips']}",
            f"{skipped:.0%}" if skipped else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(result: Row) -> str:
    """Markdown: what training did, plain beside QVGen."""
    head = "steps | CPU s | first loss | last tenth | held out | first gradients | latent error | clips right"
    lines = [f"| run | {head} |", "|" + "---|" * (head.count("|") + 2)]
    for name, row in result["settings"].items():
        if "training" in row:
            t = row["training"]
            held_out = "-" if t["held_out"] is None else f"{t['held_out']:.4f}"
            losses = [f"{t['loss_first']:.4f}", f"{t['loss_last_tenth']:.4f}", held_out]
            ends = [
                f"{t['grad_norm_first_tenth']:.2f}",
                f"{row['latent_error']:.4f}",
                f"{row['right']} of {row['clips']}",
            ]
            lines.append(f"| {' | '.join([name, str(t['steps']), format(t['cpu_seconds'], '.0f'), *losses, *ends])} |")
    return "\n".join(lines)


def environment() -> Row:
    return {
        "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "load_average": [round(n, 2) for n in os.getloadavg()],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "vlmeff": vlmeff.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (.json)")
    parser.add_argument("--show", type=Path, help="print the tables of a result file, draw its chart, and end")
    parser.add_argument("--weights", type=Path, default=embedded_folder("tiny_wan"), help="another folder")
    parser.add_argument(
        "--work", type=Path, help="data and checkpoints of the trainings; without it nothing is trained"
    )
    parser.add_argument("--prompts", type=int, default=48, help="the first of the 48 prompts")
    parser.add_argument("--seeds", type=int, default=2, help="clips of every prompt")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=TRAINING_SEEDS)
    parser.add_argument("--training-clips", type=int, default=TRAINING_CLIPS)
    parser.add_argument("--only", nargs="*", default=[], help="settings whose names contain one of these")
    parser.add_argument(
        "--train-only", nargs="+", metavar="KIND", help="train, compare nothing: 4plain 4QVGen 3plain .."
    )
    args = parser.parse_args()
    if args.show is not None:
        result = json.loads(args.show.read_text())
        print(table(result), training_table(result), sep="\n\n")
        draw(result, args.show.with_suffix(".png"))
        return
    if args.train_only:
        data = training_data(args.weights, args.work, args.training_clips)
        for bits, kind, seed in runs(args):
            if f"{bits}{kind}" in args.train_only:
                folder = args.work / run_name(bits, kind, seed).replace(" ", "-")
                trained(args.weights, data, training_config(bits, kind, seed, args.steps), folder)
        return
    if args.out is None:
        parser.error("--out is missing")
    what = {"prompts": args.prompts, "seeds": args.seeds}
    header = {"model": "tiny-wan", "weights_sha256": digests(args.weights), "call": CALL, **what, **environment()}
    results: dict[str, Row] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if all(before.get(key) == header[key] for key in ("weights_sha256", "call", "prompts", "seeds")):
            results = before["settings"]
            header |= {key: before[key] for key in ("dropped_blocks",) if key in before}

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**header, "settings": results}, indent=2) + "\n")

    measure(args, header, results, save)
    save()
    result = {**header, "settings": results}
    print(table(result), training_table(result), sep="\n\n")
    draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
