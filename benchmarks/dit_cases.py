"""The settings that ``dit.py`` compares, and how one of them is timed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measuring import interleaved, ratio, summary, timed
from torch import Tensor, nn

from vlmeff.diffusion.convert import quantize_
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.qvgen.prepare import cast
from vlmeff.diffusion.schemes import SCHEMES, LayerSpec
from vlmeff.errors import SchemeNotSupportedError
from vlmeff.ops.packing import pack_nibbles

TORCHAO = ("torchao int8", "torchao fp8")
CALLS = {"cuda": 10, "cpu": 1}  # of one measurement

Run = Callable[[], object]
Cases = dict[str, Run]


def dense_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The layers to compare with, the first of them the reference; quantized layers take its dtype."""
    if device.type == "cuda":
        return {"bfloat16": torch.bfloat16}
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_layer(spec: LayerSpec, n: int, k: int, dtype: torch.dtype, device: torch.device) -> QuantLinear:
    """A quantized layer with random codes."""
    generator = torch.Generator(device=device).manual_seed(0)

    def codes(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n, k), generator=generator, device=device, dtype=torch.int16)

    layer = QuantLinear(k, n, spec, dtype=dtype, device=device)
    if spec.weight == "fp8":
        layer.qweight.copy_(torch.randn(n, k, generator=generator, device=device))
    elif spec.packed:
        low, high = (1, 16) if spec.weight == "int" else (0, 2**spec.w_bits)
        layer.qweight.copy_(pack_nibbles(codes(low, high), pad=low))
    else:
        layer.qweight.copy_(codes(-127, 128))
    layer.w_scale.fill_(1e-3)
    for values in (layer.w_zero, layer.lr_down, layer.lr_up, layer.bias):
        if values is not None:
            values.uniform_(0, 1, generator=generator)
    layer.refresh()
    return layer


def with_torchao(model: nn.Module, name: str) -> nn.Module:
    """The same model with its linear layers replaced by torchao, in place.

    Raises:
        ImportError, AssertionError, RuntimeError, NotImplementedError, ValueError: torchao cannot do it here.
    """
    from torchao import quantization as ao

    if name == "torchao int8":
        config: Any = ao.Int8DynamicActivationInt8WeightConfig()
    else:
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(model, config)
    return model


def collect(
    makers: dict[str, Callable[[], Run]], left_out: dict[str, str], device: torch.device
) -> tuple[Cases, dict[str, int]]:
    """(the cases that can be made and run here, the bytes that each holds); the others go to ``left_out`` with why."""
    cases: Cases = {}
    for name, make in makers.items():
        try:
            run = make()
            run()  # warm; and some refuse only now
        except (ImportError, AssertionError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if name not in TORCHAO and not isinstance(error, SchemeNotSupportedError):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        cases[name] = run
    return cases, {name: getattr(run, "bytes", 0) for name, run in cases.items()}


def milliseconds(run: Run, device: torch.device) -> float:
    """Of one call: on CUDA by the clock, the device's work included; on a CPU of the processor."""
    calls = CALLS[device.type]
    if device.type == "cuda":
        return timed(lambda: [run() for _ in range(calls)], device) / calls
    start = time.process_time()
    for _ in range(calls):
        run()
    return 1000 * (time.process_time() - start) / calls


def measured(cases: Cases, held: dict[str, int], rounds: int, device: torch.device, what: str) -> dict[str, Any]:
    """Times of all cases, and how many times faster each is than the dense and torchao's layers (in a round)."""
    times = interleaved({name: lambda run=run: milliseconds(run, device) for name, run in cases.items()}, rounds, what)
    bases = [*dense_dtypes(device), *TORCHAO]
    return {
        name: {
            "ms": summary(values),
            "bytes": held[name],
            "times_faster_than": {base: ratio(times[base], values) for base in bases if base in times},
        }
        for name, values in times.items()
    }


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers; of torchao's tensors those of the tensors inside."""

    def size(tensor: Tensor) -> int:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None:
            return tensor.numel() * tensor.element_size()
        return sum(size(getattr(tensor, name)) for name in flatten()[0] if getattr(tensor, name) is not None)

    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(size(t.data) if type(t) is nn.Parameter else size(t) for t in tensors.values())


class Layer:
    """One call of a module on a fixed input."""

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.bytes = bytes_of(module)

    def __call__(self) -> object:
        return self.module(*self.args, **self.kwargs)


def in_dtype(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as the pipelines load it: norms and the time embedding stay in float32."""
    cast(transformer, dtype)
    return transformer


def quantized(transformer: nn.Module, scheme: str) -> nn.Module:
    quantize_(transformer, scheme, search=False, keep_original=False)
    return transformer


def of_blocks(transformer: nn.Module, name: str) -> nn.Module:
    """torchao in the blocks only, as the rules have it."""
    for block in transformer.blocks:
        with_torchao(block, name)
    return transformer


def variants(plain: nn.Module, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Name -> maker of a copy of the transformer."""
    dtypes = dense_dtypes(device)
    makers: dict[str, Callable[[], nn.Module]] = {
        name: lambda dtype=dtype: in_dtype(copy.deepcopy(plain), dtype) for name, dtype in dtypes.items()
    }
    makers |= {name: lambda name=name: quantized(copy.deepcopy(plain), name) for name in SCHEMES}
    makers |= {
        name: lambda name=name: of_blocks(in_dtype(copy.deepcopy(plain), torch.bfloat16), name) for name in TORCHAO
    }
    return makers
