"""The training loop of every stage: AdamW, one cycle of the learning rate, a moving average, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY = 50


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for every step, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def fit(
    stage: str,
    module: nn.Module,
    step_loss: Callable[[int], tuple[Tensor, str]],
    *,
    steps: int,
    peak_lr: float,
    work: Path,
    average: float = 0.0,
    cycle: int | None = None,
    save_every: int = SAVE_EVERY,
) -> nn.Module:
    """Train ``module`` for ``steps`` steps, from ``work/<stage>.pt`` on if there is one.

    Args:
        step_loss: step -> (loss, note for the progress line); draws everything from ``seeded(..., step)``.
        average: decay of an exponential moving average of the weights, 0 for none.
        cycle: steps of the learning rate's cycle; it may be cut short, which the average makes up for.
    Returns:
        the module, holding the averaged weights if there are any.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=(cycle or steps) + 1, pct_start=0.1)
    averaged = [p.detach().clone() for p in parameters] if average else []
    file, done, spent = work / f"{stage}.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(f"{file} is of a run with {state['steps']} steps, not {steps}; use another --work.")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        averaged = state["averaged"]
        done, spent = state["step"], state["seconds"]
    start, losses = time.monotonic() - spent, []
    for step in range(done, steps):
        loss, note = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            # The first steps are forgotten faster: a long memory would keep the random start.
            decay = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
        seconds = time.monotonic() - start
        if (step + 1) % 20 == 0 or step + 1 == steps:
            left = seconds / (step + 1) * (steps - step - 1)
            mean = sum(losses) / len(losses)
            progress = f"{stage} {step + 1}/{steps} {seconds:.0f} s, {left:.0f} s left"
            print(f"{progress}, loss {mean:.4f} {note}", flush=True)
            losses = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "averaged": averaged,
                "step": step + 1,
                "steps": steps,
                "seconds": seconds,
            }
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    with torch.no_grad():
        for parameter, mean_value in zip(parameters, averaged, strict=False):
            parameter.copy_(mean_value)
    return module.eval()
