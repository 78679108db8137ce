"""The model zoo: presets, models and what is known about each pair, from ``model_zoo.yaml``.

``VLMEFF_ZOO`` names further files (separated as in PATH) that may add records, and replace one that exists only where
the new record says ``override: true``. What one record looks like stands in ``vlmeff.zoo_schema``, the rules across
records in ``vlmeff.zoo_rules``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from vlmeff.errors import ConfigError, UnknownNameError, UnknownPresetError, ZooError
from vlmeff.zoo_rules import check_evidence, check_methods, check_tokens, entry_problems, model_problems
from vlmeff.zoo_schema import (
    STATUSES,
    Entry,
    FixedTokens,
    KeptTokens,
    ModelRecord,
    Preset,
    Problem,
    ZooFile,
)
from vlmeff.zoo_steps import Kind, Step, Zoo, kept_tokens, kind_of, steps_of
from vlmeff.zoo_yaml import parse

R = TypeVar("R", ModelRecord, Preset, Entry)


@dataclass(frozen=True)
class ResolvedPreset:
    """A preset on one model. ``entry``, ``model`` and ``status`` are None where the zoo knows nothing of the pair.

    ``min_visual_tokens``: a request with fewer visual tokens per row is left alone.
    """

    preset: str
    entry: str | None
    model: str | None
    status: str | None
    steps: tuple[Step, ...]
    min_visual_tokens: int = 0


@dataclass(frozen=True)
class PresetRow:
    """One line of ``preset_table``. ``tokens_in`` and ``tokens_kept`` are visual tokens of one picture."""

    preset: str
    summary: str
    steps: str
    status: str | None
    tokens_in: int | None
    tokens_kept: int | None


def load_zoo() -> Zoo:
    """The shipped zoo and the files of ``VLMEFF_ZOO``, read again only when one of them has changed.

    Raises:
        ZooError: a file is missing or breaks the schema; the message lists every problem of the first such file.
    """
    extra = [Path(item).expanduser() for item in os.environ.get("VLMEFF_ZOO", "").split(os.pathsep) if item.strip()]
    return _load(tuple(_stamp(path) for path in dict.fromkeys((_shipped_file(), *extra))))


def list_entries(*, task: str | None = None, status: str | None = None) -> list[Entry]:
    """Entries in file order, of one task (such as "image-text-to-text") and one status where given.

    Raises:
        UnknownNameError: no model of the zoo has this task, or there is no such status.
    """
    zoo = load_zoo()
    tasks = {record.task for record in zoo.models.values()}
    if task is not None and task not in tasks:
        raise UnknownNameError("task", task, tasks)
    if status is not None and status not in STATUSES:
        raise UnknownNameError("status", status, STATUSES)
    return [
        entry
        for entry in zoo.entries.values()
        if task in (None, zoo.models[entry.model].task) and status in (None, entry.status)
    ]


def get(name: str) -> Entry:
    """The entry of this name; raises ``UnknownPresetError``."""
    entries = load_zoo().entries
    if name not in entries:
        raise UnknownPresetError("zoo entry", name, entries)
    return entries[name]


def find_model(model: object) -> ModelRecord | None:
    """The zoo's record of a live model, or of a name: a model, an entry or a hub id; None when there is none.

    A live model is known by ``config._name_or_path``, else by family and geometry (so that a local copy or a fine-tune
    is known as what it was made from). Of several records with one geometry the first wins.
    """
    zoo = load_zoo()
    models = zoo.models.values()
    if isinstance(model, str):
        name = zoo.entries[model].model if model in zoo.entries else model
        return next((record for record in models if name in (record.name, record.hub_id)), None)
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    by_name = (record for record in models if record.hub_id is not None and record.hub_id == origin)
    return next(by_name, None) or next((record for record in models if _has_geometry(model, record)), None)


def resolve(model: object, preset: str, *, kind: Kind | None = None) -> ResolvedPreset:
    """What ``preset`` means for ``model``: looked up as an entry, then as a preset.

    Parameters are merged in this order, later ones winning: the preset's step, the model record's ``method_params``,
    the entry's ``overrides``. A preset on a model without an entry has status None: the caller warns.

    Args:
        model: a live model or a name as in ``find_model``; one that the zoo does not know is a model without an entry.
        preset: "fast", or an entry such as "llava-1.5-7b/fast".
        kind: "vlm", "video" or "image", where the zoo does not know the model; "vlm" when None.

    Raises:
        UnknownPresetError: neither an entry nor a preset; lists the nearest names.
        ConfigError: the entry is for another model.
    """
    if not isinstance(preset, str):
        raise ConfigError(f"preset={preset!r} must be a name, such as 'fast'.")
    zoo = load_zoo()
    record = find_model(model)
    entry = zoo.entries.get(preset)
    if entry is not None:
        owner = zoo.models[entry.model]
        unseen = record is None and (model is None or isinstance(model, str))  # a folder, not loaded yet
        if not unseen and record is not owner and not _has_geometry(model, owner):
            this = f"the zoo's {record.name!r}" if record else "not in the zoo"
            raise ConfigError(
                f"preset={preset!r} is for the model {owner.name!r}; this one is {this}. Use preset={entry.preset!r}."
            )
        record = owner
    elif preset in zoo.presets:
        entry = _entry_of(zoo, record, preset)
    else:
        # Entries of other models, fixtures among them, are no suggestion.
        own = [name for name, item in zoo.entries.items() if record is not None and item.model == record.name]
        raise UnknownPresetError("preset", preset, [*zoo.presets, *own])
    name = preset if entry is None else entry.preset
    return ResolvedPreset(
        preset=name,
        entry=entry.name if entry else None,
        model=record.name if record else None,
        status=entry.status if entry else None,
        steps=steps_of(zoo.presets[name], record, entry, kind=kind_of(record) if record else kind or "vlm"),
        min_visual_tokens=entry.min_visual_tokens if entry else 0,
    )


def preset_table(model: object = None) -> list[PresetRow]:
    """Every preset of the zoo, with steps, status and tokens for ``model`` (as in ``find_model``) where known.

    Presets that reproduce a paper are left out for models that it is not of.
    """
    zoo = load_zoo()
    record = None if model is None else find_model(model)
    rows = []
    for name, preset in zoo.presets.items():
        entry = _entry_of(zoo, record, name)
        if record is not None and entry is None and name.startswith("paper-"):
            continue  # its paper has nothing for this model
        kind = kind_of(record) if record else kind_of_model(model)
        steps = steps_of(preset, record, entry, kind=kind)
        if model is not None and not steps:
            continue  # a preset for another kind of model
        tokens_in = tokens_kept = None
        if entry is not None and isinstance(entry.tokens, KeptTokens):
            tokens_in, tokens_kept = entry.tokens.tokens_in, entry.tokens.kept
        elif record is not None and isinstance(record.visual_tokens, FixedTokens):
            tokens_in = record.visual_tokens.per_image
            tokens_kept = kept_tokens(record.visual_tokens.grid, steps)
        text, status = " + ".join(map(str, steps)), entry.status if entry else None
        summary = {"vlm": preset.summary, "video": preset.video_summary, "image": preset.image_summary}[kind]
        rows.append(PresetRow(name, summary or preset.summary, text, status, tokens_in, tokens_kept))
    return rows


def validate_file(path: str | os.PathLike[str] | None = None, *, standalone: bool = False) -> list[str]:
    """Every problem of a zoo file as one readable line that starts with its code; an empty list for a valid file.

    More thorough than ``load_zoo``: also checks methods and their parameters against the registry, token counts
    against the budgets, and evidence files.

    Args:
        path: the file; the shipped one when None. It may refer to models and presets of the shipped zoo.
        standalone: the file stands alone, as the shipped one does; for a working copy of it.
    """
    shipped = _shipped_file()
    path = shipped if path is None else Path(path)
    file, problems = _read(path)
    if file is not None:
        alone = standalone or path.samefile(shipped)
        zoo, problems = _merge(Zoo({}, {}, {}) if alone else _load((_stamp(shipped),)), file, path)
        if not problems:
            problems = [*check_methods(zoo, file), *check_tokens(zoo, file)]
            if (
                path.resolve().parent != Path(__file__).resolve().parent
            ):  # an installed copy comes without the result files
                problems += check_evidence(file, path.parent)
    return [str(problem) for problem in problems]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a zoo file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ZooFile.model_json_schema(by_alias=True)}


def _shipped_file() -> Path:
    packaged = Path(__file__).with_name("model_zoo.yaml")
    return packaged if packaged.exists() else Path(__file__).parents[1] / "model_zoo.yaml"


def _stamp(path: Path) -> tuple[Path, int, int]:
    """A file and what tells one state of it from the next: modification time in ns and size in bytes."""
    try:
        state = path.stat()
    except OSError as error:
        raise ZooError(path, [Problem("E-ZOO-01", "file", f"{error.strerror}; check VLMEFF_ZOO")]) from error
    return path, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=8)
def _load(stamps: tuple[tuple[Path, int, int], ...]) -> Zoo:
    zoo = Zoo({}, {}, {})
    for path, _, _ in stamps:
        file, problems = _read(path)
        if file is not None:
            zoo, problems = _merge(zoo, file, path)
        if problems:
            raise ZooError(path, problems)
    return zoo


def _read(path: Path) -> tuple[ZooFile | None, list[Problem]]:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return None, [Problem("E-ZOO-01", "file", f"{path.name} cannot be read: {error}")]


def _merge(zoo: Zoo, file: ZooFile, path: Path) -> tuple[Zoo, list[Problem]]:
    """``zoo`` extended by ``file``, and what its content breaks (rules 2 to 7 and 10, as far as the file shows)."""
    entries = {entry.name: entry for entry in file.entries}
    problems = [
        Problem("E-ZOO-01", f"entries ({entry.name})", "this name occurs twice")
        for entry in file.entries
        if entries[entry.name] is not entry
    ]
    earlier = {name: _without_figures(entry, file, path) for name, entry in zoo.entries.items()}
    merged = Zoo(
        models=_joined("models", zoo.models, file.models, problems),
        presets=_joined("presets", zoo.presets, file.presets, problems),
        entries=_joined("entries", earlier, entries, problems),
        files=(*zoo.files, path),
    )
    problems += (problem for record in file.models.values() for problem in model_problems(record))
    problems += (problem for entry in file.entries for problem in entry_problems(merged, entry))
    return merged, problems


def _joined(kind: str, old: Mapping[str, R], new: Mapping[str, R], problems: list[Problem]) -> Mapping[str, R]:
    for name, record in new.items():
        if name in old and not record.override:
            message = "an earlier file has this name; say override: true to replace it"
            problems.append(Problem("E-ZOO-02", f"{kind} ({name})", message))
    return MappingProxyType({**old, **new})


def _without_figures(entry: Entry, file: ZooFile, path: Path) -> Entry:
    """An entry whose model or preset ``file`` replaces: its figures belong to what it used to join."""
    if entry.model not in file.models and entry.preset not in file.presets:
        return entry
    note = f"{path.name} replaces its model or preset: the figures no longer apply"
    gone = dict.fromkeys(("tokens", "cost", "latency", "evidence", "paper"))
    return entry.model_copy(update={**gone, "status": "experimental", "expected": (), "notes": (*entry.notes, note)})


def _entry_of(zoo: Zoo, record: ModelRecord | None, preset: str) -> Entry | None:
    return zoo.entries.get(f"{record.name}/{preset}") if record else None


def kind_of_model(model: object) -> Kind:
    """The kind of a live model that the zoo does not know."""
    modules = [cls.__module__ for cls in type(model).__mro__]
    if any(name.startswith("diffusers.") for name in modules):
        return "video"
    return "image" if any(name.startswith("vlmeff.models.mar.") for name in modules) else "vlm"


def _has_geometry(model: object, record: ModelRecord) -> bool:
    """Whether a live model has the family and every size that the record states."""
    if record.generator is not None:
        return _is_generator(model, record)
    if record.transformer is not None:
        return _has_transformer(model, record)
    config: Any = getattr(model, "config", None)
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    tokens = record.visual_tokens
    if vision is None or text is None or config.model_type != record.family:
        return False
    if tokens is None or record.vision is None or record.llm is None:
        return False
    sizes: list[tuple[float | None, Any, str]] = [
        (record.vision.layers, vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers"),
        (record.vision.hidden, vision, "hidden_size"),
        (record.llm.layers, text, "num_hidden_layers"),
        (record.llm.hidden, text, "hidden_size"),
        (record.llm.heads, text, "num_attention_heads"),
        (record.llm.kv_heads, text, "num_key_value_heads"),
    ]
    if isinstance(tokens, FixedTokens):
        sizes += [(tokens.patch, vision, "patch_size"), (tokens.image_size, vision, "image_size")]
    else:
        sizes.append(
            (math.isqrt(tokens.pixels_per_token) / getattr(vision, "spatial_merge_size", 1), vision, "patch_size")
        )
    return all(stated is None or stated == getattr(config, name, None) for stated, config, name in sizes)


def _has_transformer(model: object, record: ModelRecord) -> bool:
    """Whether a pipeline's (or a bare) diffusion transformer has the class and sizes that the record states."""
    stated = record.transformer
    transformer: Any = getattr(model, "transformer", model)
    config: Any = getattr(transformer, "config", None)
    if stated is None or type(transformer).__name__ != stated.class_name or not hasattr(config, "get"):
        return False
    width = (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
    return (config.get("num_layers"), width) == (stated.layers, stated.hidden)


def _is_generator(model: object, record: ModelRecord) -> bool:
    """Whether a generator of continuous tokens has every size that the record states."""
    config: Any = getattr(model, "config", None)
    stated = record.generator
    sizes = ("encoder_dim", "encoder_depth", "img_size", "class_num")
    return stated is not None and all(getattr(config, size, None) == getattr(stated, size) for size in sizes)
