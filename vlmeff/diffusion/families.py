r"""The video transformers of diffusers that vlmeff knows: which linear layers may be quantized, and what else differs.

The module names are those of diffusers 0.42. Nothing here imports diffusers: a family is recognised by the names of a
model's classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vlmeff.diffusion.rules import DEFAULT, KEEP, LayerReport, Rule, RuleLike, as_rules, choose_layers, layer_report
from vlmeff.errors import QuantConfigError, UnsupportedModelError

ADALN_SCHEME = "w8a16_int8"
TEXT_SCHEME = "w8a16_int8"

_PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0|to_qkv)"
_ADALN = "modulation: one row per sample, no compute, but a large share of the parameters; never low-bit activations"
_COARSE = "small, and every token passes through it"
_EMBEDDER = "conditioning of every block, one row per sample"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What vlmeff knows of one family of video transformers.

    Attributes:
        name: short name.  classes: the diffusers classes.
        blocks: attributes (``ModuleList``s) that hold the repeated blocks, in the order of their execution.
        rules: which linear layers get which scheme; everything else stays.
        separate_guidance: the pipelines call the transformer twice per step, in ``cache_context("cond")`` and
            ``cache_context("uncond")``; False: both are rows of one call.
        masked: which attention passes a mask. Back ends without masks are refused there.
        dispatches: the attention goes through diffusers' back ends; False: ``set_attention_backend`` has no effect.
        flow: trained by flow matching (velocity), so the clean estimate is ``x - sigma v``.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    rules: tuple[Rule, ...]
    separate_guidance: bool
    masked: Literal["none", "joint", "cross"]
    dispatches: bool = True
    flow: bool = True
    patch_layers: tuple[str, ...] = field(default=())

    def block_lists(self, transformer: nn.Module) -> dict[str, nn.ModuleList]:
        """The block lists that this transformer has, by attribute name."""
        found = {name: getattr(transformer, name, None) for name in self.blocks}
        return {name: blocks for name, blocks in found.items() if isinstance(blocks, nn.ModuleList)}


WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    blocks=("vace_blocks", "blocks"),
    rules=(
        Rule(rf"(vace_)?blocks\.\d+\.attn1\.{_PROJECTIONS}", DEFAULT, "self-attention, all video tokens"),
        Rule(r"(vace_)?blocks\.\d+\.attn2\.(to_q|to_out\.0)", DEFAULT, "cross-attention, all video tokens"),
        Rule(
            r"(vace_)?blocks\.\d+\.attn2\.(to_k|to_v|to_kv)",
            DEFAULT,
            "cross-attention, 512 text tokens: memory, hardly time",
        ),
        Rule(
            r"(vace_)?blocks\.\d+\.attn2\.(add_k_proj|add_v_proj|to_added_kv)",
            DEFAULT,
            "cross-attention, image tokens: memory, hardly time",
            optional=True,
        ),
        Rule(r"(vace_)?blocks\.\d+\.ffn\.net\.(0\.proj|2)", DEFAULT, "feed-forward, all video tokens"),
        Rule(r"vace_blocks\.\d+\.proj_(in|out)", KEEP, "joins control branch and video stream", optional=True),
        Rule(
            r"condition_embedder\..+",
            KEEP,
            f"{_EMBEDDER}; the model reads the type of time_embedder's parameters",
            optional=True,
        ),
        Rule(r"proj_out", KEEP, f"output projection: {_COARSE}", optional=True),
    ),
    separate_guidance=True,
    masked="none",
    patch_layers=("patch_embedding", "proj_out"),
)

COGVIDEOX = Family(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    blocks=("transformer_blocks",),
    rules=(
        Rule(rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}", DEFAULT, "joint attention of text and video tokens"),
        Rule(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", DEFAULT, "feed-forward, text and video tokens"),
        Rule(r"transformer_blocks\.\d+\.norm[12]\.linear", ADALN_SCHEME, _ADALN),
        Rule(r"patch_embed\..+", KEEP, f"input embedding: {_COARSE}", optional=True),
        Rule(r"(time|ofs)_embedding\..+", KEEP, _EMBEDDER, optional=True),
        Rule(r"norm_out\.linear", KEEP, "final modulation, one row per sample", optional=True),
        Rule(r"proj_out", KEEP, f"output projection: {_COARSE}", optional=True),
    ),
    separate_guidance=False,
    masked="none",
    dispatches=False,
    flow=False,
    patch_layers=("patch_embed", "proj_out"),
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    classes=("HunyuanVideoTransformer3DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    rules=(
        Rule(rf"transformer_blocks\.\d+\.attn\.{_PROJECTIONS}", DEFAULT, "joint attention, video tokens"),
        Rule(
            r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)",
            DEFAULT,
            "joint attention, text tokens: memory, hardly time",
        ),
        Rule(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", DEFAULT, "feed-forward, video tokens"),
        Rule(
            r"transformer_blocks\.\d+\.ff_context\.net\.(0\.proj|2)",
            DEFAULT,
            "feed-forward, text tokens: memory, hardly time",
        ),
        Rule(
            r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_qkv)|proj_mlp|proj_out)",
            DEFAULT,
            "single stream, text and video tokens",
        ),
        Rule(r"transformer_blocks\.\d+\.norm1(_context)?\.linear", ADALN_SCHEME, _ADALN),
        Rule(r"single_transformer_blocks\.\d+\.norm\.linear", ADALN_SCHEME, _ADALN),
        Rule(r"x_embedder\..+", KEEP, f"input embedding: {_COARSE}", optional=True),
        Rule(r"context_embedder\..+", KEEP, "text embedding with its token refiner, once per call", optional=True),
        Rule(r"time_text_embed\..+", KEEP, _EMBEDDER, optional=True),
        Rule(r"norm_out\.linear", KEEP, "final modulation, one row per sample", optional=True),
        Rule(r"proj_out", KEEP, f"output projection: {_COARSE}", optional=True),
    ),
    separate_guidance=True,
    masked="joint",
    patch_layers=("x_embedder", "context_embedder", "proj_out"),
)

LTX_VIDEO = Family(
    name="ltx_video",
    classes=("LTXVideoTransformer3DModel",),
    blocks=("transformer_blocks",),
    rules=(
        Rule(rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}", DEFAULT, "self-attention, all video tokens"),
        Rule(r"transformer_blocks\.\d+\.attn2\.(to_q|to_out\.0)", DEFAULT, "cross-attention, all video tokens"),
        Rule(
            r"transformer_blocks\.\d+\.attn2\.(to_k|to_v|to_kv)",
            DEFAULT,
            "cross-attention, text tokens: memory, hardly time",
        ),
        Rule(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", DEFAULT, "feed-forward, all video tokens"),
        Rule(r"proj_in", KEEP, f"input embedding: {_COARSE}", optional=True),
        Rule(r"time_embed\..+", KEEP, _EMBEDDER, optional=True),
        Rule(r"caption_projection\..+", KEEP, "text embedding, once per call", optional=True),
        Rule(r"proj_out", KEEP, f"output projection: {_COARSE}", optional=True),
    ),
    separate_guidance=False,
    masked="cross",
    patch_layers=("proj_in", "proj_out"),
)

FAMILIES = (WAN, COGVIDEOX, HUNYUAN_VIDEO, LTX_VIDEO)


def supported_classes() -> tuple[str, ...]:
    """Names of the transformer classes with rules."""
    return tuple(name for family in FAMILIES for name in family.classes)


def find_family(transformer: object) -> Family | None:
    """The family of a transformer (or of a subclass), None if it is not known."""
    names = {cls.__name__ for cls in type(transformer).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def family_of(transformer: object) -> Family:
    """The family of a transformer.

    Raises:
        UnsupportedModelError: the class is not known; the message lists those that are.
    """
    family = find_family(transformer)
    if family is None:
        pipeline = " It is a pipeline: pass its .transformer." if hasattr(transformer, "components") else ""
        raise UnsupportedModelError(
            f"{type(transformer).__name__} is not a video transformer that vlmeff has rules for.{pipeline} Supported: "
            f"{', '.join(supported_classes())}. For another class pass rules=[(pattern, scheme), ...]; "
            "vlmeff.diffusion.families.dry_run(model, scheme) shows what rules could name."
        )
    return family


def rules_for(
    transformer: nn.Module, rules: list[RuleLike] | tuple[RuleLike, ...] | None = None, *, replace: bool = False
) -> tuple[Rule, ...]:
    """The rules of a transformer: the caller's in front of the family's, or the caller's alone.

    Args:
        rules: ``Rule``s or tuples (pattern, scheme[, reason]); they come first, so they override.
        replace: use only ``rules``. This is what happens with a class that is not known.
    Raises:
        UnsupportedModelError: the class is not known and there are no ``rules``.
        QuantConfigError: ``replace`` without ``rules``.
    """
    own = as_rules(rules or ())
    if replace and not own:
        raise QuantConfigError("rules: replace=True needs rules=[...]; without it the family's rules are used.")
    if replace or (own and find_family(transformer) is None):
        return own
    return own + family_of(transformer).rules


def repeated_block_rules(transformer: nn.Module) -> tuple[Rule, ...]:
    """Guessed rules for a class without a family: every linear layer inside the blocks that diffusers calls repeated.

    Modulation (``norm...linear``) gets the weight-only scheme. Empty if the class names no repeated blocks.
    """
    repeated = set(getattr(type(transformer), "_repeated_blocks", None) or ())
    inside = [
        name
        for name, module in transformer.named_modules()
        if type(module).__name__ in repeated and _in_list(transformer, name)
    ]
    prefixes = sorted({name.rpartition(".")[0].replace(".", r"\.") for name in inside})
    if not prefixes:
        return ()
    blocks = rf"({'|'.join(prefixes)})\.\d+"
    return (
        Rule(rf"{blocks}\.(.+\.)?norm[^.]*\.linear", ADALN_SCHEME, _ADALN, optional=True),
        Rule(rf"{blocks}\..+", DEFAULT, "in a repeated block (guessed from the class)"),
    )


def _in_list(transformer: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return bool(parent) and last.isdigit() and isinstance(transformer.get_submodule(parent), nn.ModuleList)


def dry_run(
    transformer: nn.Module,
    scheme: str,
    rules: list[RuleLike] | tuple[RuleLike, ...] | None = None,
    *,
    spec_of: Any = None,
) -> LayerReport:
    """The table of what would be quantized, for any model; nothing is changed.

    A class without a family and without ``rules`` is tried with ``repeated_block_rules``: a proposal to check, which
    quantizing itself never uses unasked.

    Raises:
        UnsupportedModelError: the class is not known, and neither ``rules`` nor repeated blocks say what to quantize.
    """
    family = find_family(transformer)
    guessed = () if family or rules else repeated_block_rules(transformer)
    used = guessed or rules_for(transformer, rules)
    return layer_report(choose_layers(transformer, scheme, used), transformer, spec_of=spec_of)


# T5 and UMT5: the owner of `wo` reads `wo.weight` to choose a type (transformers 5: T5DenseGatedActDense.forward) and
# skips that for anything that is not a tensor. A module that takes its place needs an attribute `weight` that is None.
READS_WEIGHT = r".*\.DenseReluDense\.wo"
TEXT_CLASSES = ("T5EncoderModel", "UMT5EncoderModel")


def text_encoder_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """Weight-only rules for a T5 or UMT5 text encoder: attention and feed-forward of every block.

    Embedding, relative position biases and norms are no linear layers and stay. ``wo`` stays too where it is kept in
    float32 in a half-precision model (transformers loads it so in float16, because its results overflow there).
    Modules that replace a name matching ``READS_WEIGHT`` must have ``weight = None``.

    Raises:
        UnsupportedModelError: another class.
    """
    if not {cls.__name__ for cls in type(encoder).__mro__} & set(TEXT_CLASSES):
        raise UnsupportedModelError(
            f"text encoder: {type(encoder).__name__} has no rules. Supported: {', '.join(TEXT_CLASSES)}; "
            "leave this text encoder as it is."
        )
    block = r"encoder\.block\.\d+\.layer\.\d+"
    widths = {
        name.rpartition(".")[2]: module.weight.element_size()
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    if widths.get("wo", 0) > widths.get("q", 0):
        wo = Rule(rf"{block}\.DenseReluDense\.wo", KEEP, "kept in float32: its results overflow in float16")
    else:
        wo = Rule(rf"{block}\.DenseReluDense\.wo", TEXT_SCHEME, "feed-forward of the text encoder")
    return (
        Rule(rf"{block}\.SelfAttention\.[qkvo]", TEXT_SCHEME, "attention of the text encoder"),
        Rule(rf"{block}\.DenseReluDense\.wi(_[01])?", TEXT_SCHEME, "feed-forward of the text encoder"),
        wo,
    )
