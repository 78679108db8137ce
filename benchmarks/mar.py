"""What speculation saves a MAR generator, beside plain decoding with fewer steps.

    python benchmarks/mar.py --out benchmarks/results/mar_cpu.json
    python benchmarks/mar.py --device cuda --out benchmarks/results/mar_cuda.json

On tiny-mar and its draft: passes, acceptance, tokens per round and the RMS difference to plain decoding with the same
noise (in units of the latents), of ``--samples`` pictures in one batch, without guidance and with it; seconds of one
picture (batch 1), all ways taking turns in one process, so that ratios hold on a machine that others load. CPU seconds
stand beside wall seconds where there is no GPU.

On CUDA also the cost of calls at the geometry of mar_base, mar_large and mar_huge, with random weights: what a round of
R rows costs beside one of one row, and what a draft costs beside its target. Random weights say nothing of acceptance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import environment, interleaved, timed

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.loading import load_draft, load_mar, shipped
from vlmeff.models.mar.trunk import MAR
from vlmeff.speculative.continuous import Continuous
from vlmeff.speculative.wrapped import rms

GOAL = {"row": "coupled, window 8, delta 0.02", "tokens_per_round": 2.7, "rms": 0.004, "speedup": 3.0}
PREFILL = 1 / 16  # one step of 16, in every mode with a draft
GEOMETRIES = ("mar_base", "mar_large", "mar_huge")


@dataclass(frozen=True)
class Way:
    """One way to decode: plain with ``share`` of the steps, or a mode; "draft" and "target" say who drafts."""

    name: str
    config: Continuous | None = None
    share: float = 1.0
    drafts: str = "draft"
    timed: bool = False  # at batch 1, too
    guided: bool = True  # among the rows with guidance, too


def ways() -> list[Way]:
    def cspd(**fields: Any) -> Continuous:
        return Continuous(mode="cspd", gamma=4, prefill=PREFILL, **fields)

    def coupled(**fields: Any) -> Continuous:
        return Continuous(mode="coupled", **fields)

    out = [
        Way("plain", timed=True),
        Way("plain, K/2", share=0.5, timed=True),
        Way("plain, K/4", share=0.25, timed=True),
        Way("plain, K/8", share=0.125, timed=True),
    ]
    for window, delta in [(4, 1e-5), (4, 0.02), (4, 0.1), (8, 1e-4), (8, 0.02), (8, 0.05), (8, 0.1)]:
        config = coupled(window=window, delta=delta)
        guided = window == 8 and delta in (0.02, 0.1)
        out.append(Way(f"coupled, window {window}, delta {delta:g}", config, timed=window == 8, guided=guided))
    proposal = coupled(window=4, delta=0.1, prefill=PREFILL, proposal="draft")
    return [
        *out,
        Way("coupled by the draft, window 4, delta 0.1", proposal, timed=True, guided=False),
        Way("exact, gamma 4", Continuous(mode="exact", gamma=4, prefill=PREFILL), timed=True),
        Way("cspd, softening 1", cspd(softening=1.0), guided=False),
        Way("cspd (paper), softening 42", cspd(), timed=True),
        Way("cspd, sigma term off", cspd(sigma_term="off"), guided=False),
        Way("cspd, sigma term inverted", cspd(sigma_term="official"), guided=False),
        Way("cspd, noise not aligned", cspd(align=False), guided=False),
        Way("cspd, parallel, draft is target", cspd(verify="parallel"), drafts="target", guided=False),
        Way("cspd, sequential, draft is target", cspd(), drafts="target", guided=False),
        Way("cspd-official, gamma 4", Continuous(mode="cspd", variant="official", gamma=4, prefill=0.0), timed=True),
    ]


def decode(way: Way, target: MAR, draft: MAR, labels: torch.Tensor, **call: Any) -> Any:
    steps = max(1, round(way.share * target.config.seq_len))
    return target.sample(
        labels,
        num_iter=steps,
        mode=way.config,
        draft=None if way.config is None else target if way.drafts == "target" else draft,
        **call,
    )


def quality() -> Callable[[torch.Tensor, torch.Tensor], float] | None:
    """Share of pictures that a classifier of the real digits recognises; None without scikit-learn."""
    from vlmeff.models.tiny_mar import digits

    try:
        machine, _ = digits.classifier()
    except ImportError:
        return None
    return lambda images, labels: digits.recognised(machine, images.cpu(), labels.cpu())


def batch_rows(target: MAR, draft: MAR, samples: int, cfg: float, seed: int) -> list[dict[str, Any]]:
    """Every way on one batch, from the same noise."""
    labels = torch.arange(samples, device=target.device) % target.config.class_num
    recognised = quality()
    rows, full = [], None

    def row(name: str, out: Any) -> dict[str, Any]:
        s = out.stats
        return {
            "name": name,
            "acceptance": s.acceptance_rate,
            "conditional_rate": s.conditional_rate,
            "tokens_per_round": s.tokens_per_round,
            "rms": rms(out.latents, full.latents),
            "recognised": None if recognised is None else recognised(out.images, labels),
            "target_passes": s.target_passes,
            "target_rows": s.target_rows,
            "draft_passes": s.draft_passes,
            "target_head_calls": s.target_head_calls,
            "target_head_rows": s.target_head_rows,
            "draft_head_calls": s.draft_head_calls,
            "residual_exhausted": s.residual_exhausted,
            "context_gap_max": s.context_gap_max,
            "wall_s": s.wall_s,
        }

    for way in ways():
        if cfg != 1 and not way.guided:
            continue
        out = decode(way, target, draft, labels, cfg=cfg, seed=seed)
        full = full or out
        rows.append(row(way.name, out))
        print(
            f"cfg {cfg:g}  {way.name:<42} {rows[-1]['target_passes']:>3} passes  rms {rows[-1]['rms']:.4f}", flush=True
        )
    rows.append(row("draft alone", draft.sample(labels, cfg=cfg, seed=seed)))
    return rows


def single_rows(target: MAR, draft: MAR, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of one picture: every way once a round, the rounds with different pictures."""
    chosen = [way for way in ways() if way.timed]
    cpu: dict[str, list[float]] = {way.name: [] for way in chosen}
    deviations: dict[str, list[float]] = {way.name: [] for way in chosen}
    passes: dict[str, list[int]] = {way.name: [] for way in chosen}
    full: dict[int, torch.Tensor] = {}

    def case(way: Way) -> Callable[[], float]:
        def run() -> float:
            number = len(cpu[way.name])
            labels = torch.tensor([number % target.config.class_num], device=device)
            made: list[Any] = []
            before = time.process_time()
            took = timed(lambda: made.append(decode(way, target, draft, labels, seed=1000 + number)), device) / 1000
            cpu[way.name].append(time.process_time() - before)
            if number not in full:
                full[number] = target.sample(labels, seed=1000 + number).latents
            deviations[way.name].append(rms(made[0].latents, full[number]))
            passes[way.name].append(made[0].stats.target_passes)
            return took

        return run

    for way in chosen[:1]:
        case(way)()  # unmeasured: the first call of a process is slower
        cpu[way.name].clear(), deviations[way.name].clear(), passes[way.name].clear()
    seconds = interleaved({way.name: case(way) for way in chosen}, repeats, "batch 1")
    measure = seconds if device.type == "cuda" else cpu
    out = {}
    for name, walls in seconds.items():
        out[name] = {
            "wall_s": round(statistics.median(walls), 4),
            "cpu_s": round(statistics.median(cpu[name]), 4),
            "speedup_wall": round(statistics.median(a / b for a, b in zip(seconds["plain"], walls, strict=True)), 3),
            "speedup": round(sum(measure["plain"]) / sum(measure[name]), 3),
            "target_passes": round(statistics.mean(passes[name]), 2),
            "rms": statistics.mean(v**2 for v in deviations[name]) ** 0.5,
        }
    return {"rounds": repeats, "speedup_of": "wall seconds" if device.type == "cuda" else "CPU seconds", "ways": out}


