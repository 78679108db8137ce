"""Rules across the records of the zoo: what a model, an entry, its token counts and its evidence must satisfy.

Numbers of rules are those of ``vlmeff zoo validate``'s specification: every broken one is a ``Problem``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from vlmeff.errors import UnknownNameError, VlmeffError
from vlmeff.zoo_schema import Entry, FixedTokens, KeptTokens, ModelRecord, Problem, TokenFormula, ZooFile
from vlmeff.zoo_steps import Kind, Step, Zoo, kept_tokens, kind_of, records_of, steps_of

# (patch * merge) squared, from the config defaults of transformers 5.23.
PIXELS_PER_TOKEN = {"qwen2_vl": 784, "qwen2_5_vl": 784, "qwen3_vl": 1024, "qwen3_vl_moe": 1024}


def model_problems(record: ModelRecord) -> Iterator[Problem]:
    tokens, where = record.visual_tokens, f"models.{record.name}.visual_tokens"
    expected = PIXELS_PER_TOKEN.get(record.family)  # rule 6
    if expected is None or tokens is None or record.embedded:  # shipped small models have patches of their own
        return
    if isinstance(tokens, FixedTokens):
        yield Problem("E-ZOO-01", where, f"family {record.family} has kind: dynamic")
    elif tokens.pixels_per_token != expected:
        message = f"is {tokens.pixels_per_token}; family {record.family} has {expected}"
        yield Problem("E-ZOO-01", f"{where}.pixels_per_token", message)


def entry_problems(zoo: Zoo, entry: Entry) -> Iterator[Problem]:
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

    steps = {step.method: step for step in records_of(preset, kind_of(record))}
    for method, override in entry.overrides.items():
        step = steps.get(method)
        if step is None:
            yield bad(str(UnknownNameError("step", method, steps)), f"overrides.{method}")
        elif (override.keep is not None and step.keep is None) or (
            override.keep_ratio is not None and step.keep_ratio is None
        ):
            yield bad("sets a budget of another kind than the preset's step", f"overrides.{method}")

    # Rule 2, as far as this file shows; check_evidence opens the result file.
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

    # Rules 4 and 5: the form of the token counts; check_tokens computes them.
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


def check_methods(zoo: Zoo, file: ZooFile) -> Iterator[Problem]:
    """Each step can be built: the method is registered and takes these parameters."""
    joined = [
        (f"presets.{preset.name}", kind, steps_of(preset, None, None, kind=kind))
        for preset in file.presets.values()
        for kind in get_args(Kind)
    ]
    for entry in file.entries:
        record = zoo.models[entry.model]
        steps = steps_of(zoo.presets[entry.preset], record, entry, kind=kind_of(record))
        joined.append((f"entries ({entry.name})", kind_of(record), steps))
    for where, kind, steps in joined:
        for step in steps:
            try:
                _build(step, kind)
            except (VlmeffError, TypeError) as error:  # TypeError: a parameter that the method does not have
                yield Problem("E-ZOO-01", where, str(error))


def _build(step: Step, kind: Kind) -> None:
    """Raise what building the step's method raises."""
    if kind == "video":
        from vlmeff.diffusion.acceleration import CACHES
        from vlmeff.diffusion.plan import Quant

        if step.method not in ("quant", "feature_cache"):
            raise UnknownNameError("step for video", step.method, ("quant", "feature_cache"))
        if step.method == "quant":
            Quant(**step.params)
        elif step.params.get("kind") not in CACHES:
            raise UnknownNameError("kind of feature_cache", str(step.params.get("kind")), CACHES)
        return
    if kind == "image":
        from vlmeff.speculative.continuous import Continuous

        if step.method != "continuous":
            raise UnknownNameError("step for image", step.method, ("continuous",))
        Continuous(**step.params)
        return
    from kvcache import policies
    from tokenpruning import methods

    method: Any = (policies if step.is_retention else methods).get(step.method)
    method(**step.budget(), **step.params)


def check_tokens(zoo: Zoo, file: ZooFile) -> Iterator[Problem]:
    """Rule 4: the counts of each entry are what its budget gives."""
    for entry in file.entries:
        record = zoo.models[entry.model]
        if entry.tokens is None or record.visual_tokens is None:
            continue
        steps = steps_of(zoo.presets[entry.preset], record, entry)
        examples = entry.tokens.examples if isinstance(entry.tokens, TokenFormula) else (entry.tokens,)
        for item in examples:
            size = getattr(item, "image", (1, 1))  # of a fixed grid the size does not matter
            grid = record.visual_tokens.grid_of(*size)
            computed = (math.prod(grid), kept_tokens(grid, steps))
            if (item.tokens_in, item.kept) != computed:
                message = f"in {item.tokens_in}, kept {item.kept}; computed in {computed[0]}, kept {computed[1]}"
                yield Problem("E-ZOO-01", f"entries ({entry.name}).tokens", message)


def check_evidence(file: ZooFile, folder: Path) -> Iterator[Problem]:
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
