"""What a wrapped video pipeline did: bytes held, blocks run and skipped, milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmeff.diffusion.cost import Forecast
from vlmeff.diffusion.rules import LayerReport
from vlmeff.reporting import format_bytes


def bytes_held(module: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass(frozen=True, kw_only=True)
class TransformerReport:
    """One component: a transformer or a text encoder.

    Measured: ``bytes_before`` and ``bytes_after`` (parameters and buffers), and of the last call ``calls`` of the
    transformer, ``blocks_run`` and ``blocks_skipped`` (what a feature cache left out). ``table`` says which layers were
    quantized and why the others were not.
    """

    component: str
    scheme: str | None
    table: LayerReport | None
    calibrated: bool
    bytes_before: int
    bytes_after: int
    calls: int = 0
    blocks_run: int = 0
    blocks_skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "table": None if self.table is None else self.table.to_dict()}


@dataclass(frozen=True, kw_only=True)
class DiffusionReport:
    """What a wrapped pipeline or transformer is and what its last call did; ``total_ms`` is None before the first.

    ``notes``: what was chosen or left out, and why. ``estimate``, of a pipeline's last call: how much of its arithmetic
    the linear layers are, and what quantizing them can therefore give at most (computed, not measured).
    """

    model: str
    preset: str | None
    parts: tuple[TransformerReport, ...]
    notes: tuple[str, ...] = ()
    total_ms: float | None = None
    estimate: Forecast | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            "preset": self.preset,
            "parts": [part.to_dict() for part in self.parts],
            "notes": list(self.notes),
            "total_ms": self.total_ms,
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
        }

    def rows_of_text(self) -> list[tuple[str, str, str]]:
        """(what, value, how it was got), for tables."""
        rows = [("model", self.model, "")]
        if self.preset is not None:
            rows.append(("preset", self.preset, ""))
        for part in self.parts:
            if part.scheme is not None:
                smoothed = ", smoothed" if part.calibrated else ""
                share = "" if part.table is None else f", {part.table.share:.1%} of the linear parameters"
                rows.append((part.component, part.scheme + smoothed + share, ""))
            before, after = format_bytes(part.bytes_before), format_bytes(part.bytes_after)
            rows.append((f"{part.component} memory", before if before == after else f"{before} -> {after}", "measured"))
            if part.calls:
                rows.append((f"{part.component} calls", str(part.calls), "measured"))
            if part.blocks_skipped:
                total = part.blocks_run + part.blocks_skipped
                rows.append((f"{part.component} blocks skipped", f"{part.blocks_skipped} of {total}", "measured"))
        if self.estimate is not None:
            of_all, gain = self.estimate.linear_share, self.estimate.gain(linears=2)
            rows.append(("linear layers", f"{of_all:.0%} of the operations", "counted"))
            rows.append(("gain of layers twice as fast", f"{gain:.2f}x at most", "computed, not measured"))
        if self.total_ms is not None:
            rows.append(("total ms", f"{self.total_ms:.1f}", "measured"))
        return rows

    def __str__(self) -> str:
        rows = self.rows_of_text()
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:<{width}}  {value}  {f'({how})' if how else ''}".rstrip() for name, value, how in rows]
        return "\n".join([*lines, *self.notes])
