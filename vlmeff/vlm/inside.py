"""What runs inside the language model while a call goes through it: token pruning between layers, KV retention."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcache.cache import RetainedCache
from kvcache.controller import RetainedCall
from kvcache.report import RetentionReport
from kvcache.request import retained_call
from vlmeff.errors import RetentionStateError, UnsupportedCacheError, UnsupportedMaskError
from vlmeff.reporting import placeholders
from vlmeff.vlm.families import Family, family_of
from vlmeff.vlm.inner import INNER_RECORD, InnerPruning
from vlmeff.vlm.inner_request import prepare
from vlmeff.vlm.prompt import plan_shortening
from vlmeff.vlm.retention import decoder_of

if TYPE_CHECKING:
    from vlmeff.config import Plan

logger = logging.getLogger("vlmeff")


@dataclass(eq=False)
class Inside(AbstractContextManager["Inside"]):
    """The hooks of one call: ``with inside_call(...) as inside: output = original(**kwargs)``."""

    inner: InnerPruning | None = None
    retention: RetainedCall | None = None
    _continues: bool = False
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def is_step(self) -> bool:
        """Whether the call went on from a cache of its own, as a step of a hand-written loop does."""
        return self._continues

    def retention_report(self) -> RetentionReport | None:
        """What the cache kept; None without retention."""
        return None if self.retention is None else self.retention.cache.report()

    def __enter__(self) -> Inside:
        with ExitStack() as stack:
            for part in (self.inner, self.retention):
                if part is not None:
                    stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def inside_call(
    model: Any, plan: Plan, family: Family | None, kwargs: dict[str, Any], *, generating: bool, skipped: bool
) -> Inside:
    """Prepare one call. ``kwargs`` are those of the model's own method; a retained cache is added to them.

    A cache that was pruned or retained is gone on from, whatever the plan has become since. ``skipped``: the request is
    below the preset's ``min_visual_tokens``, so the preset's steps are left out.
    """
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    visual = None if ids is None else placeholders(model, ids)
    out = Inside(_continues=cache is not None and int(cache.get_seq_length()) > 0 and not generating)
    if plan.inner is not None or hasattr(cache, INNER_RECORD):
        schedule = None if plan.inner is None or skipped else plan.inner.schedule
        text_model = (family or family_of(model)).text_model(model)
        out.inner = prepare(model, text_model, schedule, kwargs, visual=visual, generating=generating)
    if plan.kv is not None or isinstance(cache, RetainedCache):
        out.retention = _retention(model, plan, kwargs, visual, generating=generating, skipped=skipped)
    return out


def _retention(
    model: Any, plan: Plan, kwargs: dict[str, Any], visual: Tensor | None, *, generating: bool, skipped: bool
) -> RetainedCall | None:
    """A preset's retention is left out of a call that it cannot take part in; asked for by name, it says so."""
    cache = kwargs.get("past_key_values")
    optional = plan.kv_optional and not isinstance(cache, RetainedCache)
    if optional and (cache is not None or skipped):
        return None  # the caller's own cache, or a request that the preset leaves alone
    if optional and not generating and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        logger.info("vlmeff: a forward pass that gradients may be taken of goes without the preset's KV retention")
        return None
    if optional and not generating and _padded_behind(kwargs.get("attention_mask")):
        logger.info("vlmeff: a forward pass with padding behind real tokens goes without the preset's KV retention")
        return None
    try:
        return retained_call(
            model,
            decoder_of(model),
            plan.kv,
            kwargs,
            generating=generating,
            vision=visual,
            storage=plan.kv_storage,
            headroom=plan.kv_headroom,
        )
    except (UnsupportedCacheError, UnsupportedMaskError, RetentionStateError) as error:
        if not optional:
            raise
        logger.info("vlmeff: a call goes without the preset's KV retention: %s", error)
        return None


def _padded_behind(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, :-1].bool() & ~mask[:, 1:].bool()).any())


def kept_columns(keep: Tensor, mask: Tensor | None, inner: InnerPruning | None) -> Tensor:
    """[B, L] bool: the caller's columns that a forward pass returns, after dropping between layers too."""
    columns = None if inner is None or inner.record is None else inner.record.columns[-1]
    if columns is None:
        return keep
    valid = torch.ones_like(keep) if mask is None else mask.to(keep.device).bool()
    if bool(keep.all()):  # nothing was lost before the language model: its columns are the caller's
        return torch.zeros_like(keep).scatter(1, columns.to(keep.device), True)
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    origin = plan_shortening(keep, valid).apply(places, -1).gather(1, columns.to(keep.device))
    rows, real = torch.arange(len(keep), device=keep.device)[:, None].expand_as(origin), origin >= 0
    final = torch.zeros_like(keep)
    final[rows[real], origin[real]] = True
    return final
