"""Which linear layers of a model get which quantization scheme: ordered rules on module names, the first match wins.

A rule's pattern is a regular expression that must match the whole module name (``blocks\\.\\d+\\.ffn\\.net\\.2``), so
a top-level ``proj_out`` and ``single_transformer_blocks.3.proj_out`` are never confused. Layers that no rule names stay
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from vlmeff.errors import AlreadyQuantizedError, IncompatibleError, QuantConfigError

KEEP = "keep"
DEFAULT = "default"
UNNAMED = "no rule names it"
LONGEST_LIST = 48  # characters of a list of names in a table


class Spec(Protocol):
    """What the byte count needs of a scheme's ``LayerSpec``."""

    def weight_bytes(self, n: int, k: int, branch_bytes: int = 2) -> int: ...


@dataclass(frozen=True)
class Rule:
    """Layers whose full name matches ``pattern`` get ``scheme``.

    Attributes:
        pattern: regular expression on the full module name (``re.fullmatch``).
        scheme: a scheme's name, "keep" (stays in high precision) or "default" (the scheme that was asked for).
        reason: printed beside the layers.
        optional: no error if the model has no such layer (parts that only some checkpoints of a family have).
    """

    pattern: str
    scheme: str
    reason: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise QuantConfigError(
                f"rules: {self.pattern!r} is not a regular expression ({error}). "
                r"Write the full module name, e.g. r'blocks\.\d+\.attn2\.to_[kv]'."
            ) from error
        if not isinstance(self.scheme, str) or not self.scheme:
            raise QuantConfigError(
                f"rules: the scheme of {self.pattern!r} is {self.scheme!r}. Use a scheme's name, 'keep' or 'default'."
            )

    def matches(self, name: str) -> bool:
        """Whether the whole of ``name`` matches."""
        return re.fullmatch(self.pattern, name) is not None


RuleLike = Rule | tuple[str, str] | tuple[str, str, str]


@dataclass(frozen=True)
class LayerChoice:
    """What becomes of one linear layer.

    Attributes:
        name: full module name.  scheme: None = stays as it is.  pattern: of the rule that decided, "" if none did.
        params: elements of weight and bias.  itemsize: bytes per element that the layer has now.
        shared_with: the first layer that holds the same weight (then both become one module), or None.
    """

    name: str
    in_features: int
    out_features: int
    scheme: str | None
    reason: str
    params: int
    bias: bool = True
    itemsize: int = 2
    pattern: str = ""
    shared_with: str | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of weight and bias as they are now; 0 for a layer that shares another's weight."""
        return 0 if self.shared_with else self.params * self.itemsize


def as_rules(rules: Iterable[RuleLike]) -> tuple[Rule, ...]:
    """``Rule``s from rules and tuples ``(pattern, scheme[, reason])``.

    Raises:
        QuantConfigError: an entry is neither.
    """
    made = []
    for entry in rules:
        if isinstance(entry, Rule):
            made.append(entry)
        elif isinstance(entry, (tuple, list)) and len(entry) in (2, 3):
            made.append(Rule(entry[0], entry[1], entry[2] if len(entry) == 3 else "asked for by rules="))
        else:
            raise QuantConfigError(f"rules: {entry!r} is not a rule. Use Rule(...) or a tuple (pattern, scheme).")
    return tuple(made)


def bytes_of(choice: LayerChoice, spec: Spec) -> int:
    """Bytes that a layer occupies in a scheme: what ``LayerSpec.weight_bytes`` counts, and the bias in its own type."""
    if choice.shared_with:
        return 0
    n, k, item = choice.out_features, choice.in_features, choice.itemsize
    return spec.weight_bytes(n, k, item) + (n * item if choice.bias else 0)


