"""Errors of vlmeff. A leaf module: it imports nothing of ours.

Every error names the argument to change and the remedy. ``exit_code`` is what the command line returns:
2 usage or configuration, 3 data, 4 model or preset.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmeffError(Exception):
    """Base of every error that vlmeff raises on purpose."""

    exit_code = 2

    def __str__(self) -> str:
        # KeyError's own __str__ shows the repr of its argument, quotes and all.
        return str(self.args[0]) if self.args else ""


class ConfigError(VlmeffError, ValueError):
    """An argument has a value that cannot work."""


class DataError(VlmeffError, ValueError):
    """A picture or a data file is missing or broken."""

    exit_code = 3


class BadImageError(DataError):
    """A picture of a data set cannot be decoded, or is too large (E-DATA-06)."""


class RunError(VlmeffError, RuntimeError):
    """An evaluation run cannot go on: another process writes it, rows are missing, too much failed (E-RUN-..)."""

    exit_code = 4


class UnsupportedModelError(VlmeffError, TypeError):
    """The model's class or geometry is not supported."""

    exit_code = 4


class IncompatibleError(VlmeffError, RuntimeError):
    """Two things that were asked for together cannot work together."""

    exit_code = 4


class QuantConfigError(ConfigError):
    """Bits, group, rank, scheme or rules of a quantization cannot work."""


class AlreadyQuantizedError(ConfigError):
    """Layers were to be quantized that are quantized already."""


class CheckpointError(VlmeffError, ValueError):
    """A saved model misses layers, has others, or was written in an unknown version."""

    exit_code = 4


class ExportError(VlmeffError, RuntimeError):
    """A layer cannot leave training yet: its auxiliary module has not decayed."""

    exit_code = 4


class SchemeNotSupportedError(VlmeffError, RuntimeError):
    """This hardware has no arithmetic for the scheme."""

    exit_code = 4


class BackendUnavailableError(VlmeffError, RuntimeError):
    """A back end was asked for by name and cannot serve the call."""

    def __init__(self, op: str, backend: str, reason: str) -> None:
        super().__init__(f"vlmeff.ops.{op}: back end {backend!r} was asked for and cannot be used: {reason}")
        self.op, self.backend, self.reason = op, backend, reason


class MissingExtraError(VlmeffError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(f'E-ENV-01: {purpose} need the package {module!r}: pip install "vlmeff[{extra}]"')


class EnvironmentMismatchError(VlmeffError, ImportError):
    """Installed packages do not fit each other."""


class UnknownNameError(VlmeffError, KeyError):
    """A name (preset, model, method, ...) is not known; the message lists the nearest ones, after ``code`` if given."""

    def __init__(self, kind: str, name: object, known: Iterable[str], *, code: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        code = f"{code}: " if code else ""
        super().__init__(f"{code}unknown {kind} {name!r}.{hint} Available: {', '.join(known) or 'none'}.")


class UnknownModelError(UnknownNameError):
    """A model name is not in the zoo, not a folder and not loadable from the hub."""

    exit_code = 4


class UnknownPresetError(UnknownNameError):
    """A preset name is not in the zoo."""

    exit_code = 4


class UnsupportedInputError(VlmeffError, NotImplementedError):
    """The model is supported, this kind of input is not."""


class NonFiniteScoreError(VlmeffError, FloatingPointError):
    """A token score is NaN or infinite: the model's activations overflowed."""

    exit_code = 4


class BudgetTooSmallError(VlmeffError, ValueError):
    """A KV budget is smaller than what has to stay: the protected tokens and one more in each layer."""


class RecipeFormatError(VlmeffError, ValueError):
    """A KV recipe file cannot be read, or breaks its format."""

    exit_code = 3


class RecipeMismatchError(VlmeffError, ValueError):
    """A KV recipe was made for a model of another geometry."""

    exit_code = 4


class UnsupportedCacheError(VlmeffError, TypeError):
    """KV retention cannot work with this kind of cache, or without one."""

    exit_code = 4


class UnsupportedMaskError(VlmeffError, ValueError):
    """KV retention cannot work with an attention mask of this form."""


class RetentionStateError(VlmeffError, RuntimeError):
    """A retained cache is asked for what is not in it any more, or is used without what it needs."""


class ModelLoadError(VlmeffError, OSError):
    """A model's files are missing, broken or out of reach."""

    exit_code = 4


class ZooError(VlmeffError, ValueError):
    """A model zoo file is missing or breaks its schema; ``problems`` holds one readable line for each thing wrong."""

    def __init__(self, path: object, problems: Iterable[object]) -> None:
        self.path, self.problems = str(path), tuple(str(problem) for problem in problems)
        super().__init__(f"{self.path} is not a usable model zoo:\n" + "\n".join(f"  {line}" for line in self.problems))
