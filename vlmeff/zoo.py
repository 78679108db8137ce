"""The model zoo: presets, models and what is known about each pair, from ``model_zoo.yaml``.

``VLMEFF_ZOO`` names further files (separated as in PATH) that may add records, and replace one that exists only where
the new record says ``override: true``. What one record looks like stands in ``vlmeff.zoo_schema``; the rules across
records stand here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from vlmeff.errors import ConfigError, UnknownNameError, UnknownPresetError, VlmeffError, ZooError
from vlmeff.zoo_schema import (
    STATUSES,
    Entry,
    FixedTokens,
    KeptTokens,
    ModelRecord,
    Preset,
    Problem,
    StepOverride,
    TokenFormula,
    ZooFile,
    parse,
)

R = TypeVar("R", ModelRecord, Preset, Entry)
# (patch * merge) squared, from the config defaults of transformers 5.23.
PIXELS_PER_TOKEN = {"qwen2_vl": 784, "qwen2_5_vl": 784, "qwen3_vl": 1024, "qwen3_vl_moe": 1024}


@dataclass(frozen=True)
class Zoo:
    """Everything known by name, in file order."""

    models: Mapping[str, ModelRecord]
    presets: Mapping[str, Preset]
    entries: Mapping[str, Entry]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Step:
    """One technique with the parameters for one model.

    ``keep`` is the budget of visual tokens, None for other techniques; KV retention has ``keep_ratio`` in ``params``.
    """

    method: str
    keep: int | float | None = None
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def is_retention(self) -> bool:
        """Whether this is KV retention; some names are those of token methods too ("random")."""
        return "keep_ratio" in self.params

    def budget(self) -> dict[str, int | float]:
        """``{"keep": ...}``, empty for a technique without a budget."""
        return {} if self.keep is None else {"keep": self.keep}

    def __str__(self) -> str:
        return (
            f"{self.method}({', '.join(f'{key}={value}' for key, value in {**self.budget(), **self.params}.items())})"
        )


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


def resolve(model: object, preset: str) -> ResolvedPreset:
    """What ``preset`` means for ``model``: looked up as an entry, then as a preset.

    Parameters are merged in this order, later ones winning: the preset's step, the model record's ``method_params``,
    the entry's ``overrides``. A preset on a model without an entry has status None: the caller warns.

    Args:
        model: a live model or a name as in ``find_model``; one that the zoo does not know is a model without an entry.
        preset: "fast", or an entry such as "llava-1.5-7b/fast".

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
        steps=_steps(zoo.presets[name], record, entry),
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
        steps = _steps(preset, record, entry)
        tokens_in = tokens_kept = None
        if entry is not None and isinstance(entry.tokens, KeptTokens):
            tokens_in, tokens_kept = entry.tokens.tokens_in, entry.tokens.kept
        elif record is not None and isinstance(record.visual_tokens, FixedTokens):
            tokens_in = record.visual_tokens.per_image
            tokens_kept = _kept(record.visual_tokens.grid, steps)
        text, status = " + ".join(map(str, steps)), entry.status if entry else None
        rows.append(PresetRow(name, preset.summary, text, status, tokens_in, tokens_kept))
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
            problems = [*_check_methods(zoo, file), *_check_tokens(zoo, file)]
            if (
                path.resolve().parent != Path(__file__).resolve().parent
            ):  # an installed copy comes without the result files
                problems += _check_evidence(file, path.parent)
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
    problems += (problem for record in file.models.values() for problem in _model_problems(record))
    problems += (problem for entry in file.entries for problem in _entry_problems(merged, entry))
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


def _model_problems(record: ModelRecord) -> Iterator[Problem]:
    tokens, where = record.visual_tokens, f"models.{record.name}.visual_tokens"
    expected = PIXELS_PER_TOKEN.get(record.family)  # rule 6
    if expected is None or tokens is None:
        return
    if isinstance(tokens, FixedTokens):
        yield Problem("E-ZOO-01", where, f"family {record.family} has kind: dynamic")
    elif tokens.pixels_per_token != expected:
        message = f"is {tokens.pixels_per_token}; family {record.family} has {expected}"
        yield Problem("E-ZOO-01", f"{where}.pixels_per_token", message)