def choose_layers(model: nn.Module, scheme: str, rules: Iterable[RuleLike]) -> list[LayerChoice]:
    """Decide for every linear layer of a model, in the order of its modules. Nothing is changed.

    Only exact ``nn.Linear`` modules can be quantized: owners of subclasses read their ``.weight``. A weight that
    another kind of module uses too (a tied embedding) stays; of linear layers that share one weight the first decides.

    Args:
        model: on any device, the meta device included.
        scheme: what "default" rules stand for.
        rules: the first that matches wins; layers without a match stay.
    Raises:
        QuantConfigError: a rule (that is not optional) matches no linear layer, or nothing would be quantized.
        AlreadyQuantizedError: the model has quantized layers.
        IncompatibleError: a PEFT adapter is attached.
    """
    ordered = as_rules(rules)
    for rule in ordered:
        _check_scheme(scheme if rule.scheme == DEFAULT else rule.scheme)
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    _check_plain(modules)
    tied = {
        id(weight): f"{type(module).__name__} {name}"
        for name, module in modules
        if not isinstance(module, nn.Linear)
        for weight in module.parameters(recurse=False)
    }
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    first: dict[int, LayerChoice] = {}
    choices = []
    for name, module in linears:
        first_match = next((rule for rule in ordered if rule.matches(name)), Rule("", KEEP, UNNAMED))
        wanted, reason, pattern = first_match.scheme, first_match.reason, first_match.pattern
        given: str | None = {KEEP: None, DEFAULT: scheme}.get(wanted, wanted)
        shared = None
        if id(module.weight) in first:
            owner = first[id(module.weight)]
            given, shared, reason = owner.scheme, owner.name, f"shares its weight with {owner.name}"
        elif id(module.weight) in tied:
            given, reason = None, f"shares its weight with {tied[id(module.weight)]}"
        elif type(module) is not nn.Linear:
            given, reason = None, f"is a {type(module).__name__}, whose owner reads .weight"
        choice = LayerChoice(
            name,
            module.in_features,
            module.out_features,
            given,
            reason,
            sum(p.numel() for p in module.parameters(recurse=False)),
            module.bias is not None,
            module.weight.element_size(),
            pattern,
            shared,
        )
        first.setdefault(id(module.weight), choice)
        choices.append(choice)
    _check_used(ordered, [name for name, _ in linears], choices)
    return choices


