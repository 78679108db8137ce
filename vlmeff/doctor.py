"""What is installed, what hardware is there, and which back end every op of ``vlmeff.ops`` would take on it.

``diagnose()`` only looks: it changes nothing, and launches nothing on a GPU but the self-tests that dispatch itself
asks for. It works where torch is missing or broken, so torch is imported inside functions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmeff import __version__
from vlmeff.environment import check_torchvision
from vlmeff.errors import BackendUnavailableError, ConfigError, EnvironmentMismatchError

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

VARIABLES = ("VLMEFF_BACKEND", "TRITON_INTERPRET", "VLMEFF_DEBUG")
SHOWN_ANYWAY = ("triton", "diffusers")  # what users ask about, whether or not it is a dependency of the core
FOR_DEVELOPMENT = ("dev", "test")
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"  # of a source tree; an installed copy has none
REINSTALL = "pip install --force-reinstall vlmeff"
CHOOSE_ANOTHER = (
    "unset VLMEFF_BACKEND, or set it to auto, accelerated, reference, cuda, triton, torch or OP=BACK_END,..."
)
PATIENCE_S = 20  # for nvcc and nvidia-smi, which hang where a driver does


@dataclass(frozen=True)
class Package:
    """``version`` is None where it is not installed; ``wanted`` is what we ask for, "" for anything."""

    name: str
    version: str | None
    wanted: str
    core: bool
    fits: bool
    """False if it is installed and its version is not one that we ask for."""


@dataclass(frozen=True)
class Extra:
    """An optional extra of ours, and what it lacks here."""

    name: str
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Device:
    name: str
    capability: str
    memory_gib: float


@dataclass(frozen=True)
class OpChoice:
    """Where a representative call of an op would run here."""

    op: str
    back_ends: tuple[str, ...]
    """Those that vlmeff_kernels has, in order of preference; the reference is always there."""
    chosen: str | None
    """None where the call would raise: ``why`` then says what."""
    why: str
    passed_over: Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """Something that is broken, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    vlmeff: str
    python: str
    system: str
    packages: tuple[Package, ...]
    torch_cuda: str | None
    """The CUDA version that torch was built for."""
    torchvision_matches: bool | None
    """Whether torchvision fits torch; None where one of them is missing."""
    extras: tuple[Extra, ...]
    devices: tuple[Device, ...]
    driver: str | None
    nvcc: str | None
    cuda_library: str | None
    """Where the compiled library of vlmeff_kernels lies; None where it is not built."""
    environment: Mapping[str, str | None]
    ops_on: str
    """The device of the calls in ``ops``."""
    ops: tuple[OpChoice, ...]
    accepted: tuple[Mapping[str, str], ...]
    """What measurements let automatic dispatch take: op, backend, capability, bucket."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def diagnose() -> Diagnosis:
    """Look at everything. Raises nothing for what is missing or broken: that is in ``problems``."""
    problems: list[Problem] = []
    notes: list[str] = []
    packages, extras = _packages(problems)
    torch_cuda, devices = _torch(problems, notes)
    has_torch = torch_cuda != ""
    device = "cuda" if devices else "cpu"
    accepted, library, nvcc = _kernels(devices, problems, notes)
    choices = _choices(device, problems, notes) if has_torch else ()
    if devices and os.environ.get("TRITON_INTERPRET") not in (None, "", "0"):
        notes.append("TRITON_INTERPRET is set: Triton kernels are interpreted on CPU tensors and never run on the GPU.")
    return Diagnosis(
        vlmeff=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        packages=packages,
        torch_cuda=torch_cuda or None,
        torchvision_matches=_torchvision(problems) if has_torch else None,
        extras=extras,
        devices=devices,
        driver=_said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"^(\S+)"),
        nvcc=nvcc and _said([nvcc, "--version"], r"release [\d.]+, V([\d.]+)"),
        cuda_library=library,
        environment={name: os.environ.get(name) for name in VARIABLES},
        ops_on=device,
        ops=choices,
        accepted=accepted,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _packages(problems: list[Problem]) -> tuple[tuple[Package, ...], tuple[Extra, ...]]:
    try:
        core, of_extras = _requirements()
    except ModuleNotFoundError as error:  # packaging, which reads them
        problems.append(Problem(f"the package {error.name} is not installed.", f"pip install {error.name}"))
        return (), ()
    rows = [_package(requirement, core=True) for requirement in core]
    for row in rows:
        if row.version is None:
            problems.append(
                Problem(f"the package {row.name} is not installed.", f'pip install "{row.name}{row.wanted}"')
            )
        elif not row.fits:
            problems.append(
                Problem(
                    f"E-ENV-02: {row.name} {row.version} is outside the range that vlmeff works with ({row.wanted}).",
                    f'pip install "{row.name}{row.wanted}"',
                )
            )
    rows += [Package(name, _version(name), "", core=False, fits=True) for name in SHOWN_ANYWAY]
    extras = []
    for name, requirements in of_extras.items():
        needed = [_package(requirement, core=False) for requirement in requirements]
        lacks = tuple(f"{row.name}{row.wanted}" for row in needed if row.version is None or not row.fits)
        extras.append(Extra(name, lacks))
    return tuple(rows), tuple(extras)


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the core needs, and each extra: from the source tree, or from the metadata of the installed package."""
    from packaging.requirements import Requirement

    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        core = [Requirement(line) for line in project["dependencies"]]
        extras = {
            name: [Requirement(line) for line in lines] for name, lines in project["optional-dependencies"].items()
        }
    else:
        about = importlib.metadata.metadata("vlmeff")
        every = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
        core = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
        extras = {
            name: [r for r in every if r not in core and r.marker is not None and r.marker.evaluate({"extra": name})]
            for name in about.get_all("Provides-Extra") or []
        }
    whole = {}
    for name in sorted(set(extras) - set(FOR_DEVELOPMENT)):
        ours = [extra for r in extras[name] if r.name == "vlmeff" for extra in r.extras]  # vlmeff[serve] in another one
        whole[name] = [r for part in (name, *ours) for r in extras[part] if r.name != "vlmeff"]
    return core, whole