def _entry_problems(zoo: Zoo, entry: Entry) -> Iterator[Problem]:
    where = f"entries ({entry.name})"

    def bad(message: str, place: str = "", code: Any = "E-ZOO-01") -> Problem:
        return Problem(code, f"{where}.{place}" if place else where, message)

    record, preset = zoo.models.get(entry.model), zoo.presets.get(entry.preset)
    if record is None:
        yield bad(str(UnknownNameError("model", entry.model, zoo.models)), "model")
    if preset is None:
        yield bad(str(UnknownNameError("preset", entry.preset, zoo.presets)), "preset")
    if record is None or preset is None:
        return
    if entry.supersedes is not None and entry.supersedes not in zoo.entries:
        yield bad(str(UnknownNameError("entry", entry.supersedes, zoo.entries)), "supersedes")

    # Rule 10: a name must resolve to what it says.
    left, _, right = entry.name.partition("/")
    if entry.name in zoo.presets:
        yield bad("an entry must not have the name of a preset, which it would hide", "name")
    if left in zoo.models and right in zoo.presets and (left, right) != (entry.model, entry.preset):
        yield bad(f"the name says {left} and {right}, the entry joins {entry.model} and {entry.preset}", "name")

    steps = {step.method: step for step in preset.steps}
    for method, override in entry.overrides.items():
        step = steps.get(method)
        if step is None:
            yield bad(str(UnknownNameError("step", method, steps)), f"overrides.{method}")
        elif (override.keep is not None and step.keep is None) or (
            override.keep_ratio is not None and step.keep_ratio is None
        ):
            yield bad("sets a budget of another kind than the preset's step", f"overrides.{method}")

    # Rule 2, as far as this file shows; _check_evidence opens the result file.
    if entry.status == "verified":
        lacks = {
            "evidence": entry.evidence is None,
            "an expected row measured by us": not entry.expected,
            f"a pinned revision of {entry.model}": not record.is_pinned,
        }
        for what in (what for what, absent in lacks.items() if absent):
            yield bad(f"status verified needs {what}", "status", "E-ZOO-03")

    # Rule 3. A row without evidence is a figure of unknown origin; fixture rows are measured again by the tests.
    if entry.expected and entry.evidence is None and entry.status not in ("fixture", "verified"):
        yield bad("expected rows need evidence; figures of a paper belong under paper.reported", "expected")
    paper = entry.paper.reported.pairs() if entry.paper else {}
    for row in entry.expected:
        if (row.baseline, row.value) in (pair for name, pair in paper.items() if row.benchmark.startswith(name)):
            yield bad(f"the row of {row.benchmark} repeats the paper's figures", "expected")

    # Rules 4 and 5: the form of the token counts; _check_tokens computes them.
    if record.visual_tokens is not None:
        form = KeptTokens if isinstance(record.visual_tokens, FixedTokens) else TokenFormula
        if not isinstance(entry.tokens, form):
            need = "in and kept" if form is KeptTokens else "a formula and three examples"
            yield bad(f"{entry.model} is of kind {record.visual_tokens.kind}: give {need}", "tokens")

    # Rule 7.
    unlicensed = [record.name] if record.license is None else []
    unlicensed += [s.artefact.source for s in preset.steps if s.artefact is not None and s.artefact.license is None]
    if unlicensed and entry.status not in ("experimental", "broken"):
        yield bad(f"no licence is known for {', '.join(unlicensed)}: at most experimental", "status")


def _check_methods(zoo: Zoo, file: ZooFile) -> Iterator[Problem]:
    """Each step can be built: the method is registered and takes these parameters."""
    from kvcache import policies
    from tokenpruning import methods

    joined = {f"presets.{preset.name}": _steps(preset, None, None) for preset in file.presets.values()}
    for entry in file.entries:
        steps = _steps(zoo.presets[entry.preset], zoo.models[entry.model], entry)
        joined[f"entries ({entry.name})"] = steps
    for where, steps in joined.items():
        for step in steps:
            try:
                method: Any = (policies if step.is_retention else methods).get(step.method)
                method(**step.budget(), **step.params)
            except (VlmeffError, TypeError) as error:  # TypeError: a parameter that the method does not have
                yield Problem("E-ZOO-01", where, str(error))


