"""``wrap`` and ``unwrap``: resolve what was asked for, pick the runtime, attach or detach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from kvcache import RetentionPolicy
from vlmeff import zoo
from vlmeff.config import TokensArgument, make_plan
from vlmeff.errors import ConfigError, UnsupportedModelError
from vlmeff.vlm.speculating import with_text_speculation
from vlmeff.vlm.wrapped import STATE, attach, detach

if TYPE_CHECKING:
    from vlmeff.diffusion.plan import Quant

M = TypeVar("M")


def wrap(
    model: M,
    preset: str | None = "fast",
    *,
    tokens: TokensArgument | None = None,
    kv: RetentionPolicy | str | Mapping[str, Any] | Literal[False] | None = None,
    text_speculation: object = None,
    quant: Quant | str | Mapping[str, Any] | Literal[False] | None = None,
    draft: object = None,
    **overrides: Any,
) -> M:
    """Make a model cheaper to run without changing how it is called.

    The same object comes back. It stays an instance of its own class, takes the same calls and keeps the same output
    contract: ``out[:, :input_ids.shape[1]]`` of ``generate`` is the caller's prompt. Wrapping again replaces the
    configuration.

    Args:
        model: a transformers vision-language model, a video pipeline or transformer of diffusers, or a MAR
            generator (``vlmeff.presets()`` and the README list what is supported).
        preset: a name from ``model_zoo.yaml``; None applies only what is named.
        tokens: a token reduction method (``vlmeff.HiPrune(keep=0.5)``) or its name; replaces the preset's. A list
            joins one method before the language model with one inside it (``vlmeff.AdaptInfer``).
        kv: a KV retention policy (``vlmeff.PrefixKV(keep_ratio=0.3)``), its name, or {"policy": name, ...} with its
            arguments; replaces the preset's. Language models with full-attention layers will do, pictures or not. A
            preset's retention is left out of calls that it cannot take part in (static caches, torch.compile,
            training); ``kv=False`` leaves it out of all.
        quant: for video models, a scheme's name, ``vlmeff.Quant("w8a8_int8")`` or False; replaces the preset's.
        text_speculation: "lookup", "recycle", a smaller model of the same tokenizer, or ``vlmeff.TextSpeculation``:
            ``generate`` drafts tokens and verifies several in one pass; the greedy text is that without it, sampled
            text has the same law. One row at a time.
        draft: of MAR generators, a smaller generator of the same tokens, for the modes that use one.
        **overrides: fields of the token method or the policy, for example ``keep=0.5``; and
            ``newline`` ("drop", "keep", "rows"): which separators of tiled pictures stay;
            ``positions`` ("repack", "keep"): how the survivors of one-dimensional positions are numbered;
            ``text_source``: what scores tokens against the question;
            ``min_visual_tokens``: requests with fewer per row are left alone;
            ``kv_storage`` ("int8", "int4", "int2"): how the entries that KV retention keeps are stored;
            ``kv_headroom`` (columns): allocated ahead, so that a step need not copy the cache.
            Of video models: fields of ``vlmeff.Quant``; ``cache``: a feature cache of diffusers ("first_block") or
            False; ``attention_backend``: one of diffusers'; ``compile``: compile the repeated blocks.
            Of MAR generators: fields of ``vlmeff.Continuous`` (``mode``, ``window``, ``delta``, ...), or
            ``continuous=vlmeff.Continuous(...)``.
    Raises:
        UnsupportedModelError: nothing of what was asked for applies to this model.
        UnknownPresetError, UnknownNameError, ConfigError: an argument cannot work; the message names it.
    """
    if is_diffusion(model):
        from vlmeff.diffusion import plan as video
        from vlmeff.diffusion.wrapped import attach as attach_video

        inapplicable = {"tokens": tokens, "kv": kv, "text_speculation": text_speculation, "draft": draft}
        attach_video(model, video.make_plan(model, preset, quant=quant, inapplicable=inapplicable, overrides=overrides))
        return model
    if is_generator(model):
        from vlmeff.speculative import plan as image
        from vlmeff.speculative.wrapped import attach as attach_generator

        inapplicable = {"tokens": tokens, "kv": kv, "text_speculation": text_speculation, "quant": quant}
        config = image.make_plan(model, preset, draft=draft, inapplicable=inapplicable, overrides=overrides)
        attach_generator(model, config, draft)
        return model
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"wrap: {type(model).__name__} is neither a transformers model nor a diffusers pipeline. Pass the object "
            "itself, for example AutoModelForImageTextToText.from_pretrained(...)."
        )
    unavailable = {"quant": quant, "draft": draft}
    plan, family = make_plan(model, preset, tokens=tokens, kv=kv, unavailable=unavailable, overrides=overrides)
    if text_speculation is not None:
        plan = with_text_speculation(model, plan, text_speculation)
    attach(model, plan, family)
    return model


def unwrap(model: M) -> M:
    """Give back exactly the model that was wrapped. A model that is not wrapped is an error."""
    if not is_wrapped(model):
        raise ConfigError("unwrap: the model is not wrapped.")
    if is_diffusion(model):
        from vlmeff.diffusion.wrapped import detach as detach_video

        detach_video(model)
    elif is_generator(model):
        from vlmeff.speculative.wrapped import detach as detach_generator

        detach_generator(model)
    else:
        detach(model)  # type: ignore[arg-type]
    return model


def is_diffusion(model: object) -> bool:
    """Whether this is a pipeline or model of diffusers; does not import diffusers."""
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.")}
    return bool(names & {"DiffusionPipeline", "ModelMixin"})


def is_wrapped(model: object) -> bool:
    """Whether ``wrap`` is in force on this object."""
    return STATE in getattr(model, "__dict__", {})


def is_generator(model: object) -> bool:
    """Whether this is a MAR generator (``vlmeff.models.mar``); does not import it."""
    return any(cls.__module__.startswith("vlmeff.models.mar.") for cls in type(model).__mro__)


class PresetTable(list["zoo.PresetRow"]):
    """Rows of ``presets``; prints as a table."""

    def __str__(self) -> str:
        cells = [("preset", "status", "tokens", "steps", "summary")]
        for row in self:
            tokens = "" if row.tokens_in is None else f"{row.tokens_in} -> {row.tokens_kept}"
            cells.append((row.preset, row.status or "", tokens, row.steps, row.summary))
        widths = [max(len(c[i]) for c in cells) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def presets(model: Any | None = None) -> PresetTable:
    """The presets of the model zoo; with a model, what each is for it and how far it is proven."""
    return PresetTable(zoo.preset_table(model))
