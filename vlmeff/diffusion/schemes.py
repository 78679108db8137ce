"""The legal schemes, ``<weights><activations>`` plus format, and the choice of one by hardware."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from vlmeff.errors import QuantConfigError, SchemeNotSupportedError, UnknownNameError

Weight = Literal["int", "uint", "fp8"]
Zero = Literal["none", "integer", "float"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one linear layer is quantized.

    ``weight``: "int" symmetric codes, "uint" codes with a zero-point, "fp8" e4m3. ``a_bits`` 16 leaves activations as
    they are. ``group``: input channels that share a weight scale, 0 for one scale per output. ``a_group``: the same for
    activations, 0 for one scale per token. ``rank``: of the branch kept in high precision (SVDQuant). ``smooth``:
    activations are divided by a vector first. ``a_clip``: the range of activations is shrunk by learned factors.
    ``contain_zero``: False is the range as QVGen's code has it.
    """

    scheme: str
    weight: Weight
    w_bits: int
    a_bits: int
    group: int = 0
    a_group: int = 0
    zero: Zero = "none"
    rank: int = 0
    smooth: bool = False
    a_clip: bool = False
    contain_zero: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.w_bits <= 8:
            raise QuantConfigError(f"{self.scheme}: w_bits={self.w_bits} must be 2 to 8.")
        if self.a_bits != 16 and not 2 <= self.a_bits <= 8:
            raise QuantConfigError(f"{self.scheme}: a_bits={self.a_bits} must be 2 to 8, or 16 for none.")
        if any(type(value) is not int for value in (self.group, self.a_group, self.rank, self.w_bits, self.a_bits)):
            raise QuantConfigError(f"{self.scheme}: group={self.group!r} and rank={self.rank!r} must be whole numbers.")
        if self.group < 0 or self.a_group < 0:
            raise QuantConfigError(f"{self.scheme}: group={self.group} must be 0 or a number of channels.")
        if self.rank < 0:
            raise QuantConfigError(f"{self.scheme}: rank={self.rank} must be 0 or more.")
        if (self.zero == "none") != (self.weight != "uint"):
            raise QuantConfigError(f"{self.scheme}: weights of kind {self.weight!r} cannot have zero={self.zero!r}.")

    @property
    def packed(self) -> bool:
        """Whether two codes lie in a byte."""
        return self.w_bits <= 4

    @property
    def codes_dtype(self) -> torch.dtype:
        if self.weight == "fp8":
            return torch.float8_e4m3fn
        return torch.uint8 if self.packed or self.weight == "uint" else torch.int8

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32 for one scale per output, bfloat16 for groups (they are many)."""
        return torch.bfloat16 if self.group else torch.float32

    def groups(self, k: int) -> int:
        """Scales of one output."""
        return -(-k // self.group) if 0 < self.group < k else 1

    def weight_bytes(self, n: int, k: int, branch_bytes: int = 2) -> int:
        """Bytes of codes, scales and zero-points of an [n, k] layer, and of what SVDQuant keeps beside them.

        ``branch_bytes``: of one number of the low-rank branch.
        """
        codes = n * (-(-k // 2) if self.packed else k)
        scales = n * self.groups(k) * self.scale_dtype.itemsize
        rank = min(self.rank, n, k)
        return (
            codes
            + scales * (1 if self.zero == "none" else 2)
            + (4 * k if self.smooth else 0)
            + rank * (n + k) * branch_bytes
            + (8 if self.a_clip else 0)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _specs(*specs: LayerSpec) -> dict[str, LayerSpec]:
    return {spec.scheme: spec for spec in specs}


SCHEMES: dict[str, LayerSpec] = _specs(
    LayerSpec(scheme="w8a16_int8", weight="int", w_bits=8, a_bits=16),
    LayerSpec(scheme="w8a16_fp8", weight="fp8", w_bits=8, a_bits=16),
    LayerSpec(scheme="w8a8_int8", weight="int", w_bits=8, a_bits=8),
    LayerSpec(scheme="w8a8_fp8", weight="fp8", w_bits=8, a_bits=8),
    LayerSpec(scheme="w4a16", weight="uint", w_bits=4, a_bits=16, group=128, zero="float"),
    LayerSpec(scheme="w4a8_int8", weight="int", w_bits=4, a_bits=8, group=128),
    LayerSpec(scheme="svdq_w4a16", weight="int", w_bits=4, a_bits=16, group=64, rank=32, smooth=True),
    LayerSpec(scheme="svdq_w4a8", weight="int", w_bits=4, a_bits=8, group=64, rank=32, smooth=True),
    LayerSpec(scheme="svdq_w4a4", weight="int", w_bits=4, a_bits=4, group=64, a_group=64, rank=32, smooth=True),
    LayerSpec(scheme="w4a4_int", weight="uint", w_bits=4, a_bits=4, zero="float", a_clip=True),
    LayerSpec(scheme="w3a3_sim", weight="uint", w_bits=3, a_bits=3, zero="float", a_clip=True),
)

SUMMARIES = {
    "w8a16_int8": "half the memory; as fast as before at many tokens",
    "w8a16_fp8": "half the memory; as fast as before at many tokens",
    "w8a8_int8": "half the memory and int8 arithmetic",
    "w8a8_fp8": "half the memory and float8 arithmetic",
    "w4a16": "a quarter of the memory; at many tokens slower than the unquantized layer",
    "w4a8_int8": "a quarter of the memory and int8 arithmetic",
    "svdq_w4a16": "a quarter of the memory, a low-rank branch keeps outliers",
    "svdq_w4a8": "a quarter of the memory, int8 arithmetic, a low-rank branch keeps outliers",
    "svdq_w4a4": "a quarter of the memory, 4-bit activations, a low-rank branch keeps outliers",
    "w4a4_int": "4-bit weights and activations; meant for checkpoints trained for it (QVGen)",
    "w3a3_sim": "3-bit weights and activations in 4-bit containers; research only",
}


def get_scheme(name: str, *, group: int | None = None, rank: int | None = None) -> LayerSpec:
    """The scheme of this name, with another group or rank where given.

    Raises:
        UnknownNameError: no such scheme; lists the legal ones.
        QuantConfigError: the scheme has no groups or no low-rank branch to change, or the value cannot work.
    """
    if name not in SCHEMES:
        raise UnknownNameError("scheme", name, SCHEMES)
    spec = SCHEMES[name]
    if group is not None:
        if name in ("w4a4_int", "w3a3_sim") or spec.weight == "fp8" or spec.w_bits == 8:
            raise QuantConfigError(f"group={group}: {name} has one scale per output; leave group out.")
        spec = replace(spec, group=group, a_group=group if spec.a_group else 0)
    if rank is not None:
        if not spec.rank:
            raise QuantConfigError(f"rank={rank}: {name} has no low-rank branch; use one of the svdq schemes.")
        spec = replace(spec, rank=rank)
    return spec


def check_hardware(spec: LayerSpec, device: torch.device) -> None:
    """Refuse what the device cannot compute.

    Raises:
        SchemeNotSupportedError: float8 arithmetic below compute capability 8.9.
    """
    if device.type == "cuda" and spec.scheme == "w8a8_fp8":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise SchemeNotSupportedError(
                f"w8a8_fp8 needs compute capability 8.9 or more; this GPU has {capability[0]}.{capability[1]}. "
                "Use scheme='w8a8_int8'."
            )


def auto_scheme(device: torch.device, *, calibrated: bool = False, small: bool = False) -> tuple[str, str]:
    """(scheme, why) for ``scheme="auto"``; never one with 4-bit activations.

    Args:
        calibrated: calibration data are at hand.  small: 8 bits do not fit the memory that was named.
    """
    if small:
        if calibrated:
            return "svdq_w4a8", "8-bit weights exceed the memory budget, and there are calibration data"
        return "w4a16", "8-bit weights exceed the memory budget, and there are no calibration data"
    if device.type != "cuda":
        return "w8a8_int8", f"int8 products are exact on the {device.type}"
    capability = torch.cuda.get_device_capability(device)
    version = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 9):
        return "w8a8_fp8", f"{version} has float8 tensor cores"
    if capability >= (8, 0):
        return "w8a8_int8", f"{version} has int8 tensor cores and no float8"
    return "w8a16_int8", f"{version} is below 8.0: weights only"