def _check_plain(modules: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        own = module._parameters
        if "qweight" in own or "w_scale" in own:
            raise AlreadyQuantizedError(
                f"quantize: {name} is quantized already ({type(module).__name__}). "
                "Quantize a freshly loaded model, or undo the first quantization."
            )
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise IncompatibleError(
                f"quantize: {name} carries an adapter ({type(module).__name__}). Call fuse_lora() and "
                "unload_lora_weights() first, then quantize."
            )


def _check_scheme(name: str) -> None:
    if name != KEEP:
        from vlmeff.diffusion.schemes import get_scheme

        get_scheme(name)


def _check_used(rules: Sequence[Rule], names: Sequence[str], choices: Sequence[LayerChoice]) -> None:
    idle = [rule.pattern for rule in rules if not rule.optional and not any(rule.matches(name) for name in names)]
    if idle:
        example = f"; this model has e.g. {', '.join(repr(name) for name in names[:3])}" if names else ""
        raise QuantConfigError(
            f"rules: {', '.join(repr(pattern) for pattern in idle)} match none of the {len(names)} linear layers. "
            f"A pattern must match the full module name{example}."
        )
    if not any(choice.scheme for choice in choices):
        raise QuantConfigError(f"rules: none of the {len(names)} linear layers would be quantized. Add a rule.")


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that one rule treats alike."""

    label: str
    scheme: str | None
    reason: str
    count: int
    params: int
    bytes_before: int
    bytes_after: int
    shapes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Quantized and skipped layers with counts, parameters, bytes and reasons; ``str()`` prints the table."""

    groups: tuple[LayerGroup, ...]
    other_params: int = 0
    other_bytes: int = 0

    @property
    def share(self) -> float:
        """Share of the linear layers' parameters that is quantized."""
        total = sum(group.params for group in self.groups)
        return sum(group.params for group in self.groups if group.scheme) / total if total else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of all linear layers now."""
        return sum(group.bytes_before for group in self.groups)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linear layers after quantization."""
        return sum(group.bytes_after for group in self.groups)

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON values."""
        groups = [{**vars(group), "shapes": list(group.shapes)} for group in self.groups]
        return {
            "groups": groups,
            "share": self.share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "other_params": self.other_params,
            "other_bytes": self.other_bytes,
        }

    def __str__(self) -> str:
        rows = [("layers", "n", "out x in", "scheme", "params", "before", "after", "reason")]
        for group in sorted(self.groups, key=lambda group: group.scheme is None):
            shape = group.shapes[0] if len(group.shapes) == 1 else f"{len(group.shapes)} shapes"
            sizes = (_millions(group.params), _mebibytes(group.bytes_before), _mebibytes(group.bytes_after))
            rows.append((group.label, str(group.count), shape, group.scheme or KEEP, *sizes, group.reason))
        if self.other_params:
            size = _mebibytes(self.other_bytes)
            rows.append(("(not linear)", "", "", KEEP, _millions(self.other_params), size, size, "not a linear layer"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        right = {1, 4, 5, 6}
        lines = [
            "  ".join(
                text.rjust(width) if column in right else text.ljust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(
            f"{self.share:.1%} of the linear layers' parameters are quantized; all linear layers: "
            f"{_mebibytes(self.bytes_before)} -> {_mebibytes(self.bytes_after)}"
        )
        return "\n".join(lines)


def layer_report(
    choices: Sequence[LayerChoice], model: nn.Module | None = None, *, spec_of: Callable[[str], Spec] | None = None
) -> LayerReport:
    """Group choices into the table that is printed before and after quantizing.

    Args:
        model: counts the parameters that are not in linear layers too.
        spec_of: scheme's name -> its layer description; vlmeff's own schemes by default.
    """
    if spec_of is None:
        from vlmeff.diffusion.schemes import get_scheme

        spec_of = get_scheme
    grouped: dict[tuple[str | None, str, str, str], list[LayerChoice]] = {}
    for choice in choices:
        root = choice.name.partition(".")[0]
        grouped.setdefault((choice.scheme, choice.reason, choice.pattern, root), []).append(choice)
    groups = []
    for (scheme, reason, _, _), members in grouped.items():
        before = sum(choice.bytes_before for choice in members)
        spec = spec_of(scheme) if scheme else None
        groups.append(
            LayerGroup(
                label=common_name([choice.name for choice in members]),
                scheme=scheme,
                reason=reason,
                count=len(members),
                params=sum(choice.params for choice in members if not choice.shared_with),
                bytes_before=before,
                bytes_after=before if spec is None else sum(bytes_of(choice, spec) for choice in members),
                shapes=tuple(dict.fromkeys(f"{choice.out_features}x{choice.in_features}" for choice in members)),
            )
        )
    if model is None:
        return LayerReport(groups=tuple(groups))
    params = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return LayerReport(
        groups=tuple(groups),
        other_params=params - sum(group.params for group in groups),
        other_bytes=size - sum(group.bytes_before for group in groups),
    )


def common_name(names: Sequence[str]) -> str:
    """One label for many module names: the block's index becomes ``*``, ends that differ a list in braces."""
    general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names))
    if len(general) == 1:
        return general[0]
    parts = [name.split(".") for name in general]
    same = 0
    while all(len(part) > same + 1 for part in parts) and len({part[same] for part in parts}) == 1:
        same += 1
    ends = [".".join(part[same:]) for part in parts]
    if sum(map(len, ends)) > LONGEST_LIST:  # too long to read: only where they begin
        ends = list(dict.fromkeys(part[same] for part in parts))
    if sum(map(len, ends)) > LONGEST_LIST:
        ends = ["*"]
    return ".".join([*parts[0][:same], ends[0] if len(ends) == 1 else "{" + ",".join(ends) + "}"])


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