def _package(requirement: Requirement, *, core: bool) -> Package:
    version = _version(requirement.name)
    fits = version is None or requirement.specifier.contains(version, prereleases=True)
    return Package(requirement.name, version, str(requirement.specifier), core=core, fits=fits)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(problems: list[Problem], notes: list[str]) -> tuple[str | None, tuple[Device, ...]]:
    """(CUDA version of the build, None for a build without, "" if torch cannot be used; the GPUs)."""
    try:
        import torch
    except (ImportError, OSError) as error:
        if _version("torch") is not None:  # else it is reported as missing
            problems.append(
                Problem(f"torch cannot be imported: {error}", "pip install --force-reinstall torch torchvision")
            )
        return "", ()
    with warnings.catch_warnings(record=True) as said:  # that the driver is too old, for example
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            about = [torch.cuda.get_device_properties(index) for index in range(count)]
        except RuntimeError as error:  # a GPU that is dead, in use exclusively, or of a driver that does not answer
            problems.append(Problem(f"the GPU cannot be used: {_first_line(error)}", "look at what nvidia-smi says"))
            about = []
    notes += [str(warning.message).strip().splitlines()[0] for warning in said]
    found = [Device(a.name, f"{a.major}.{a.minor}", round(a.total_memory / 2**30, 1)) for a in about]
    return torch.version.cuda, tuple(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _torchvision(problems: list[Problem]) -> bool | None:
    if _version("torchvision") is None:
        return None
    try:
        check_torchvision()
    except EnvironmentMismatchError as error:
        what, _, remedy = str(error).partition(" Reinstall both together: ")
        problems.append(Problem(f"E-ENV-03: {what}", remedy or "pip install --force-reinstall torch torchvision"))
        return False
    return True


def _said(command: list[str], pattern: str) -> str | None:
    """The first group of ``pattern`` in what the command prints; None where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout) if done.returncode == 0 else None
    return found.group(1) if found else None


def _kernels(
    devices: tuple[Device, ...], problems: list[Problem], notes: list[str]
) -> tuple[tuple[Mapping[str, str], ...], str | None, str | None]:
    """(what ``accepted.json`` accepts, where the compiled library lies, where nvcc is)."""
    try:
        text = resources.files("vlmeff_kernels").joinpath("accepted.json").read_text(encoding="utf-8")
        from vlmeff_kernels import build
    except ImportError as error:
        if error.name == "vlmeff_kernels" and isinstance(error, ModuleNotFoundError):
            notes.append("the package vlmeff_kernels is not installed: every op runs on the reference.")
        else:
            problems.append(Problem(f"vlmeff_kernels cannot be imported: {error}", REINSTALL))
        return (), None, shutil.which("nvcc")
    accepted = tuple({key: str(value) for key, value in row.items()} for row in json.loads(text)["accepted"])
    if not accepted:
        notes.append(
            "no measurement accepts a kernel of vlmeff_kernels: they run only where they are asked for, with "
            'VLMEFF_BACKEND=accelerated or vlmeff.ops.backend("accelerated").'
        )
    nvcc: str | None = None
    with suppress(build.BuildError):
        nvcc = str(build.find_nvcc())
    library = build.built()
    if library is not None and devices:
        _try_library(problems)
    return accepted, None if library is None else str(library), nvcc


def _try_library(problems: list[Problem]) -> None:
    try:
        from vlmeff_kernels import cuda_ops
    except ImportError as error:
        problems.append(Problem(f"vlmeff_kernels.cuda_ops cannot be imported: {error}", REINSTALL))
        return
    with warnings.catch_warnings():  # it warns of what is a problem here
        warnings.simplefilter("ignore")
        reason = cuda_ops.load()
    if reason is not None:
        problems.append(Problem(f"the CUDA library: {reason}", "python -m vlmeff_kernels.build --force"))


def _choices(device: str, problems: list[Problem], notes: list[str]) -> tuple[OpChoice, ...]:
    from vlmeff import ops
    from vlmeff.ops._dispatch import _operators

    try:
        from vlmeff_kernels import OPS
    except ImportError:  # told by _kernels
        OPS = {}
    try:
        calls = sample_calls(device)
    except RuntimeError as error:  # it is there, and has no memory or is no more
        problems.append(Problem(f"{device}: {_first_line(error)}", "look at what nvidia-smi says"))
        calls = sample_calls("cpu")
    choices = []
    for op in sorted(_operators):
        back_ends = tuple(OPS.get(op, {}))
        if op not in calls:
            choices.append(OpChoice(op, back_ends, None, "vlmeff.doctor has no sample call of it", {}))
            continue
        args, kwargs = calls[op]
        try:
            found = ops.explain(op, *args, **kwargs)
        except BackendUnavailableError as error:
            choices.append(OpChoice(op, back_ends, None, error.reason, {}))
        except ConfigError as error:  # of VLMEFF_BACKEND: the calls themselves are right
            problems.append(Problem(str(error), CHOOSE_ANOTHER))
            return ()
        except ImportError as error:
            problems.append(Problem(f"{op}: a back end cannot be imported: {error}", REINSTALL))
            choices.append(OpChoice(op, back_ends, None, str(error), {}))
        else:
            passed_over = {name: reason for name, reason in found.refused.items() if name in back_ends}
            choices.append(OpChoice(op, back_ends, found.backend, found.why, passed_over))
    refused = [choice.op for choice in choices if choice.chosen is None]
    if refused and os.environ.get(VARIABLES[0]):
        notes.append(f"{VARIABLES[0]}={os.environ[VARIABLES[0]]} cannot serve such calls of {', '.join(refused)}.")
    return tuple(choices)


def sample_calls(device: str | torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Op -> arguments of a representative call, of realistic dtypes and of sizes that cost nothing to hold.

    Values are never computed with, so floats are whatever lies in memory.
    """
    import torch

    from vlmeff import ops

    def of(dtype: torch.dtype) -> Any:
        return lambda *shape: torch.empty(shape, dtype=dtype, device=device)

    half, single, byte, signed = of(torch.bfloat16), of(torch.float32), of(torch.uint8), of(torch.int8)
    fp8 = of(torch.float8_e4m3fn)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    heads, queries, keys = half(1, 28, 64, 128), 64, half(1, 4, 640, 128)
    scale = {"scale": 128**-0.5}
    rows, k, n = 64, 1024, 1024
    scales, weight_scales = single(rows, 1), single(n, 1)
    zero = zeros(rows, 1, dtype=torch.int32)
    tokens = 512  # in the groups of 32 and 64 that KIVI has, and 128 more
    codes, rest = byte(1, 4, tokens, 64), half(1, 4, 128, 128)
    stored_keys = ops.StoredStates(codes, half(1, 4, tokens // 32, 128), half(1, 4, tokens // 32, 128), rest, 4, 32)
    stored_values = ops.StoredStates(codes, half(1, 4, tokens, 2), half(1, 4, tokens, 2), rest, 4, 64)
    return {
        "act_quant_fp8": ((half(rows, k),), {}),
        "act_quant_int8": ((half(rows, k),), {}),
        "act_quant_uint": ((half(rows, k),), {"bits": 4}),
        "attention_column_mass": ((heads, keys), scale | {"causal": True}),
        "dct_resample": ((half(1, 576, 1024), (24, 24), (16, 16)), {}),
        "gather_kv": ((keys, keys, zeros(1, 320)), {}),
        "gather_tokens": ((half(1, 640, 1024), zeros(1, 320)), {}),
        "gaussian_path_log_ratio": ((single(100, 64, 16),) * 5, {}),
        "gelu_quant_int8": ((half(rows, k),), {"approximate": "tanh"}),
        "linear_w4a8_int8": ((signed(rows, k), scales, byte(n, k // 2), weight_scales, None, torch.bfloat16), {}),
        "linear_w8a8_fp8": ((fp8(rows, k), scales, fp8(n, k), weight_scales, None, torch.bfloat16), {}),
        "linear_w8a8_int8": ((signed(rows, k), scales, signed(n, k), weight_scales, None, torch.bfloat16), {}),
        "linear_wna16": ((half(1, k), byte(n, k // 2), single(n, k // 128), None, None), {"bits": 4, "group": 128}),
        "linear_wnan_int": (
            (byte(rows, k), scales, zero, zero, byte(n, k // 2), weight_scales, weight_scales,
             zeros(n, dtype=torch.int32), None, torch.bfloat16),
            {},
        ),
        "norm_quant_int8": ((half(1, rows, k),), {"eps": 1e-6, "scale": single(1, k), "shift": single(1, k)}),
        "quantized_decode_attention": ((half(1, 28, 1, 128), stored_keys, stored_values), scale),
        "row_logsumexp": ((heads, keys), scale | {"causal": True}),
        "text_to_vision_scores": ((heads, keys), scale | {"text": zeros(1, queries), "vision": zeros(1, 576)}),
        "top_indices": ((single(1, 576), 192), {}),
    }  # fmt: skip
