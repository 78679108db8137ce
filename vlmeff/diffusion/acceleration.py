"""What diffusers ships to make video transformers faster, behind one interface that says what really changed.

Feature caches, attention back ends and regional compilation (diffusers 0.42). Each call returns an ``Acceleration``
with the modules it changed and an ``undo``; a switch that would change nothing, or break the model, is refused.
What a cache really skips is measured by ``vlmeff.diffusion.counting.count_work``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.diffusion.families import Family, family_of
from vlmeff.errors import BackendUnavailableError, ConfigError, IncompatibleError, UnknownNameError

# The class of each cache's configuration in diffusers.
CACHES = {
    "first_block": "FirstBlockCacheConfig",
    "mag": "MagCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "faster": "FasterCacheConfig",
}
# These keep one state per module, not one per cache_context: two calls a step would read each other's states.
_ONE_STATE = ("pab", "faster")
# These skip whole blocks and add the change that the skipped blocks made last time.
_BLOCK_RESIDUAL = ("first_block", "mag")

# Back ends that raise when they are given an attention mask (diffusers 0.42, models/attention_dispatch.py).
WITHOUT_MASK = frozenset(
    "flash flash_hub _flash_3 _flash_3_hub flash_4_hub aiter_fa2_hub _native_flash _native_xla sage sage_hub "
    "sage_blackwell_hub _sage_qk_int8_pv_fp8_cuda _sage_qk_int8_pv_fp8_cuda_sm90 _sage_qk_int8_pv_fp16_cuda "
    "_sage_qk_int8_pv_fp16_triton".split()
)


@dataclass(eq=False)
class Acceleration:
    """One switch that is on: ``changed`` names the modules it really changed; ``undo()`` takes it back."""

    kind: str
    name: str
    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Take the change back; a second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.kind} {self.name}: {len(self.changed)} modules changed{notes}"


def enable_cache(
    transformer: Any,
    name: str,
    *,
    guidance: bool = True,
    current_timestep: Callable[[], int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Acceleration:
    """Reuse features between denoising steps, by one of diffusers' caches.

    "first_block": all blocks but the first are skipped while the first one's output hardly changes (``threshold``).
    "mag": skips by magnitude ratios measured beforehand (``mag_ratios`` of ``calibrate_mag_ratios`` and
    ``num_inference_steps``; ratios of another checkpoint or schedule are a guess). "taylorseer": predicts attention
    outputs. "pab", "faster": reuse attention outputs inside a range of timesteps.

    Args:
        guidance: the pipeline runs with classifier-free guidance (guidance_scale above 1).
        current_timestep: for "pab" and "faster", e.g. ``lambda: pipe.current_timestep``.
        settings: fields of diffusers' configuration class.
    Raises:
        UnknownNameError: no such cache.  ConfigError: a setting is missing or not known.
        IncompatibleError: the cache cannot work with this family, or another one is enabled.
        UnsupportedModelError: the class is not known.
    """
    if name not in CACHES:
        raise UnknownNameError("cache", name, CACHES)
    family = family_of(transformer)
    _check_cache(transformer, family, name, guidance)
    config, notes = _cache_config(family, name, guidance, current_timestep, dict(settings or {}))
    before, known = _hooked(transformer), _traces(transformer)
    transformer.enable_cache(config)
    changed = tuple(key for key in _hooked(transformer) if key not in before)
    if not changed:
        transformer.disable_cache()
        _clean(transformer, known)
        raise IncompatibleError(f"cache {name!r}: its settings match no module of {type(transformer).__name__}.")

    def undo() -> None:
        transformer.disable_cache()
        _clean(transformer, known)

    return Acceleration("cache", name, tuple(dict.fromkeys(key for key, _ in changed)), notes, undo)


def _check_cache(transformer: nn.Module, family: Family, name: str, guidance: bool) -> None:
    kind = type(transformer).__name__
    if getattr(transformer, "is_cache_enabled", False):
        raise IncompatibleError(f"cache {name!r}: another cache is enabled. Undo it first (disable_cache()).")
    lists = family.block_lists(transformer)
    if "vace_blocks" in lists and name != "taylorseer":
        raise IncompatibleError(
            f"cache {name!r}: {kind} adds control hints between its blocks, which the cache would add twice or miss. "
            "Use cache 'taylorseer'."
        )
    if name in _ONE_STATE and family.separate_guidance and guidance:
        raise IncompatibleError(
            f"cache {name!r} keeps one state per module, and the pipelines of {kind} call it twice a step (with and "
            "without prompt), so the states would mix. Use 'first_block', 'mag' or 'taylorseer', or guidance=False."
        )
    if name == "faster" and guidance and family.name != "cogvideox":
        raise IncompatibleError(
            f"cache 'faster' approximates the unconditional half from whole frames; {kind} returns a sequence of "
            "tokens. Use 'first_block', 'mag', 'taylorseer' or 'pab', or guidance=False."
        )
    if name in _BLOCK_RESIDUAL and sum(map(len, lists.values())) < 2:
        raise IncompatibleError(f"cache {name!r} needs two blocks or more; {kind} has one. Leave the cache out.")


def _cache_config(
    family: Family, name: str, guidance: bool, current_timestep: Callable[[], int] | None, settings: dict[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    import diffusers

    config = getattr(diffusers, CACHES[name])
    known = {entry.name for entry in fields(config) if not entry.name.startswith("_")}
    for key in settings:
        if key not in known:
            raise UnknownNameError(f"setting of cache {name!r}", key, known)
    notes: list[str] = []
    if name in _ONE_STATE:
        if current_timestep is None:
            raise ConfigError(f"cache {name!r} needs current_timestep, e.g. lambda: pipe.current_timestep.")
        settings["current_timestep_callback"] = current_timestep
    if name == "pab":
        settings.setdefault("spatial_attention_block_skip_range", 2)
    if name == "faster":
        settings.setdefault("is_guidance_distilled", not guidance)
        settings.setdefault("tensor_format", "BFCHW" if family.name == "cogvideox" else "BCFHW")
        settings.setdefault("attention_weight_callback", lambda _: 0.5)
    if name == "mag":
        if settings.get("mag_ratios") is None or "num_inference_steps" not in settings:
            raise ConfigError(
                "cache 'mag' needs settings={'mag_ratios': [...], 'num_inference_steps': n}. The ratios belong to one "
                "checkpoint, scheduler and guidance: measure them with calibrate_mag_ratios(transformer, run)."
            )
        if len(settings["mag_ratios"]) != settings["num_inference_steps"]:
            notes.append(
                f"{len(settings['mag_ratios'])} ratios are stretched to {settings['num_inference_steps']} steps"
            )
    custom = ("cache_identifiers", "skip_predict_identifiers", "use_lite_mode")
    if name == "taylorseer" and not any(settings.get(key) for key in custom):
        # diffusers 0.42 matches "^blocks.*attn" with re.fullmatch, which no attn1 or attn2 satisfies: nothing cached.
        settings["cache_identifiers"] = [r"(single_)?(transformer_)?blocks\.\d+\.attn\d?"]
        notes.append("attention of all blocks; diffusers' own patterns name none where it is called attn1")
    return config(**settings), tuple(notes)


def calibrate_mag_ratios(transformer: Any, run: Callable[[], object]) -> list[float]:
    """Measure the ratios that cache "mag" needs, in one ordinary run.

    Of each step: the mean over tokens of |change made by all blocks| divided by that of the step before (1 at first),
    averaged over the calls of a step (with and without prompt).

    Args:
        run: runs the pipeline once, with the number of steps, scheduler and guidance that will be used.
    Raises:
        IncompatibleError: a cache is enabled.  ConfigError: ``run`` did not call the transformer, or its calls differ.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise IncompatibleError("calibrate_mag_ratios: a cache is enabled. Undo it first (disable_cache()).")
    lists = list(family_of(transformer).block_lists(transformer).values())
    start: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    ratios: dict[str, list[float]] = {}
    current = [""]
    own_context = transformer.cache_context

    @contextmanager
    def named(name: str, **kwargs: Any) -> Iterator[None]:
        current[0] = name
        with own_context(name, **kwargs):
            yield

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start[current[0]] = args[0] if args else kwargs["hidden_states"]

    def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        name = current[0]
        size = torch.linalg.norm(((result[0] if isinstance(result, tuple) else result) - start[name]).float(), dim=-1)
        ratios.setdefault(name, []).append((size / (last[name] + 1e-8)).mean().item() if name in last else 1.0)
        last[name] = size

    handles = [
        lists[0][0].register_forward_pre_hook(enter, with_kwargs=True),
        lists[-1][-1].register_forward_hook(leave),
    ]
    transformer.cache_context = named
    try:
        run()
    finally:
        del transformer.cache_context
        for handle in handles:
            handle.remove()
    if not ratios or len({len(values) for values in ratios.values()}) != 1:
        counts = ", ".join(f"{name or 'unnamed'} {len(values)}" for name, values in ratios.items())
        raise ConfigError(f"calibrate_mag_ratios: run() made calls that do not pair up ({counts or 'none at all'}).")
    return [sum(step) / len(step) for step in zip(*ratios.values(), strict=True)]


