"""What lmms-eval hands over as text: ``--model_args`` and a task's generation settings. No torch, no lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmeff import __version__
from vlmeff.errors import ConfigError, UnknownNameError

MODEL_ARGS = (
    "pretrained",
    "revision",
    "preset",
    "preset_args",
    "dtype",
    "attn_implementation",
    "min_pixels",
    "max_pixels",
    "system_prompt",
    "vlmeff_rev",
)
FROM_EVALUATOR = ("batch_size", "max_batch_size", "device")
# Of a task that does not say: terse answers end by themselves, and a model that does not end has to be stopped.
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """``--model_args``, checked. ``preset_args``: keyword arguments of ``vlmeff.wrap``.

    ``preset``: "none" is the model as it is; None what ``pretrained`` comes with, which only a zoo entry does.
    """

    pretrained: str = "tiny-llava"
    revision: str | None = None
    preset: str | None = None
    preset_args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    attn_implementation: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None


def model_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """Check the keys and values that lmms-eval parsed: numbers and booleans are such, all else is text.

    Raises:
        UnknownNameError: E-LM-01, a key is not known.  ConfigError: a value cannot work.
    """
    for key in given:
        if key not in MODEL_ARGS:
            raise UnknownNameError("key in --model_args", key, MODEL_ARGS, code="E-LM-01")
    values = dict(given)
    made_with = values.pop("vlmeff_rev", None)
    if made_with is not None and str(made_with) != __version__:
        raise ConfigError(
            f"vlmeff_rev={made_with} and vlmeff {__version__} is installed: lmms-eval's response cache would serve "
            "answers of the one as answers of the other. Leave it out, or name the installed version."
        )
    for name in ("pretrained", "dtype", "attn_implementation", "system_prompt"):
        if name in values:
            values[name] = str(values[name])
    if not isinstance(values.get("revision", ""), str):
        raise ConfigError(
            f"revision={values['revision']!r} was read as a number by lmms-eval's parser; name a tag or a branch, or "
            "the 40 digits of the commit."
        )
    if values.get("dtype", "auto") not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={values['dtype']!r} must be auto, float32, bfloat16 or float16.")
    for name in ("min_pixels", "max_pixels"):
        if name in values and (type(values[name]) is not int or values[name] < 1):
            raise ConfigError(f"{name}={values[name]!r} must be a whole number of pixels.")
    if "preset" in values:
        values["preset"] = str(values["preset"])
    if "preset_args" in values:
        values["preset_args"] = preset_arguments(values["preset_args"])
    return ModelArguments(**values)


def preset_arguments(text: Any) -> dict[str, Any]:
    """ "keep:0.5;alpha:0.1" as keyword arguments; commas belong to the parser of --model_args.

    Raises:
        ConfigError: a part is not ``name:value``, or a name comes twice.
    """
    out: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in str(text).split(";"))):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        if not (colon and name.isidentifier() and value) or name in out:
            raise ConfigError(f"preset_args={text!r}: {part!r} must be name:value, once; parts are joined by ';'.")
        out[name] = _plain(value)
    return out


def _plain(text: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A task's generation settings. ``other``: those that ask for something else than one greedy answer.

    ``ignored``: names that mean nothing here (they belong to other models).
    """

    max_new_tokens: int
    until: tuple[str, ...]
    other: dict[str, Any]
    ignored: tuple[str, ...]


def generation_of(given: Mapping[str, Any]) -> Generation:
    """Read a task's ``gen_kwargs``. A temperature of 0, or ``do_sample`` false, is greedy: then the temperature, top_p
    and top_k that tasks send along have no effect and stay away from ``generate``, which would warn of them.
    """
    rest = dict(given)
    until = rest.pop("until", None)
    limit = rest.pop("max_new_tokens", None) or MAX_NEW_TOKENS
    sampling = {name: rest.pop(name, None) for name in ("do_sample", "temperature", "top_p", "top_k")}
    beams = rest.pop("num_beams", None) or 1
    temperature, sampled = sampling["temperature"], sampling["do_sample"]
    sampled = temperature != 0 and (bool(temperature) if sampled is None else bool(sampled))
    other = {name: value for name, value in sampling.items() if value is not None} if sampled else {}
    if beams != 1:
        other["num_beams"] = beams
    stops = (until,) if isinstance(until, str) else tuple(until or ())
    return Generation(
        max_new_tokens=int(limit), until=tuple(filter(None, stops)), other=other, ignored=tuple(sorted(rest))
    )


def cut(text: str, until: Sequence[str]) -> str:
    """``text`` in front of the first stop string in it."""
    return text[: min([len(text), *(at for stop in until if (at := text.find(stop)) >= 0)])]