def _check_tokens(zoo: Zoo, file: ZooFile) -> Iterator[Problem]:
    """Rule 4: the counts of each entry are what its budget gives."""
    for entry in file.entries:
        record = zoo.models[entry.model]
        if entry.tokens is None or record.visual_tokens is None:
            continue
        steps = _steps(zoo.presets[entry.preset], record, entry)
        examples = entry.tokens.examples if isinstance(entry.tokens, TokenFormula) else (entry.tokens,)
        for item in examples:
            size = getattr(item, "image", (1, 1))  # of a fixed grid the size does not matter
            grid = record.visual_tokens.grid_of(*size)
            computed = (math.prod(grid), _kept(grid, steps))
            if (item.tokens_in, item.kept) != computed:
                message = f"in {item.tokens_in}, kept {item.kept}; computed in {computed[0]}, kept {computed[1]}"
                yield Problem("E-ZOO-01", f"entries ({entry.name}).tokens", message)


def _check_evidence(file: ZooFile, folder: Path) -> Iterator[Problem]:
    """Rule 2: result files are what was hashed; a verified preset beats every control on each expected row."""
    for entry in file.entries:
        if entry.evidence is None:
            continue
        where = f"entries ({entry.name}).evidence"
        try:
            content = (folder / entry.evidence.results).read_bytes()
            runs = json.loads(content)["runs"]
            scores = {
                (row.benchmark, row.metric, kind): [
                    float(run["metrics"][row.metric]["value"])
                    for run in runs
                    if (run["benchmark"], run["kind"]) == (row.benchmark, kind)
                    and (kind == "control" or run["preset"] in (entry.preset, entry.name))
                ]
                for row in entry.expected
                for kind in ("preset", "control")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Problem("E-ZOO-03", where, f"{entry.evidence.results} cannot be used: {error!r}")
            continue
        if hashlib.sha256(content).hexdigest() != entry.evidence.sha256:
            yield Problem("E-ZOO-03", f"{where}.sha256", f"{entry.evidence.results} has another hash")
        for row in entry.expected if entry.status == "verified" else ():
            ours, controls = (scores[row.benchmark, row.metric, kind] for kind in ("preset", "control"))
            if not ours or not controls:
                lacks = "control" if ours else "preset"
                yield Problem("E-ZOO-03", where, f"{entry.evidence.results} has no {lacks} row of {row.benchmark}")
            elif max(controls) >= min(ours):
                yield Problem("E-ZOO-03", where, f"the preset does not beat every control row of {row.benchmark}")


def _entry_of(zoo: Zoo, record: ModelRecord | None, preset: str) -> Entry | None:
    return zoo.entries.get(f"{record.name}/{preset}") if record else None


def _steps(preset: Preset, record: ModelRecord | None, entry: Entry | None) -> tuple[Step, ...]:
    steps = []
    for step in preset.steps:
        own = record.method_params.get(step.method, {}) if record else {}
        override = entry.overrides.get(step.method, StepOverride()) if entry else StepOverride()
        keep = step.keep if override.keep is None else override.keep
        ratio = step.keep_ratio if override.keep_ratio is None else override.keep_ratio
        params = {**({} if ratio is None else {"keep_ratio": ratio}), **step.params, **own, **override.params}
        steps.append(Step(step.method, keep, copy.deepcopy(params)))  # the zoo is shared, its parameters stay as read
    return tuple(steps)


def _kept(grid: tuple[int, int], steps: tuple[Step, ...]) -> int:
    """Visual tokens that reach the language model of one picture after all steps."""
    from tokenpruning import Resampler, methods
    from tokenpruning.budget import tokens_to_keep

    tokens = math.prod(grid)
    for step in steps:
        if step.keep is not None:
            tokens = tokens_to_keep(step.keep, tokens)
        elif step.method in methods.names() and not step.is_retention:
            method = methods.get(step.method)(**step.params)
            tokens = math.prod(method.new_grid(grid)) if isinstance(method, Resampler) else tokens
    return tokens


def _has_geometry(model: object, record: ModelRecord) -> bool:
    """Whether a live model has the family and every size that the record states."""
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