def geometry(
    name: str, device: torch.device, *, rows: tuple[int, ...], repeats: int = 5, **changes: Any
) -> dict[str, Any]:
    """Milliseconds of a trunk pass over R contexts with half of the tokens, and of a head run of R tokens."""
    config = MARConfig.named(name, **changes)
    model = MAR(config).to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    length, dim, steps = config.seq_len, config.token_dim, config.num_sampling_steps
    out: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "trunk_ms": {}, "head_ms": {}}
    for count in rows:
        tokens = torch.randn(count, length, dim, device=device)
        visible = (torch.arange(length, device=device) < length // 2).expand(count, -1)
        embedding = model.class_embedding(None, count)
        z = model.trunk(tokens, visible, embedding)[:, 0]
        eps = torch.randn(count, steps, dim, device=device)
        x_T = torch.randn(count, dim, device=device)
        for what, run in (
            ("trunk_ms", lambda t=tokens, v=visible, e=embedding: model.trunk(t, v, e)),
            ("head_ms", lambda z=z, x=x_T, e=eps: model.head.sample(z, x, e)),
        ):
            run()
            out[what][str(count)] = round(statistics.median(timed(run, device) for _ in range(repeats)), 3)
    return out


def call_costs(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """c = draft / target, of a trunk pass and a head run of one row, for every smaller model as a draft."""
    cost = {name: figures["trunk_ms"]["1"] + figures["head_ms"]["1"] for name, figures in found.items()}
    names = list(found)
    return {
        f"{draft} / {target}": round(cost[draft] / cost[target], 3)
        for i, target in enumerate(names)
        for draft in names[:i]
    }


def goal(result: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at, and what came."""
    row = next(r for r in result["cfg_1"] if r["name"] == GOAL["row"])
    single = result["batch_1"]["ways"][GOAL["row"]]
    return {
        **GOAL,
        "found": {"tokens_per_round": row["tokens_per_round"], "rms": row["rms"], "speedup": single["speedup"]},
        "passed": {
            "tokens_per_round": row["tokens_per_round"] >= GOAL["tokens_per_round"],
            "rms": row["rms"] <= GOAL["rms"],
            "speedup": single["speedup"] > GOAL["speedup"],
        },
    }


def write(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")


def plot(result: dict[str, Any], file: Path) -> None:
    """Deviation from plain decoding over speed-up at batch 1, one point a way; fewer steps as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: f for name, f in result["batch_1"]["ways"].items() if name != "plain"}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    groups = [
        ("plain with fewer steps", "plain", "o-"),
        ("coupled", "coupled, ", "s-"),
        ("coupled by the draft", "coupled by", "s"),
        ("exact (another sample, same law)", "exact", "^"),
        ("CSpD", "cspd", "x"),
    ]
    for label, start, style in groups:
        points = sorted((f["speedup"], max(f["rms"], 1e-5)) for name, f in found.items() if name.startswith(start))
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(yscale="log", xlabel="times as fast as plain decoding, one picture", ylabel="RMS difference to it")
    axes.set_title(f"tiny-mar, {result['device']}; {result['batch_1']['speedup_of']}", fontsize=9)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def tables(result: dict[str, Any]) -> str:
    """The rows of a result as Markdown."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    out = ["| way | acceptance | tokens / round | RMS | recognised | passes | rows | draft passes |", "|---" * 8 + "|"]
    guided = {row["name"]: row for row in result.get("cfg_2", [])}
    for row in result["cfg_1"]:
        pair = [row, guided[row["name"]]] if row["name"] in guided else [row]
        cells = [
            " / ".join(cell(r[name], digits) for r in pair)
            for name, digits in (("acceptance", 2), ("tokens_per_round", 2), ("rms", 4), ("recognised", 2))
        ]
        counts = [" / ".join(str(r[name]) for r in pair) for name in ("target_passes", "target_rows", "draft_passes")]
        out.append("| " + " | ".join([row["name"], *cells, *counts]) + " |")
    out += [
        "",
        f"| one picture | passes | RMS | times as fast ({result['batch_1']['speedup_of']}) |",
        "|---|---|---|---|",
    ]
    for name, f in result["batch_1"]["ways"].items():
        out.append(f"| {name} | {f['target_passes']:.1f} | {f['rms']:.4f} | {f['speedup']:.2f} |")
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="print the result file as Markdown instead of measuring")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, default=shipped(), help="another pair: a folder with a subfolder draft")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="of the runs at batch 1")
    parser.add_argument("--cfg", type=float, nargs="*", default=[1.0, 2.0])
    args = parser.parse_args(arguments)
    if args.tables:
        print(tables(json.loads(args.out.read_text())))
        return
    device = torch.device(args.device)
    target = load_mar(args.weights, device=device).requires_grad_(False)
    draft = load_draft(args.weights, device=device).requires_grad_(False)
    files = {"target": args.weights / "model.safetensors", "draft": args.weights / "draft" / "model.safetensors"}
    result: dict[str, Any] = {
        **{name: value for name, value in environment(device).items() if name != "peak_memory"},
        "weights_sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
        "samples": args.samples,
        "steps": target.config.seq_len,
        "denoising_steps": target.config.num_sampling_steps,
    }
    started = time.perf_counter()
    result["batch_1"] = single_rows(target, draft, args.rounds, device)
    for cfg in args.cfg:
        result[f"cfg_{cfg:g}"] = batch_rows(target, draft, args.samples, cfg, seed=0)
        write(result, args.out)  # what there is, should the rest be cut off
    result["goal"] = goal(result)
    if device.type == "cuda":
        found = {name: geometry(name, device, rows=(1, 2, 4, 8, 16, 32, 64)) for name in GEOMETRIES}
        result["geometry"] = {**found, "dtype": "bfloat16", "call_costs": call_costs(found)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    write(result, args.out)
    plot(result, args.out.with_suffix(".png"))
    print(json.dumps({"goal": result["goal"], "batch_1": result["batch_1"]["ways"]}, indent=2))


if __name__ == "__main__":
    main()