def set_attention_backend(transformer: Any, backend: str) -> Acceleration:
    """Compute attention by another of diffusers' back ends, where that is legal.

    Unlike diffusers' own switch this one leaves the process-wide default alone, and where only the cross-attention
    passes a mask (LTX) it switches only the self-attention to back ends that take none.

    Raises:
        UnknownNameError: no such back end.  BackendUnavailableError: its package or hardware is missing.
        IncompatibleError: the family passes masks that the back end refuses, or its attention is not dispatched.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    family, names = family_of(transformer), [entry.value for entry in AttentionBackendName]
    if backend not in names:
        raise UnknownNameError("attention back end", backend, names)
    if not family.dispatches:
        raise IncompatibleError(
            f"attention {backend!r}: {type(transformer).__name__} calls torch's attention directly, so the switch "
            "would have no effect. Leave it out."
        )
    maskless = backend in WITHOUT_MASK
    if maskless and family.masked == "joint":
        masking = [name for name in names if name not in WITHOUT_MASK and "native" in name]
        raise IncompatibleError(
            f"attention {backend!r} takes no mask, and {type(transformer).__name__} always passes one. "
            f"Use one of {', '.join(masking)}."
        )
    processors = {
        name: module.processor
        for name, module in transformer.named_modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    }
    before = {name: processor._attention_backend for name, processor in processors.items()}
    default, _ = _AttentionBackendRegistry.get_active_backend()

    def restore() -> None:
        for name, processor in processors.items():
            processor._attention_backend = before[name]

    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError) as error:
        restore()
        raise BackendUnavailableError("attention", backend, str(error)) from error
    finally:
        _AttentionBackendRegistry.set_active_backend(default)
    notes: tuple[str, ...] = ()
    if maskless and family.masked == "cross":
        notes = ("cross-attention passes a mask and stays",)
        for name, processor in processors.items():
            if name.endswith("attn2"):
                processor._attention_backend = before[name]
    changed = tuple(name for name, old in before.items() if processors[name]._attention_backend != old)
    return Acceleration("attention", backend, changed, notes, restore)


def compile_blocks(
    transformer: Any,
    *,
    mode: str | None = None,
    backend: str | Callable[..., Any] = "inductor",
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> Acceleration:
    """Compile the repeated blocks only; all blocks share one compiled graph. Do this last.

    Uses diffusers' ``compile_repeated_blocks`` where the class names its blocks, and compiles the family's blocks one
    by one where it does not (CogVideoX).
    """
    family = family_of(transformer)
    if any(_compiled(module) for module in transformer.modules()):
        raise IncompatibleError("compile: modules are compiled already. Undo that first.")
    options = {"mode": mode, "backend": backend, "fullgraph": fullgraph, "dynamic": dynamic}
    notes: tuple[str, ...] = ()
    if getattr(type(transformer), "_repeated_blocks", None):
        transformer.compile_repeated_blocks(**options)
    else:
        notes = ("the class names no repeated blocks; the family's were compiled",)
        for blocks in family.block_lists(transformer).values():
            for block in blocks:
                block.compile(**options)
    modules = {name: module for name, module in transformer.named_modules() if _compiled(module)}

    def undo() -> None:
        for module in modules.values():
            module._compiled_call_impl = None

    return Acceleration("compile", backend if isinstance(backend, str) else "custom", tuple(modules), notes, undo)


def _compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _traces(transformer: nn.Module) -> set[tuple[str, int]]:
    """Which modules have a registry of hooks, and which an own ``forward``."""
    return {
        (trace, id(module))
        for module in transformer.modules()
        for trace in ("_diffusers_hook", "forward")
        if trace in vars(module)
    }


def _hooked(transformer: nn.Module) -> list[tuple[str, str]]:
    """(module, hook) of all diffusers hooks inside a model."""
    return [
        (name, hook)
        for name, module in transformer.named_modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks
    ]


def _clean(transformer: nn.Module, known: set[tuple[str, int]]) -> None:
    """Remove what diffusers leaves behind when a hook goes: an empty registry, and ``forward`` on the instance."""
    for module in transformer.modules():
        own = vars(module)
        plain = getattr(own.get("forward"), "__func__", None) is type(module).forward
        if plain and ("forward", id(module)) not in known:
            del module.forward
        registry = own.get("_diffusers_hook")
        if registry is not None and not registry.hooks and ("_diffusers_hook", id(module)) not in known:
            del module._diffusers_hook
