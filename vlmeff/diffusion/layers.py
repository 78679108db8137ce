"""``QuantLinear``: the linear layer of inference, one class for every scheme.

Shape letters: M tokens (leading dimensions flattened), K input features, N output features, n_g groups, r rank.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmeff import ops
from vlmeff.diffusion import quantizers
from vlmeff.diffusion.schemes import LayerSpec
from vlmeff.errors import QuantConfigError, UnsupportedInputError
from vlmeff.ops.linear import SIGNED_OFFSET, dequantize_weight
from vlmeff.ops.packing import pack_nibbles, unpack_nibbles

logger = logging.getLogger(__name__)

# Casting the model must not touch these: float32 scales rounded to bfloat16 are another model.
PROTECTED = ("qweight", "w_scale", "w_zero", "a_clip", "smooth")


class QuantLinear(nn.Module):
    """y = x W^T + b with W as codes and scales, activations quantized on the fly where the scheme says so.

    The tensors are parameters without gradient, not buffers: diffusers' sequential offload moves buffers only where the
    root model has parameters of its own. There is no ``weight``; ``dequantize`` gives it.

    Parameters: ``qweight`` (codes as in the checkpoint), ``w_scale`` [N, n_g], and by scheme ``w_zero`` [N, n_g],
    ``smooth`` [K], ``a_clip`` [2] (factors of the lower and the upper end), ``lr_down`` [r, K], ``lr_up`` [N, r],
    ``bias`` [N]. ``w_colsum`` [N] int32 is derived and not saved.
    """

    qweight: Tensor
    w_scale: Tensor
    w_zero: Tensor | None
    smooth: Tensor | None
    a_clip: Tensor | None
    lr_down: Tensor | None
    lr_up: Tensor | None
    bias: Tensor | None
    w_colsum: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.orig_dtype = dtype
        self.cast_to: torch.dtype | None = None  # what the model was cast to since
        self.rank = min(spec.rank, in_features, out_features)
        self.shared: SharedActivation | None = None  # with the layers that take the same input
        n, k, groups = out_features, in_features, spec.groups(in_features)

        def parameter(name: str, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            value = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, value if wanted else None)

        parameter("qweight", True, (n, -(-k // 2) if spec.packed else k), spec.codes_dtype)
        parameter("w_scale", True, (n, groups), spec.scale_dtype)
        parameter("w_zero", spec.zero != "none", (n, groups), spec.scale_dtype)
        parameter("smooth", spec.smooth, (k,), torch.float32)
        parameter("a_clip", spec.a_clip, (2,), torch.float32)
        parameter("lr_down", self.rank > 0, (self.rank, k), dtype)
        parameter("lr_up", self.rank > 0, (n, self.rank), dtype)
        parameter("bias", bias, (n,), dtype)
        self.register_buffer("w_colsum", None, persistent=False)
        if spec.smooth and self.smooth is not None and not self.smooth.is_meta:
            self.smooth.fill_(1.0)
        if spec.a_clip and self.a_clip is not None and not self.a_clip.is_meta:
            self.a_clip.fill_(1.0)
        self.register_load_state_dict_post_hook(_refresh)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: LayerSpec,
        *,
        smooth: Tensor | None = None,
        search: bool | None = None,
        refine: int = 0,
    ) -> QuantLinear:
        """Quantize the weights of ``linear`` by rounding to nearest.

        Args:
            smooth: [K], what activations are divided by; weights are multiplied by it. Needs a scheme that has it.
            search: choose each range by its error instead of from minimum to maximum; None does so for per-channel
                codes with a zero-point (the 4- and 3-bit ones of QVGen).
            refine: rounds in which a low-rank branch is fitted again to what the codes leave.
        """
        from vlmeff.diffusion.lowrank import split_low_rank

        weight = linear.weight.detach().float()
        if smooth is not None:
            if not spec.smooth:
                raise QuantConfigError(f"{spec.scheme} takes no smoothing vector.")
            weight = weight * smooth.float()
        down = up = None
        if spec.rank:
            if spec.rank > min(weight.shape):
                logger.warning(
                    "vlmeff: rank %d is more than a %dx%d layer can hold; it gets %d",
                    *(spec.rank, *weight.shape, min(weight.shape)),
                )
            down, up, weight = split_low_rank(weight, spec, rounds=refine, dtype=linear.weight.dtype)
        zero = None
        if spec.weight == "fp8":
            codes, scale = quantizers.fp8(weight)
        elif spec.weight == "int":
            codes, scale = quantizers.symmetric(weight, spec.w_bits, spec.group, scale_dtype=spec.scale_dtype)
        else:
            codes, scale, zero = quantizers.asymmetric(
                weight,
                spec.w_bits,
                spec.group,
                zero="float" if spec.zero == "float" else "integer",
                search=spec.group == 0 if search is None else search,
                scale_dtype=spec.scale_dtype,
            )
        layer = cls.from_codes(codes, scale, zero, linear.bias, spec, dtype=linear.weight.dtype)
        with torch.no_grad():
            if layer.smooth is not None and smooth is not None:
                layer.smooth.copy_(smooth)
            if down is not None and up is not None and layer.lr_down is not None and layer.lr_up is not None:
                layer.lr_down.copy_(down)
                layer.lr_up.copy_(up)
        return layer

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        spec: LayerSpec,
        *,
        dtype: torch.dtype = torch.float32,
        a_clip: Tensor | None = None,
    ) -> QuantLinear:
        """A layer of given codes.

        Args:
            codes: [N, K] unpacked; signed for spec.weight "int".  scale, zero: [N, n_g].  bias: [N] or None.
            a_clip: [2] factors of the lower and the upper end of the activations' range, in (0, 1].
        """
        n, k = codes.shape
        layer = cls(k, n, spec, bias=bias is not None, dtype=dtype, device=codes.device)
        with torch.no_grad():
            layer.qweight.copy_(_stored(codes, spec, zero))
            layer.w_scale.copy_(scale)
            if layer.w_zero is not None:
                if zero is None:
                    raise QuantConfigError(f"{spec.scheme} needs zero-points.")
                layer.w_zero.copy_(zero)
            if layer.a_clip is not None and a_clip is not None:
                layer.a_clip.copy_(a_clip)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        layer.refresh()
        return layer

    def refresh(self) -> None:
        """Compute what follows from the parameters; called after they were loaded."""
        if self.spec.weight == "uint" and self.spec.a_bits < 16 and not self.qweight.is_meta:
            codes = unpack_nibbles(self.qweight.detach(), self.in_features)
            self.w_colsum = codes.sum(1, dtype=torch.int32)

    def codes(self) -> Tensor:
        """The codes of the weights, unpacked: [N, K], signed where the scheme is."""
        if not self.spec.packed:
            return self.qweight.detach()
        codes = unpack_nibbles(self.qweight.detach(), self.in_features)
        return codes.to(torch.int8) - SIGNED_OFFSET if self.spec.weight == "int" else codes

    def dequantize(self) -> Tensor:
        """The weight [N, K] that this layer stands for, float32, with the low-rank branch and without smoothing."""
        spec = self.spec
        weight = dequantize_weight(
            self.qweight, self.w_scale, self.w_zero, bits=_stored_bits(spec), group=spec.group, k=self.in_features
        )
        if self.lr_up is not None and self.lr_down is not None:
            weight = weight + self.lr_up.float() @ self.lr_down.float()
        return weight if self.smooth is None else weight / self.smooth

    @property
    def takes_gelu(self) -> bool:
        """Whether a GELU can be computed while the input is quantized: int8, a scale per token, no other reader."""
        spec = self.spec
        per_token = not 0 < spec.a_group < self.in_features
        alone = self.lr_down is None and self.shared is None
        return spec.weight == "int" and spec.a_bits == 8 and per_token and alone

    def forward(self, x: Tensor, *, gelu: Literal["none", "tanh"] | None = None) -> Tensor:
        """[..., K] of any float dtype -> [..., N] of the same.

        Args:
            gelu: apply this GELU to x first (``torch.nn.functional.gelu``'s ``approximate``); None for none.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedInputError(
                "QuantLinear has no gradient: run under torch.no_grad(), or train with vlmeff.diffusion.qvgen."
            )
        if x.shape[-1] != self.in_features:  # an odd K is packed as the even one above it: no op would notice
            raise ValueError(f"QuantLinear: the input has {x.shape[-1]} features, the layer takes {self.in_features}.")
        if gelu is not None and not self.takes_gelu:
            x, gelu = F.gelu(x, approximate=gelu), None
        flat = x.reshape(-1, x.shape[-1])
        out = self._product(x, flat, gelu)
        if self.lr_down is not None and self.lr_up is not None:
            smoothed = flat if self.smooth is None else (flat.float() / self.smooth).to(x.dtype)
            branch = smoothed.to(self.lr_down.dtype) @ self.lr_down.T @ self.lr_up.T
            out = out + branch.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, flat: Tensor, gelu: Literal["none", "tanh"] | None = None) -> Tensor:
        spec, scale, bias = self.spec, self.w_scale, self.bias
        if spec.a_bits == 16:
            if self.smooth is not None:
                flat = (flat.float() / self.smooth).to(x.dtype)
            return ops.linear_wna16(
                flat, self.qweight, scale, self.w_zero, bias, bits=_stored_bits(spec), group=spec.group
            )
        if gelu is not None:
            activation: tuple[Tensor, ...] = ops.gelu_quant_int8(flat, self.smooth, approximate=gelu)
        else:
            activation = self._activation(x, flat)
        if spec.weight == "uint":
            assert self.w_zero is not None
            assert self.w_colsum is not None
            codes, s, z, rowsum = activation
            return ops.linear_wnan_int(
                codes, s, z, rowsum, self.qweight, scale, self.w_zero, self.w_colsum, bias, x.dtype
            )
        codes, s = activation
        if spec.weight == "fp8":
            return ops.linear_w8a8_fp8(codes, s, self.qweight, scale, bias, x.dtype)
        if spec.packed:
            return ops.linear_w4a8_int8(codes, s, self.qweight, scale, bias, x.dtype, group=spec.group)
        return ops.linear_w8a8_int8(codes, s, self.qweight, scale, bias, x.dtype)

    def _activation(self, x: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        """The quantized input, taken from a layer that had the same one where there is one (q, k and v)."""

        def quantize() -> tuple[Tensor, ...]:
            spec = self.spec
            if spec.weight == "uint":
                return ops.act_quant_uint(flat, bits=spec.a_bits, clip=self.a_clip, contain_zero=spec.contain_zero)
            if spec.weight == "fp8":
                return ops.act_quant_fp8(flat, self.smooth)
            return ops.act_quant_int8(flat, self.smooth, bits=spec.a_bits, group=spec.a_group)

        if self.shared is None or torch.compiler.is_compiling():  # a compiler finds equal computations itself
            return quantize()
        return self.shared.get(x, quantize)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves as ever; casts leave codes, scales and factors alone."""
        kept = {id(self._parameters[name]) for name in PROTECTED if self._parameters.get(name) is not None}
        probe = fn(torch.empty(0, dtype=torch.float64, device=self.qweight.device))
        if probe.dtype != torch.float64:
            self.cast_to = probe.dtype

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(guarded, recurse)  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # what fuse_projections and LoRA ask for
            raise AttributeError(
                "QuantLinear has no weight: fuse projections or LoRA before quantizing; dequantize() gives the weight."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.spec.scheme}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shared": None}  # holds a weak reference; a copy quantizes for itself


class SharedActivation:
    """Lets layers of one input quantize it once: a memory of one entry, dropped with the input or when every member
    had it."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._entry: tuple[weakref.ref[Tensor], int, tuple[Tensor, ...]] | None = None
        self._uses = 0

    def get(self, x: Tensor, quantize: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if x.is_inference():  # no version to tell whether it was written to
            return quantize()
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1] == x._version:
            self._uses += 1
            if self._uses >= self.members:
                self._entry = None
            return entry[2]
        values = quantize()
        self._entry, self._uses = (weakref.ref(x, self._forget), x._version, values), 1
        return values

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        """The input is no more: a member that was not called will not ask for it."""
        if self._entry is not None and self._entry[0] is gone:
            self._entry = None


def share_activations(layers: list[QuantLinear]) -> None:
    """Let these layers quantize a common input once; they must quantize it alike."""
    specs = {(x.spec.weight, x.spec.a_bits, x.spec.a_group, x.spec.contain_zero) for x in layers}
    if len(layers) < 2 or len(specs) > 1 or layers[0].spec.a_bits == 16 or any(x.a_clip is not None for x in layers):
        return
    if any(not _same(layer.smooth, layers[0].smooth) for layer in layers):
        return
    memory = SharedActivation(len(layers))
    for layer in layers:
        layer.shared = memory


def _refresh(layer: QuantLinear, _: Any) -> None:
    """After loading; a function of the module, because a lambda cannot be pickled."""
    if layer.smooth is not None:
        layer.shared = None  # its smoothing vector may now differ from its siblings'
    layer.refresh()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _stored_bits(spec: LayerSpec) -> int:
    """What ``linear_wna16`` has to know: 8 for a code per byte, else two in a byte."""
    return spec.w_bits if spec.packed else 8


def _stored(codes: Tensor, spec: LayerSpec, zero: Tensor | None) -> Tensor:
    if not spec.packed:
        return codes.to(spec.codes_dtype)
    if spec.weight == "int":
        return pack_nibbles(codes.to(torch.int16) + SIGNED_OFFSET, pad=SIGNED_OFFSET)
    nothing = 0 if zero is None else zero[:, -1].float().round().clamp(0, 2**spec.w_bits - 1)  # the code of zero
    return pack_nibbles(codes, pad=nothing)
