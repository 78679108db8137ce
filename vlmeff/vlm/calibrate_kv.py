"""Measure a PrefixKV recipe: the share of its entries that each layer keeps, on average over samples.

Each sample goes through the model once, without generating, in a cache whose policy keeps everything and notes what the
layers were measured to receive; the budgets of every sample come from the same solver that PrefixKV uses per prompt
(``kvcache.budget.solve_budgets``).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcache import PrefixKV, Recipe
from kvcache.cache import RetainedCache
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection
from kvcache.recipe_averaging import UNSTABLE_ABOVE, half_difference, mean_shares, renormalise, std_shares
from kvcache.request import retained_call
from vlmeff.config import described as described_methods
from vlmeff.errors import BudgetTooSmallError, ConfigError, DataError, IncompatibleError
from vlmeff.vlm.cost import head_dim, kv_heads
from vlmeff.vlm.retention import check_retention, decoder_of, names_of
from vlmeff.vlm.wrapped import STATE

BUDGETS = tuple(tenths / 10 for tenths in range(1, 10))
PARTIAL_FORMAT = "vlmeff kv calibration, unfinished"
DIGITS = 6  # of a share in the file


@dataclass(frozen=True, kw_only=True)
class PromptBudgets:
    """One prompt of ``n`` real tokens: for each budget, in order, the entries that each retained layer keeps."""

    n: int
    kept: list[list[int]]


class PromptTooShortError(BudgetTooSmallError):
    """A prompt whose ``budget`` does not hold what always stays; ``what`` says so, without a remedy."""

    def __init__(self, budget: float, prompt_tokens: int, layers: int, policy: PrefixKV) -> None:
        self.budget = budget
        protected = policy.sink + policy.recent
        self.what = (
            f"{budget:g} of a prompt of {prompt_tokens} tokens is {budget * prompt_tokens:.1f} entries in each of "
            f"{layers} layers, less than the {min(prompt_tokens, protected + 1)} that always stay (sink {policy.sink}, "
            f"recent {policy.recent}, and one more)"
        )
        super().__init__(
            f"budgets: {self.what}. Leave {budget:g} out of budgets, pass policy=PrefixKV(sink=..., recent=...) with "
            "fewer, or samples with longer prompts."
        )


@dataclass(frozen=True, kw_only=True)
class _Recorder:
    """A policy that keeps everything and notes what it is shown, row by row."""

    needs: ScoreSpec
    shown: list[list[LayerStats]] = field(default_factory=list)
    # A cache whose policy keeps all of it measures nothing.
    keep_ratio: ClassVar[float] = 0.5
    selection: ClassVar[Selection] = "shared"
    scope: ClassVar[Scope] = "model"
    query_aware: ClassVar[bool] = True

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        self.shown.append(stats)
        return [layer.n for layer in stats]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        return torch.arange(k)  # k is n


@torch.no_grad()
def calibrate_prefixkv(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    budgets: Sequence[float] = BUDGETS,
    policy: PrefixKV | None = None,
    partial: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Recipe:
    """Derive the recipe of a model from samples of its use.

    Args:
        model: a transformers model whose cache can be retained, in eval mode; with pictures or without. Wrapped with
            the token method that it is deployed with (and kv=False), the prompts are shortened by that first.
        samples: outputs of its processor, one prompt or a left-padded batch each, with the prompt template that it is
            deployed with. 16 to 64 prompts. Each is a forward pass; held are a few integers of each.
        budgets: shares kept, averaged over the layers, in (0, 1).
        policy: what importance is and what always stays (``metric``, ``window``, ``sink``, ``recent``); its keep_ratio
            is not looked at. None: ``PrefixKV()``.
        partial: a file that gets a line after every sample; samples whose line is there already are not run again, so
            that a broken calibration goes on where it was. None: no file.
        about: "model" (its name), "revision" (of the weights), "source" (of the samples), for the recipe.
        progress: called with the number of prompts measured so far.
    Returns:
        the recipe. ``calibration["half_difference"]`` has for each budget the mean absolute difference between the
        recipes of two random halves of the prompts.
    Warns:
        two halves differ by more than 0.03.
    Raises:
        UnsupportedModelError, IncompatibleError: the model.  DataError: no samples, or prompts too short for a budget.
        BudgetTooSmallError: a budget does not hold the protected tokens of a prompt (``PromptTooShortError``).
        ConfigError: the budgets, or a partial file of other settings.

    Source: "PrefixKV", arXiv 2412.03409. The official script writes evicted shares and leaves the averaging to the
    user; here each list is scaled to its budget.
    """
    token_pruning = _token_pruning(model)
    if model.training:
        raise IncompatibleError("calibrate prefixkv: the model is in training mode; call model.eval() first.")
    budgets = check_budgets(budgets)
    # A clamped budget would be another one: the average would not be that of its key.
    policy = replace(policy or PrefixKV(), recipe=None, on_small_budget="raise")
    check_retention(model, policy)
    described = _model(model, about or {})
    settings = _settings(described, budgets, policy, model, token_pruning)
    done = None if partial is None else _Partial(Path(partial), settings)
    found: list[PromptBudgets] = []
    for sample in samples:
        key = None if done is None else _digest(sample)
        rows = None if done is None else done.rows.get(key or "")
        if rows is None:
            rows = measure(model, sample, budgets=budgets, policy=policy)
            if done is not None:
                done.add(key or "", rows)
        found += rows
        if progress is not None:
            progress(len(found))
    if not found:
        raise DataError("calibrate prefixkv: there are no samples; pass outputs of the model's processor.")
    return _recipe(
        found,
        model,
        described,
        budgets=budgets,
        policy=policy,
        source=(about or {}).get("source"),
        token_pruning=token_pruning,
    )


def _token_pruning(model: Any) -> str | None:
    """What a wrapped model does to the prompt before its language model; raises when it does more than that."""
    if STATE not in model.__dict__:
        return None
    plan = model.__dict__[STATE].plan
    if plan.kv is not None or plan.inner is not None:
        what = "retains its cache already" if plan.kv is not None else "drops tokens between layers (AdaptInfer)"
        raise IncompatibleError(
            f"calibrate prefixkv: the wrapped model {what}. Wrap it with kv=False and a method that works before the "
            "language model, or unwrap it."
        )
    return described_methods(plan.methods)


def check_budgets(budgets: Sequence[float]) -> list[float]:
    """The budgets ascending, each once; raises ``ConfigError`` unless they are shares in (0, 1)."""
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < 1:
            raise ConfigError(f"budgets: {budget!r} must be a share in (0, 1), such as 0.3.")
    if not budgets:
        raise ConfigError("budgets: there is none; pass shares in (0, 1), such as 0.2, 0.5.")
    return sorted({float(budget) for budget in budgets})


@torch.no_grad()
def measure(
    model: Any, sample: Mapping[str, Any], *, budgets: Sequence[float], policy: PrefixKV
) -> list[PromptBudgets]:
    """Run one sample and solve the budgets of each of its prompts."""
    if "input_ids" not in sample and "inputs_embeds" not in sample:
        raise DataError("calibrate prefixkv: a sample has no input_ids; pass the processor's outputs.")
    kwargs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in sample.items()}
    kwargs["use_cache"] = True
    recorder = _Recorder(needs=policy.needs)
    if STATE in model.__dict__:
        _run_wrapped(model, recorder, kwargs)
    else:
        call = retained_call(model, decoder_of(model), recorder, kwargs, generating=False)
        assert call is not None
        with call:
            model.base_model(**kwargs)  # the logits are not needed
    out = []
    for stats in recorder.shown:
        kept = []
        for budget in budgets:
            try:
                allocation = replace(policy, keep_ratio=budget).allocate(stats)
            except BudgetTooSmallError as error:
                raise PromptTooShortError(budget, stats[0].n, len(stats), policy) from error
            kept.append([int(k) for k in allocation.kept])
        out.append(PromptBudgets(n=stats[0].n, kept=kept))
    return out


def _run_wrapped(model: Any, recorder: _Recorder, kwargs: Mapping[str, Any]) -> None:
    """A forward pass as the plan has it, with the recorder for its retention."""
    state = model.__dict__[STATE]
    plan, report = state.plan, state.report
    state.plan = replace(plan, kv=recorder, kv_optional=False)
    try:
        model(**kwargs)
    finally:
        state.plan, state.report = plan, report


def _recipe(
    found: Sequence[PromptBudgets],
    model: Any,
    described: Mapping[str, Any],
    *,
    budgets: Sequence[float],
    policy: PrefixKV,
    source: str | None,
    token_pruning: str | None,
) -> Recipe:
    keep_ratios, std, halves = {}, {}, {}
    for i, budget in enumerate(budgets):
        shares = [[k / prompt.n for k in prompt.kept[i]] for prompt in found]
        keep_ratios[budget] = tuple(round(x, DIGITS) for x in renormalise(mean_shares(shares), budget))
        std[budget] = tuple(round(x, DIGITS) for x in std_shares(shares))
        if len(shares) > 1:
            with warnings.catch_warnings():  # one warning for all budgets, below
                warnings.simplefilter("ignore", UserWarning)
                halves[str(budget)] = round(half_difference(shares), DIGITS)
    unstable = {budget: x for budget, x in halves.items() if x > UNSTABLE_ABOVE}
    if unstable:
        worst = max(unstable, key=lambda budget: unstable[budget])
        warnings.warn(
            f"calibrate prefixkv: the recipes of two random halves of the {len(found)} prompts differ by "
            f"{unstable[worst]:.3f} on average at the budget {worst} (more than {UNSTABLE_ABOVE}); calibrate on more.",
            stacklevel=4,  # past the decorator
        )
    return Recipe(
        keep_ratios=keep_ratios,
        std=std,
        layers=RetainedCache(model.config, policy).retained,
        metric=policy.metric,
        metric_args={"window": policy.window} if policy.metric == "window" else {},
        sink=policy.sink,
        recent=policy.recent,
        model=described,
        calibration={
            "dataset": source,
            "samples": len(found),
            "mean_prompt_tokens": round(math.fsum(prompt.n for prompt in found) / len(found), 2),
            "token_pruning": token_pruning,
            "half_difference": halves,
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": _versions(),
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
    )


def _model(model: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    text = model.config.get_text_config(decoder=True)
    names = names_of(model)
    revision = {"revision": about["revision"]} if about.get("revision") else {}
    return {
        "id": about.get("model") or (names[0] if names else None),
        **revision,
        "model_type": model.config.model_type,
        "text_model_type": text.model_type,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": kv_heads(text),
        "head_dim": head_dim(text),
    }


def _versions() -> dict[str, str]:
    import transformers

    from vlmeff import __version__

    return {"vlmeff": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}


# -- the file of an unfinished calibration: a line of settings, then a line for each sample


def _settings(
    described: Mapping[str, Any],
    budgets: Sequence[float],
    policy: PrefixKV,
    model: Any,
    token_pruning: str | None,
) -> dict[str, Any]:
    return {
        "format": PARTIAL_FORMAT,
        "model": dict(described),
        "budgets": list(budgets),
        **{name: getattr(policy, name) for name in ("metric", "window", "sink", "recent")},
        "token_pruning": token_pruning,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": _versions(),
    }


class _Partial:
    """``rows``: what is known of each sample, by its digest."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, list[PromptBudgets]] = {}
        # A line is whole once its newline is there: what follows the last one was being written when the run ended.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines:
            self._check(lines[0], settings)
        for number, line in enumerate(lines[1:], 2):
            try:
                record = json.loads(line)
                self.rows[str(record["sample"])] = [PromptBudgets(**row) for row in record["prompts"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not of a calibration ({error!r}); delete the file.") from error
        path.write_text("".join(line + "\n" for line in lines or [json.dumps(settings)]), encoding="utf-8")

    def _check(self, line: str, settings: Mapping[str, Any]) -> None:
        try:
            theirs = json.loads(line)
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict) or theirs.get("format") != PARTIAL_FORMAT:
            raise DataError(f"{self.path}: not the file of an unfinished calibration; move it away.")
        other = [name for name, value in settings.items() if theirs.get(name) != value]
        if other:
            raise ConfigError(
                f"{self.path} was begun with other settings ({', '.join(other)}): calibrate as then, or delete it."
            )

    def add(self, key: str, rows: list[PromptBudgets]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sample": key, "prompts": [asdict(row) for row in rows]}) + "\n")


def _digest(sample: Mapping[str, Any]) -> str:
    """Of everything that the model is given."""
    digest = hashlib.sha256()
    for name, value in sorted(sample.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
