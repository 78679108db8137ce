"""The training loop of QVGen: a fake-quantized student learns to predict what the full-precision teacher predicts.

Source: "QVGen" (arXiv 2505.11497). Everything random is a function of (seed, step) alone, so a resumed run sees what an
unbroken one would.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.diffusion.qvgen.config import NOT_PART_OF_THE_RESULT, TrainingConfig
from vlmeff.diffusion.qvgen.data import Clips, collate, order, split
from vlmeff.diffusion.qvgen.denoising import TIMESTEPS, Noising, Velocity, noising_of, velocity_of
from vlmeff.diffusion.qvgen.fake_quant import FakeQuantLinear, slot_of
from vlmeff.diffusion.qvgen.prepare import cast, parameter_groups, prepare_qat, set_slot, set_switches
from vlmeff.diffusion.qvgen.rank_decay import RankController
from vlmeff.errors import CheckpointError, ConfigError, QuantConfigError, VlmeffError

CHECKPOINT, LOG, PLOT = "training.pt", "log.jsonl", "training.png"
CHECKPOINT_VERSION = 1
VALIDATION_SEED = 1 << 40  # apart from the seeds of steps

Row = dict[str, Any]


class DivergedError(VlmeffError, FloatingPointError):
    """The loss or the gradient of a training run is NaN or infinite."""

    exit_code = 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finished run.

    Attributes:
        layers: the fake-quantized layers by name; Phi is gone, unless ``phi="keep"``.
        history: rows of the log: "step", "loss", "grad_norm", "rank", "phi_share", "lr"; and "step", "validation",
            "validation_without_phi".
        dtype: of the matrix products, which the parts that are not quantized can be stored in.
        seconds: of this call.
    """

    transformer: nn.Module
    layers: Mapping[str, FakeQuantLinear]
    config: TrainingConfig
    history: tuple[Row, ...]
    dtype: torch.dtype
    seconds: float

    @property
    def final_validation(self) -> float | None:
        """The held-out loss of the last check, None without held-out clips."""
        checks = [row["validation"] for row in self.history if "validation" in row]
        return checks[-1] if checks else None


def train(
    transformer: nn.Module,
    clips: Clips,
    scheduler: Any,
    config: TrainingConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    empty_prompt: Tensor | None = None,
    velocity: Velocity | None = None,
    layers: list[str] | None = None,
    progress: Callable[[Row], None] | None = None,
    stop_at: int | None = None,
) -> Training:
    """Train a transformer for quantization, in place; it is its own teacher as it comes in.

    Args:
        transformer: full precision, on the device to train on.
        clips: (latents [C, F, H, W], prompt [L, D]) pairs: a ``ClipFolder`` or any sequence.
        scheduler: the pipeline's, for its kind of noise and its shift.
        out: folder for checkpoint, log and plot; None keeps nothing.
        resume: go on from the checkpoint in ``out`` where there is one; the transformer must be the original one.
        empty_prompt: [L, D] for dropped conditions; that of the ``ClipFolder`` by default.
        velocity: how to call a transformer whose class is not known (``velocity_of``).
        layers: names of the layers to quantize instead of the rules.
        progress: called with every row of the log.
        stop_at: stop before this step, with a checkpoint; the run can be resumed.
    Raises:
        QuantConfigError, UnsupportedModelError, DataError: settings, model or data do not fit.
        CheckpointError: the checkpoint is of another run.
        DivergedError: NaN; the last checkpoint stands.
    """
    folder = None if out is None else Path(out)
    saved = _load_checkpoint(folder) if resume else None
    if folder is not None:
        if saved is None and (folder / CHECKPOINT).exists():
            raise ConfigError(f"{str(folder)!r} holds a training run: pass resume=True to go on, or another folder.")
        folder.mkdir(parents=True, exist_ok=True)
    if resume and folder is None:
        raise ConfigError("resume=True needs out=, the folder of the run.")
    run = _Run(transformer, clips, scheduler, config, empty_prompt, velocity, layers, saved)
    return run.go(folder, progress or (lambda row: None), config.steps if stop_at is None else stop_at)


