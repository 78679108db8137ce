"""The loop that trains one stage of a shipped model: saves itself, goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY = 25


def train_stage(
    stage: str,
    modules: nn.Module,
    step_loss: Callable[[int], tuple[Tensor, str]],
    *,
    steps: int,
    peak: float,
    work: Path,
) -> None:
    """Train ``modules`` for ``steps`` steps, from ``work/<stage>.pt`` on if there is one.

    ``step_loss(step)`` draws its examples from the step's number, so a resumed run sees what an unbroken one would.

    Raises:
        SystemExit: the checkpoint is of a run with another number of steps, whose learning rates were others.
    """
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1, pct_start=0.1)
    file, done, spent = work / f"{stage}.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(f"{file} is of a run with {state['steps']} steps, not {steps}; use another --out.")
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, spent = state["step"], state["seconds"]
    start = time.monotonic() - spent
    for step in range(done, steps):
        loss, note = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seconds = time.monotonic() - start
        if step % 10 == 0 or step + 1 == steps:
            left = seconds / (step + 1) * (steps - step - 1)
            progress = f"{stage} {step + 1}/{steps} {seconds:.0f} s, {left:.0f} s left"
            print(f"{progress}, loss {loss.item():.3f} {note}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "steps": steps,
                "seconds": seconds,
            }
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
