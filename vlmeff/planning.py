"""What a preset would do to a request, without running the model: ``vlmeff.plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from kvcache import RetentionPolicy
from kvcache.forecast import forecast_bytes
from tokenpruning import InnerPruner, Layout, Resampler, Selector
from vlmeff.config import Plan, TokensArgument, make_plan
from vlmeff.errors import ConfigError, VlmeffError
from vlmeff.reporting import format_bytes, visual_tokens
from vlmeff.vlm.choose import budgets_of
from vlmeff.vlm.cost import column_mean_flops, head_dim, kv_bytes, kv_heads, prefill_flops
from vlmeff.vlm.families import Family, family_of, is_vlm
from vlmeff.vlm.families.base import Modality, present
from vlmeff.vlm.reduce import rows_with_pictures

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a request costs without and with a preset. Everything is counted from sizes; nothing is measured.

    Tokens are those of all rows together. ``visual_tokens_after`` is what reaches the language model;
    ``visual_tokens_processed`` is its average over the layers, lower where tokens are dropped between layers.
    ``kv_bytes`` and ``prefill_gflops`` are of the prompt in the language model; ``scoring_gflops`` is what choosing
    tokens adds: attention of vision layers, comparison of all tokens, attention rows of the text between layers (a
    lower bound: pooling, sorting and a text source's CLIP are left out).

    ``kv_bytes_unretained`` is behind the token step, ``kv_bytes_after`` behind KV retention too, in the storage asked
    for, with its bookkeeping. Of one row it is what the report then measures behind the prompt, to the byte, but where
    PrefixKV or VL-Cache divide a quantized budget unevenly: there, off by 128 tokens of each layer in full precision at
    most. In a batch rows count as equally long, and a layer holds as many columns as the row that keeps most of it:
    with those two policies, expect up to 20 % more.
    """

    method: str
    preset: str | None
    visual_tokens_before: int
    visual_tokens_after: int
    visual_tokens_processed: float
    prompt_tokens_before: int
    prompt_tokens_after: int
    kv_bytes_before: int
    kv_bytes_unretained: int
    kv_bytes_after: int
    prefill_gflops_before: float
    prefill_gflops_after: float
    scoring_gflops: float
    pays_off: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("method", self.method),
            ("visual tokens", f"{self.visual_tokens_before} -> {self.visual_tokens_after}"),
            ("prompt tokens", f"{self.prompt_tokens_before} -> {self.prompt_tokens_after}"),
            ("KV cache of the prompt", f"{format_bytes(self.kv_bytes_before)} -> {format_bytes(self.kv_bytes_after)}"),
            ("LLM prefill GFLOP", f"{self.prefill_gflops_before:.3g} -> {self.prefill_gflops_after:.3g}"),
            ("scoring GFLOP", f"{self.scoring_gflops:.3g}"),
            ("expected to pay off", f"{'yes' if self.pays_off else 'no'}: {self.why}"),
        ]
        if self.visual_tokens_processed != self.visual_tokens_after:
            rows.insert(2, ("visual tokens, mean over layers", f"{self.visual_tokens_processed:.1f}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan(
    model: Any,
    inputs_or_size: Mapping[str, Any] | Size | Sequence[Size],
    preset: str | None = "fast",
    *,
    tokens: TokensArgument | None = None,
    kv: RetentionPolicy | str | Literal[False] | None = None,
    text_tokens: int = 64,
    **overrides: Any,
) -> Forecast:
    """Say what a preset would do, without running the model.

    Args:
        model: a transformers vision-language model, or for ``kv`` alone any language model, wrapped or not; its weights
            are not read, so one on the meta device will do.
        inputs_or_size: the processor's outputs for a request; or the (height, width) in pixels of a picture, or of
            several, which are counted as the model's processor prepares them by default.
        preset, tokens, kv, **overrides: as for ``wrap``.
        text_tokens: length of the text where only sizes are given.
    Raises:
        ConfigError, UnsupportedModelError: as ``wrap``; or the preset has no step for this model.
    """
    settings, family = make_plan(model, preset, tokens=tokens, kv=kv, unavailable={}, overrides=overrides)
    if family is None and settings.kv is None:
        raise ConfigError(
            "plan: the preset names no token step and no KV step, nor do tokens=... or kv=..., so there is nothing to "
            "plan."
        )
    if family is None and is_vlm(model) and not isinstance(inputs_or_size, Mapping):
        family = family_of(model)  # retention alone needs no family, but the size of a picture has to be told
    layouts, rows, pictured, prompt, pictures = _request(model, family, inputs_or_size, text_tokens)
    everything = [layout for group in layouts.values() for layout in group]
    before = sum(layout.n_slots for layout in everything)
    if family is None:
        before = visual_tokens(model, pictures["input_ids"])
    config = model.config.get_text_config()
    width = next(iter(model.parameters())).element_size()
    threshold = settings.reduction.min_visual_tokens
    skipped = before < threshold * pictured
    after = before if skipped or family is None else _kept(model, family, settings, layouts, pictures)
    text = prompt - before

    # As the report counts: rows taken as equally long (between layers they must have equally many visual tokens).
    per_row = _per_layer(settings.inner, round(after / rows), config.num_hidden_layers)
    per_layer = [n * rows for n in per_row] if settings.inner is not None else [after] * len(per_row)
    short = [round((text + n) / rows) for n in per_layer]
    full = round(prompt / rows)
    gflops_before = rows * prefill_flops(config, full) / 1e9
    gflops_after = rows * prefill_flops(config, short) / 1e9
    scoring = 0.0
    if not skipped and family is not None:
        scoring = _scoring_gflops(model, family, settings, everything)
        scoring += rows * _inner_scoring_gflops(config, settings.inner, round(after / rows), round(text / rows))
    saved = gflops_before - gflops_after
    unretained, kept = (rows * n for n in _kv_bytes(settings, model.config, short, width))
    if not settings.methods:
        pays_off, why = kept < unretained, "the cache gets smaller, prefill no cheaper"
    elif before == 0:
        pays_off, why = False, "there are no visual tokens"
    elif skipped:
        pays_off, why = False, f"fewer than {threshold} visual tokens per row: the token step is skipped"
    elif after == before and settings.inner is None:
        pays_off, why = False, "the budget keeps every token"
    else:
        pays_off = saved > scoring
        relation = "more" if pays_off else "less"
        why = f"prefill saves {saved:.3g} GFLOP, {relation} than the {scoring:.3g} that scoring costs"
    if settings.kv is not None:
        why += f"; KV retention leaves {format_bytes(kept)} of {format_bytes(unretained)}"
    return Forecast(
        method=settings.method_name,
        preset=settings.preset,
        visual_tokens_before=before,
        visual_tokens_after=after,
        visual_tokens_processed=sum(per_layer) / len(per_layer),
        prompt_tokens_before=prompt,
        prompt_tokens_after=text + after,
        kv_bytes_before=rows * kv_bytes(config, full, width),
        kv_bytes_unretained=unretained,
        kv_bytes_after=kept,
        prefill_gflops_before=gflops_before,
        prefill_gflops_after=gflops_after,
        scoring_gflops=scoring,
        pays_off=pays_off,
        why=why,
    )


def _kv_bytes(settings: Plan, config: Any, tokens: list[int], width: int) -> tuple[int, int]:
    """Bytes of one row's cache without and with retention; ``tokens`` per layer."""
    text = config.get_text_config()
    unretained = kv_bytes(text, tokens, width)
    if settings.kv is None:
        return unretained, unretained
    sizes = {"kv_heads": kv_heads(text), "head_dim": head_dim(text), "bytes_per_value": width}
    return unretained, forecast_bytes(config, settings.kv, tokens, rows=1, storage=settings.kv_storage, **sizes)


def _request(
    model: Any, family: Family | None, what: Any, text_tokens: int
) -> tuple[dict[Modality, list[Layout]], int, int, int, Mapping[str, Any]]:
    """The layouts of the pictures, the number of rows, of those with pictures, the tokens of all prompts, and what
    describes the pictures."""
    if isinstance(what, Mapping):
        ids = what.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ConfigError("plan: inputs have no input_ids; pass all of the processor's outputs.")
        mask = what.get("attention_mask")
        prompt = ids.numel() if mask is None else int(mask.sum())
        if family is None:
            return {}, len(ids), 0, prompt, what
        family.refuse_unsupported(model, what)
        layouts = {modality: family.layouts(model, what, modality) for modality in present(what)}
        return layouts, len(ids), rows_with_pictures(model, family, ids, list(layouts)), prompt, what
    if family is None:
        raise ConfigError(f"plan: {type(model).__name__} takes no pictures; pass inputs with input_ids, not {what!r}.")
    if not isinstance(what, Sequence) or not what:
        raise ConfigError(
            f"plan: {what!r} is neither the processor's inputs nor a picture's (height, width) in pixels."
        )
    sizes = [what] if len(what) == 2 and all(isinstance(n, int) for n in what) else list(what)
    for size in sizes:
        legal = isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not legal:
            raise ConfigError(f"plan: {size!r} is not a picture's (height, width) in pixels.")
    if type(text_tokens) is not int or text_tokens < 0:
        raise ConfigError(f"plan: text_tokens={text_tokens!r} must be an int >= 0.")
    try:
        of_sizes = [family.layout_of_size(model, height, width) for height, width in sizes]
    except VlmeffError:
        raise
    except ValueError as error:  # of transformers' resizing
        raise ConfigError(f"plan: {what!r} cannot be prepared by the model's processor: {error}") from error
    prompt = text_tokens + sum(layout.n_slots for layout in of_sizes)
    return {"image": of_sizes}, 1, 1, prompt, {"image_sizes": sizes}


def _kept(
    model: Any, family: Family, settings: Plan, layouts: dict[Modality, list[Layout]], pictures: Mapping[str, Any]
) -> int:
    """Placeholders that stay. Where rows with a survivor keep their separator ("rows") this is the most."""
    method = settings.reduction.method
    everything = [layout for group in layouts.values() for layout in group]
    if method is None:
        return sum(layout.n_slots for layout in everything)
    if isinstance(method, Resampler):
        small = [family.resampled_layouts(model, pictures, group, method) for group in layouts.values()]
        return sum(layout.n_slots for group in small for layout in group)
    assert isinstance(method, Selector)
    return sum(
        _selected(settings, layout, ks) for layout, ks in zip(everything, budgets_of(method, everything), strict=True)
    )


def _selected(settings: Plan, layout: Layout, ks: list[int]) -> int:
    if ks == layout.sizes:
        return layout.n_slots
    if layout.slots is None or layout.spans is None:
        return sum(ks)
    always = int((layout.spans[:, 0] == layout.spans[:, 1]).sum())
    return sum(ks) + (always if settings.reduction.newline == "drop" else len(layout.spans))


def _per_layer(inner: InnerPruner | None, visual: int, layers: int) -> list[int]:
    return [visual] * layers if inner is None else inner.visual_per_layer(visual, layers)


def _scoring_gflops(model: Any, family: Family, settings: Plan, layouts: list[Layout]) -> float:
    method = settings.reduction.method
    if not isinstance(method, Selector):
        return 0.0
    layers = family.score_layers(model, method.needs, getattr(method, "object_layer", None))
    patches = family.patches_per_token(model)
    out = 0
    if "features" in method.needs:  # every token is compared with every other
        width = model.config.get_text_config().hidden_size
        out += sum(2 * (h * w) ** 2 * width for layout in layouts for h, w in layout.grids)
    for module in layers.values():
        linear: Any = getattr(module, "q_proj", None) or getattr(module, "qkv", None)
        sizes = [h * w * patches for layout in layouts for h, w in layout.grids]
        out += sum(column_mean_flops(linear.in_features, n) for n in sizes)
    return out / 1e9


def _inner_scoring_gflops(config: Any, inner: InnerPruner | None, visual: int, text: int) -> float:
    """One row: q of the text and k of everything again at each pruning layer, and the text's attention rows."""
    if inner is None:
        return 0.0
    hidden, q_width = config.hidden_size, config.num_attention_heads * head_dim(config)
    per_layer, out = inner.visual_per_layer(visual, config.num_hidden_layers), 0
    for layer in inner.layers:
        n = text + per_layer[layer]
        out += 2 * hidden * (text * q_width + n * kv_heads(config) * head_dim(config)) + 2 * 2 * text * n * q_width
    return out / 1e9