class _Run:
    """State of a run between steps."""

    def __init__(
        self,
        transformer: nn.Module,
        clips: Clips,
        scheduler: Any,
        config: TrainingConfig,
        empty_prompt: Tensor | None,
        velocity: Velocity | None,
        names: list[str] | None,
        saved: dict[str, Any] | None,
    ) -> None:
        self.config, self.clips = config, clips
        self.velocity = velocity or velocity_of(transformer)
        self.noising: Noising = noising_of(scheduler, config.shift)
        self.empty_prompt = empty_prompt if empty_prompt is not None else getattr(clips, "empty_prompt", None)
        if config.condition_dropout and self.empty_prompt is None:
            raise QuantConfigError(
                f"condition_dropout={config.condition_dropout:g} needs the embedding of the empty prompt: pass "
                "empty_prompt=, or set condition_dropout=0 (guidance then suffers)."
            )
        if len(clips) == 0:
            raise ConfigError("there are no clips to train on.")
        self.train_indices, self.held_out = split(clips, config.validation_clips)
        self.device = next(transformer.parameters()).device
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

        self.teacher = _frozen_copy(transformer, self.dtype)
        self.layers = prepare_qat(
            transformer,
            names if names is not None else config.rules,
            (config.w_bits, config.a_bits),
            config.phi,
            rank=config.rank,
            slots=config.slots,
            compat=config.compat,
            initialise=saved is None,
            recompute=config.gradient_checkpointing,
            seed=config.seed,
        )
        self.student = transformer.train().requires_grad_(True)
        block_checkpointing = getattr(transformer, "enable_gradient_checkpointing", None)
        if config.gradient_checkpointing and callable(block_checkpointing):
            block_checkpointing()
        self.step = 0
        self.history: list[Row] = []
        if saved is not None:
            self._check_same_run(saved)
            self._restore_student(saved)
        groups = parameter_groups(transformer, lr=config.lr, clip_lr=config.clip_lr, weight_decay=config.weight_decay)
        self.base_lr = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            if saved["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        self.controller = RankController(self.layers, config.schedule(), self.optimizer)

    def go(self, folder: Path | None, progress: Callable[[Row], None], stop_at: int) -> Training:
        start = time.monotonic()
        config = self.config
        log = None if folder is None else folder / LOG
        if log is not None:  # rows after the checkpoint that is resumed from come again
            log.write_text("".join(json.dumps(row) + "\n" for row in self.history))

        def note(row: Row) -> None:
            self.history.append(row)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress(row)

        while self.step < min(stop_at, config.steps):
            step = self.step
            note(self._one_step(step, folder))
            self.step = step + 1
            ends = self.step == config.steps
            if ends and config.phi != "keep":
                self.controller.finish()
            if self.held_out and (ends or (config.validate_every and self.step % config.validate_every == 0)):
                note({"step": step, **self._validate()})
            if folder is not None and (ends or (config.save_every and self.step % config.save_every == 0)):
                self._save(folder)
        if folder is not None and self.step < config.steps:
            self._save(folder)
        if folder is not None and self.history:
            if find_spec("matplotlib") is None:
                warnings.warn('no plot of the training: pip install "vlmeff[diffusion]" for matplotlib.', stacklevel=3)
            else:
                from vlmeff.diffusion.qvgen.plots import plot_training

                plot_training(self.history, folder / PLOT)
        self.student.eval()
        return Training(
            transformer=self.student,
            layers=self.layers,
            config=config,
            history=tuple(self.history),
            dtype=self.dtype,
            seconds=time.monotonic() - start,
        )

    def _one_step(self, step: int, folder: Path | None) -> Row:
        config = self.config
        self.controller.step(step)
        generator = torch.Generator().manual_seed((config.seed << 20) + step + 1)
        chosen = order(self.train_indices, step=step, batch_size=config.batch_size, seed=config.seed)
        loss = self._loss(chosen, generator, config.condition_dropout)
        factor = config.lr_factor(step)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        row = {
            "step": step,
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "rank": self.controller.rank,
            "phi_share": self.controller.phi_share(),
            "lr": config.lr * factor,
        }
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            kept = f" {folder / CHECKPOINT} still stands." if folder and (folder / CHECKPOINT).exists() else ""
            raise DivergedError(
                f"step {step}: the loss is {row['loss']:g} and the gradient norm {row['grad_norm']:g}; training "
                f"stopped.{kept} Lower lr (now {config.lr:g}) or clip_lr (now {config.clip_lr:g}), or check the clips."
            )
        self.optimizer.step()
        for layer in self.layers.values():
            layer.clamp_scales()
        return row

    def _loss(self, chosen: list[int], generator: torch.Generator, dropout: float) -> Tensor:
        """Mean squared difference of the predictions on noised clips; all randomness comes from the generator."""
        latents, prompts = collate(self.clips, chosen)
        latents, prompts = latents.float(), prompts.float()
        count = len(chosen)
        noise = torch.randn(latents.shape, generator=generator)
        index = self._timesteps(count, generator)
        dropped = torch.rand(count, generator=generator) < dropout
        if self.empty_prompt is not None and bool(dropped.any()):
            prompts = torch.where(dropped[:, None, None], self.empty_prompt.float(), prompts)
        noised = self.noising.add(latents.to(self.device), noise.to(self.device), index)
        t, prompts = self.noising.timesteps[index].to(self.device), prompts.to(self.device)
        if self.config.slots > 1:
            set_slot(self.student, t)
        with torch.no_grad():
            target = self.velocity(self.teacher, noised.to(self.dtype), t, prompts.to(self.dtype)).float()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.velocity(self.student, noised, t, prompts)
        return (predicted.float() - target).pow(2).mean()

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """[count] int64 into the timesteps: even; with clip slots all from the slot of the first."""
        index = torch.randint(TIMESTEPS, (count,), generator=generator)
        if self.config.slots == 1:
            return index
        slots = torch.tensor([slot_of(float(t), self.config.slots) for t in self.noising.timesteps])
        same = (slots == slots[index[0]]).nonzero().flatten()
        others = torch.randint(len(same), (count - 1,), generator=generator)
        return torch.cat([index[:1], same[others]])

    @torch.no_grad()
    def _validate(self) -> Row:
        """Loss on the held-out clips, at the same noise and timesteps every time, with and without Phi."""
        self.student.eval()
        results = {}
        for name, use_phi in (("validation", True), ("validation_without_phi", False)):
            set_switches(self.student, phi=use_phi)
            losses = [
                self._loss([clip], torch.Generator().manual_seed(VALIDATION_SEED + clip), 0.0) for clip in self.held_out
            ]
            results[name] = float(torch.stack(losses).mean())
        set_switches(self.student, phi=True)
        self.student.train()
        return results

    def _save(self, folder: Path) -> None:
        cuda = self.device.type == "cuda"
        state = {
            "version": CHECKPOINT_VERSION,
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "clips": len(self.clips),
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": self.history,
        }
        part = folder / f"{CHECKPOINT}.part"  # an interrupted write leaves the last checkpoint as it was
        torch.save(state, part)
        part.replace(folder / CHECKPOINT)

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        then = TrainingConfig.from_dict(saved["config"])
        free = {name: getattr(self.config, name) for name in NOT_PART_OF_THE_RESULT}
        if replace(then, **free) != self.config:
            now, before = self.config.to_dict(), saved["config"]
            changed = [name for name in now if now[name] != before.get(name) and name not in free]
            listed = ", ".join(f"{name} (was {before.get(name)!r}, is {now[name]!r})" for name in changed)
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: {listed}. Use them, or another folder."
            )
        if saved["layers"] != list(self.layers):
            raise CheckpointError("the checkpoint is of a run that quantized other layers; use its model and rules.")
        if saved["clips"] != len(self.clips):
            raise CheckpointError(
                f"the checkpoint is of a run on {saved['clips']} clips, these are {len(self.clips)}; use the same data."
            )

    def _restore_student(self, saved: dict[str, Any]) -> None:
        state = saved["student"]
        for name, layer in self.layers.items():
            if f"{name}.phi_L" not in state:
                layer.remove_phi()
        try:
            self.student.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).split("\n\t", 1)[-1].splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this transformer: {reason}") from error
        self.step, self.history = saved["step"], list(saved["history"])


def _frozen_copy(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The teacher: a copy without gradients, in the precision of the run, its sensitive parts in float32."""
    teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
    cast(teacher, dtype)
    return teacher


def _load_checkpoint(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / CHECKPOINT).exists():
        return None
    path = folder / CHECKPOINT
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what unpickling raises
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({type(error).__name__}); remove it to start anew."
        ) from error
    if not isinstance(saved, dict) or saved.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(f"{str(path)!r} is not a training checkpoint of this version.")
    return saved
