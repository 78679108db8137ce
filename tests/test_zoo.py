"""The model zoo: the shipped file, the rules of its schema, and files that extend it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny as tiny_model

import vlmeff
from tokenpruning.budget import tokens_to_keep
from vlmeff import zoo
from vlmeff.errors import ConfigError, ZooError

ROOT = Path(zoo.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# A valid file that names nothing of the shipped zoo: each broken file of the tests differs from it in one place.
EXTENSION: dict[str, Any] = {
    "schema": "vlmeff.zoo/1",
    "models": {
        "our-llava": {
            "hub_id": "us/our-llava",
            "revision": COMMIT,
            "license": "Apache-2.0",
            "license_url": "https://www.apache.org/licenses/LICENSE-2.0",
            "commercial_use": "yes",
            "family": "llava",
            "task": "image-text-to-text",
            "visual_tokens": {"kind": "fixed", "per_image": 100, "grid": [10, 10], "patch": 7, "image_size": 70},
            "vision": {"tower": "clip-small", "layers": 5, "select_layer": -2, "has_cls": True},
            "llm": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "head_dim": 8},
        },
        "our-qwen": {
            "hub_id": "us/our-qwen",
            "revision": None,
            "license": "Apache-2.0",
            "license_url": "https://www.apache.org/licenses/LICENSE-2.0",
            "commercial_use": "yes",
            "family": "qwen2_5_vl",
            "task": "image-text-to-text",
            "visual_tokens": {"kind": "dynamic", "pixels_per_token": 784, "min": 4, "max": 64},
            "vision": {"tower": "vit", "layers": 4, "select_layer": -1, "has_cls": False},
            "llm": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "head_dim": 8},
        },
    },
    "presets": {
        "half": {"summary": "Half of the tokens.", "steps": [{"method": "hiprune", "keep": 0.5, "params": {}}]}
    },
    "entries": [
        {
            "name": "our-llava/half",
            "model": "our-llava",
            "preset": "half",
            "status": "experimental",
            "tokens": {"in": 100, "kept": 50},
        },
        {
            "name": "our-qwen/half",
            "model": "our-qwen",
            "preset": "half",
            "status": "experimental",
            "tokens": {
                "formula": "round(0.5 * n)",
                "examples": [
                    {"image": [56, 56], "in": 4, "kept": 2},
                    {"image": [112, 84], "in": 12, "kept": 6},
                    {"image": [1000, 1000], "in": 64, "kept": 32},
                ],
            },
        },
    ],
}
LLAVA, QWEN = 0, 1  # positions in EXTENSION["entries"]
EXPECTED = {"benchmark": "gqa", "metric": "acc", "n": 100, "baseline": 60.0, "value": 59.0, "tolerance": 0.5}
EVIDENCE = {
    "results": "results/run.json",
    "sha256": "a" * 64,
    "vlmeff": "0.1.0",
    "transformers": "5.23.0",
    "torch": "2.11",
    "date": "2026-01-31",
    "by": "us",
}
PAPER = {"title": "A paper", "reported": {"budget": "half", "unpruned": {"gqa": 60.0}, "pruned": {"gqa": 59.0}}}


def write(folder: Path, content: dict[str, Any], name: str = "zoo.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def extended(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(EXTENSION)
    change(content)
    return content


def setting(value: object, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]  # type: ignore[index]
        content[keys[-1]] = value  # type: ignore[index]

    return change


def entry(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["entries"][LLAVA].update(fields)


@pytest.fixture(autouse=True)
def _no_extra_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMEFF_ZOO", raising=False)


# The shipped file


def test_shipped_file_is_valid() -> None:
    assert zoo.validate_file() == []
    assert zoo.validate_file(ROOT / "model_zoo.yaml", standalone=True) == []


def test_the_packaged_copy_wins_over_the_file_beside_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vlmeff").mkdir()
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "vlmeff" / "zoo.py"))
    write(tmp_path, EXTENSION, "model_zoo.yaml")
    assert list(zoo.load_zoo().presets) == ["half"]
    packaged = extended(lambda content: content["presets"].update(other=content["presets"]["half"]))
    write(tmp_path / "vlmeff", packaged, "model_zoo.yaml")
    assert list(zoo.load_zoo().presets) == ["half", "other"]


def test_every_model_has_entries_and_the_general_presets_are_there_for_the_models_of_the_hiprune_paper() -> None:
    shipped = zoo.load_zoo()
    assert {item.model for item in shipped.entries.values()} == set(shipped.models)
    general = [name for name, preset in shipped.presets.items() if preset.steps[0].method == "hiprune"]
    assert general == ["quality", "balanced", "fast", "smallest", "paper-hiprune"]
    for model in ("tiny-llava", "llava-1.5-7b", "qwen2.5-vl-3b", "qwen2.5-vl-7b"):
        assert {f"{model}/{preset}" for preset in general} <= set(shipped.entries)


@pytest.mark.parametrize("name", [e.name for e in zoo.list_entries(task="image-text-to-text")])
def test_kept_tokens_are_what_the_budget_gives(name: str) -> None:
    item, shipped = zoo.get(name), zoo.load_zoo()
    step = zoo.resolve(item.model, item.preset).steps[0]
    if shipped.models[item.model].visual_tokens.kind == "fixed":
        counts = [(item.tokens.tokens_in, item.tokens.kept)]
        assert counts[0][0] == math.prod(shipped.models[item.model].visual_tokens.grid)
    else:
        counts = [(example.tokens_in, example.kept) for example in item.tokens.examples]
        assert len(counts) >= 3
    for number, (tokens_in, kept) in enumerate(counts):
        if step.method == "adaptinfer":
            assert kept == tokens_in  # it drops them later
        elif step.method == "fourier" and "side" in step.params:
            assert kept == step.params["side"] ** 2
        elif step.method == "fourier":
            height, width = item.tokens.examples[number].image
            assert kept == (2 * round(height / 28) // 3) * (2 * round(width / 28) // 3)
        else:
            assert kept == tokens_to_keep(step.keep, tokens_in)


def test_a_preset_resamples_only_checkpoints_that_were_trained_for_it() -> None:
    trained = {name for name, record in zoo.load_zoo().models.items() if "fourier" in record.trained_with}
    assert {item.model for item in zoo.list_entries() if item.preset == "paper-fourier"} == trained
    for name in trained:
        (step,) = zoo.resolve(name, "paper-fourier").steps
        assert (step.method, step.params["gain"]) == ("fourier", "ortho")
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=r"trained.*Fourier\(gain='preserve'\)"):
        vlmeff.wrap(model, "paper-fourier")
    assert not vlmeff.is_wrapped(model)
    with pytest.warns(UserWarning, match="no entry"):
        vlmeff.wrap(model, "paper-fourier", tokens="fourier")  # asked for by name


def test_figures_of_the_paper_stand_only_under_paper() -> None:
    for item in zoo.list_entries():
        assert item.status == "fixture" or not item.expected, f"{item.name}: nothing was measured by us yet"
        assert (item.paper is not None) == (item.status == "reported")
    assert zoo.get("llava-1.5-7b/paper-hiprune").paper.reported.pairs()["gqa"] == (61.9, 59.2)
    assert zoo.get("llava-1.5-7b/smallest").paper.reported.pairs()["pope"] == (85.9, 73.0)
    assert zoo.get("qwen2.5-vl-3b/fast").paper.reported.pairs()["textvqa"] == (77.8, 70.1)
    assert zoo.get("qwen2.5-vl-7b/smallest").paper.reported.pairs()["textvqa"] == (83.1, 62.6)


def test_budgets_and_object_layers_of_the_shipped_presets() -> None:
    for model, layer in {"tiny-llava": 3, "llava-1.5-7b": 9, "qwen2.5-vl-3b": 16, "qwen2.5-vl-7b": 16}.items():
        paper = 192 if model == "llava-1.5-7b" else 0.334
        budgets = {"quality": 0.6667, "balanced": 0.5, "fast": 0.3333, "smallest": 0.1111, "paper-hiprune": paper}
        for preset, keep in budgets.items():
            expected = zoo.Step("hiprune", keep, {"alpha": 0.1, "object_layer": layer})
            retention = {"balanced": 0.8, "fast": 0.7, "smallest": 0.5}.get(preset)
            kv = () if retention is None else (zoo.Step("prefixkv", None, {"keep_ratio": retention, "metric": "mean"}),)
            assert zoo.resolve(model, preset).steps == (expected, *kv)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(28, 4000), width=st.integers(28, 4000))
def test_dynamic_token_count_follows_the_image_processor(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for least, most in ((4, 16384), (256, 1280)):
        tokens = zoo.load_zoo().models["qwen2.5-vl-3b"].visual_tokens.model_copy(update={"min": least, "max": most})
        resized = smart_resize(height, width, factor=28, min_pixels=least * 784, max_pixels=most * 784)
        assert tokens.grid_of(height, width) == (resized[0] // 28, resized[1] // 28)


def test_importing_and_listing_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from vlmeff import zoo; zoo.list_entries(); zoo.resolve('tiny-llava', 'fast'); print(*sys.modules)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert not {"torch", "transformers"} & set(done.stdout.split())


# One broken file per rule


def test_the_extension_of_these_tests_is_valid(tmp_path: Path) -> None:
    assert zoo.validate_file(write(tmp_path, EXTENSION)) == []


BROKEN = {
    "1 unknown key": (
        setting(3, "presets", "half", "steps", 0, "kep"),
        "E-ZOO-01 presets.half.steps[0]: unknown key 'kep', did you mean 'keep'?",
    ),
    "1 name inside a record": (setting("x", "models", "our-llava", "name"), "unknown key 'name'"),
    "1 wrong type": (setting("5", "models", "our-llava", "llm", "layers"), "models.our-llava.llm.layers: Input should"),
    "1 budget": (setting(1.5, "presets", "half", "steps", 0, "keep"), "1.5 is not a budget; use an int >= 1"),
    "1 boolean budget": (setting(True, "presets", "half", "steps", 0, "keep"), "True is not a budget"),
    "1 other schema": (setting("vlmeff.zoo/2", "schema"), "E-ZOO-01 schema: Input should be 'vlmeff.zoo/1'"),
    "2 verified without evidence": (
        entry(status="verified", expected=[EXPECTED]),
        "E-ZOO-03 entries (our-llava/half).status: status verified needs evidence",
    ),
    "2 verified without a measured row": (
        entry(status="verified", evidence=EVIDENCE),
        "E-ZOO-03 entries (our-llava/half).status: status verified needs an expected row measured by us",
    ),
    "2 branch instead of a commit": (
        setting("main", "models", "our-llava", "revision"),
        "E-ZOO-01 models.our-llava.rev",
    ),
    "3 expected without evidence": (
        entry(expected=[EXPECTED]),
        "E-ZOO-01 entries (our-llava/half).expected: expected rows need evidence",
    ),
    "3 paper figures under expected": (
        entry(expected=[EXPECTED], evidence=EVIDENCE, paper=PAPER),
        "the row of gqa repeats the paper's figures",
    ),
    "4 kept tokens": (
        entry(tokens={"in": 100, "kept": 51}),
        "E-ZOO-01 entries (our-llava/half).tokens: in 100, kept 51; computed in 100, kept 50",
    ),
    "4 grid": (
        setting(99, "models", "our-llava", "visual_tokens", "per_image"),
        "is not what 70 px in patches of 7 px",
    ),
    "5 dynamic without formula": (
        setting({"in": 4, "kept": 2}, "entries", QWEN, "tokens"),
        "our-qwen is of kind dynamic: give a formula and three examples",
    ),
    "5 two examples": (lambda content: content["entries"][QWEN]["tokens"]["examples"].pop(), "tokens.examples: Tuple"),
    "5 wrong example": (
        setting(5, "entries", QWEN, "tokens", "examples", 0, "in"),
        "E-ZOO-01 entries (our-qwen/half).tokens: in 5, kept 2; computed in 4, kept 2",
    ),
    "6 pixels per token": (
        setting(1024, "models", "our-qwen", "visual_tokens", "pixels_per_token"),
        "E-ZOO-01 models.our-qwen.visual_tokens.pixels_per_token: is 1024; family qwen2_5_vl has 784",
    ),
    "7 model without licence": (
        lambda content: (setting(None, "models", "our-llava", "license")(content), entry(status="reported")(content)),
        "no licence is known for our-llava: at most experimental",
    ),
    "7 artefact without licence": (
        lambda content: (
            setting({"source": "us/offsets"}, "presets", "half", "steps", 0, "artefact")(content),
            entry(status="reported")(content),
        ),
        "no licence is known for us/offsets",
    ),
    "7 no SPDX id": (setting("llama2", "models", "our-llava", "license"), "'llama2' is neither an SPDX id nor"),
    "8 absolute path": (entry(notes=["results in /home/me/results"]), "holds an absolute path"),
    "8 Windows path": (entry(notes=["C:\\results"]), "holds an absolute path"),
    "8 evidence outside": (entry(evidence={**EVIDENCE, "results": "../run.json"}), "must be a path below"),
    "8 access token": (entry(notes=["hf_" + "a" * 30]), "looks like an access token"),
    "8 encoded data": (entry(notes=["QUJD" * 100]), "encoded data does not belong"),
    "8 weights": (setting(list(range(65)), "presets", "half", "steps", 0, "params", "w"), "is data or weights"),
    "9 entry name": (entry(name="Our LLaVA/half"), "E-ZOO-01 entries[0] (Our LLaVA/half).name: String should match"),
    "9 preset name": (
        lambda content: content["presets"].update(Half=content["presets"]["half"]),
        "E-ZOO-01 presets.Half: String should match",
    ),
    "10 name of another pair": (entry(name="our-qwen/half"), "this name occurs twice"),
    "10 name that hides a preset": (entry(name="half"), "must not have the name of a preset"),
    "10 name says another model": (entry(name="tiny-llava/fast"), "the name says tiny-llava and fast"),
    "unknown model": (entry(model="our-lava"), "unknown model 'our-lava'. Did you mean 'our-llava'"),
    "unknown preset": (entry(preset="hlaf"), "unknown preset 'hlaf'. Did you mean 'half'"),
    "unknown method": (
        setting("hipune", "presets", "half", "steps", 0, "method"),
        "unknown token reduction method 'hipune'. Did you mean 'hiprune'",
    ),
    "unknown method parameter": (setting({"alhpa": 0.1}, "presets", "half", "steps", 0, "params"), "'alhpa'"),
    "method parameter out of range": (setting({"alpha": 2}, "presets", "half", "steps", 0, "params"), "alpha=2"),
    "override of an absent step": (entry(overrides={"dct": {"keep": 4}}), "unknown step 'dct'"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_file_is_caught(rule: str, tmp_path: Path) -> None:
    change, message = BROKEN[rule]
    problems = zoo.validate_file(write(tmp_path, extended(change)))
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("E-ZOO-0") and "\n" not in problem for problem in problems)


def test_an_access_token_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    token = "hf_" + "b" * 30
    assert token not in "".join(zoo.validate_file(write(tmp_path, extended(entry(notes=[token])))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: vlmeff.zoo/1\npresets: [", "E-ZOO-01 line 2"),
        ("schema: vlmeff.zoo/1\nschema: vlmeff.zoo/1\n", "E-ZOO-01 line 2: key 'schema' occurs twice"),
        ("schema: vlmeff.zoo/1\nmodels: !!python/object:os.path {}\n", "E-ZOO-01 line 2: could not determine"),
        ("", "E-ZOO-01 file: Input should be a valid dictionary"),
        ("- a list", "E-ZOO-01 file: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_not_a_zoo_is_caught(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text(text, encoding="utf-8")
    assert zoo.validate_file(path)[0].startswith(message)
    path.write_bytes(b"schema: \xff\xfe")
    assert zoo.validate_file(path)[0].startswith("E-ZOO-01 file: zoo.yaml cannot be read")
    assert zoo.validate_file(tmp_path / "absent.yaml")[0].startswith("E-ZOO-01 file: absent.yaml cannot be read")


def test_unquoted_yes_and_dates_are_read_as_text(tmp_path: Path) -> None:
    content = extended(setting(False, "models", "our-llava", "commercial_use"))
    text = yaml.safe_dump(extended(entry(evidence=EVIDENCE))).replace("'2026-01-31'", "2026-01-31")
    (tmp_path / "dated.yaml").write_text(text, encoding="utf-8")
    assert "date: 2026-01-31\n" in text
    assert zoo.validate_file(write(tmp_path, content)) == []
    assert [problem[:8] for problem in zoo.validate_file(tmp_path / "dated.yaml")] == [
        "E-ZOO-03"
    ]  # no such result file


# Evidence of verified entries


def evidence_file(folder: Path, *, preset: float, controls: list[float]) -> dict[str, str]:
    runs = [{"kind": "preset", "preset": "half", "benchmark": "gqa", "metrics": {"acc": {"value": preset}}}]
    runs += [
        {"kind": "control", "preset": None, "benchmark": "gqa", "metrics": {"acc": {"value": value}}}
        for value in controls
    ]
    content = json.dumps({"schema": "vlmeff.results/1", "runs": runs}).encode()
    (folder / "results").mkdir()
    (folder / "results" / "run.json").write_bytes(content)
    return {**EVIDENCE, "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("controls", "problem"),
    [
        ([0.5, 0.58], None),
        ([0.5, 0.6], "E-ZOO-03 entries (our-llava/half).evidence: the preset does not beat every control row of gqa"),
        ([], "E-ZOO-03 entries (our-llava/half).evidence: results/run.json has no control row of gqa"),
    ],
)
def test_a_verified_preset_beats_the_controls(controls: list[float], problem: str | None, tmp_path: Path) -> None:
    evidence = evidence_file(tmp_path, preset=0.59, controls=controls)
    path = write(tmp_path, extended(entry(status="verified", expected=[EXPECTED], evidence=evidence)))
    assert zoo.validate_file(path) == ([problem] if problem else [])


def test_a_changed_result_file_is_caught(tmp_path: Path) -> None:
    evidence = evidence_file(tmp_path, preset=0.59, controls=[0.5])
    path = write(tmp_path, extended(entry(status="verified", expected=[EXPECTED], evidence=evidence)))
    with (tmp_path / "results" / "run.json").open("a") as file:
        file.write(" ")
    assert zoo.validate_file(path) == [
        "E-ZOO-03 entries (our-llava/half).evidence.sha256: results/run.json has another hash"
    ]


def test_a_placeholder_revision_is_not_pinned(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["models"]["our-llava"]["revision"] = "0" * 40
        entry(status="verified", expected=[EXPECTED], evidence=EVIDENCE)(content)

    problems = zoo.validate_file(write(tmp_path, extended(change)))
    assert problems == [
        "E-ZOO-03 entries (our-llava/half).status: status verified needs a pinned revision of our-llava"
    ]


# VLMEFF_ZOO


def test_a_further_file_adds_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMEFF_ZOO", str(write(tmp_path, EXTENSION)))
    assert zoo.get("our-llava/half").status == "experimental"
    assert zoo.get("llava-1.5-7b/fast").status == "reported"
    assert zoo.resolve("us/our-llava", "half").steps == (zoo.Step("hiprune", 0.5, {}),)
    assert [path.name for path in zoo.load_zoo().files] == ["model_zoo.yaml", "zoo.yaml"]


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, EXTENSION)
    monkeypatch.setenv("VLMEFF_ZOO", str(path))
    first = zoo.load_zoo()
    assert zoo.load_zoo() is first
    write(tmp_path, extended(entry(status="broken")))
    os.utime(path, ns=(1, 1))
    assert zoo.get("our-llava/half").status == "broken"


def test_replacing_a_record_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"summary": "Faster.", "steps": [{"method": "random", "keep": 0.25}]}
    path = write(tmp_path, {"schema": "vlmeff.zoo/1", "presets": {"fast": fast}})
    monkeypatch.setenv("VLMEFF_ZOO", str(path))
    with pytest.raises(ZooError, match=r"E-ZOO-02 presets \(fast\): .*override: true"):
        zoo.load_zoo()
    assert zoo.validate_file(path)[0].startswith("E-ZOO-02")

    write(tmp_path, {"schema": "vlmeff.zoo/1", "presets": {"fast": {**fast, "override": True}}})
    assert zoo.validate_file(path) == []
    assert zoo.resolve("llava-1.5-7b", "fast").steps == (zoo.Step("random", 0.25, {}),)


def test_figures_do_not_outlive_the_preset_they_were_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"summary": "Half.", "steps": [{"method": "hiprune", "keep": 0.5}], "override": True}
    monkeypatch.setenv("VLMEFF_ZOO", str(write(tmp_path, {"schema": "vlmeff.zoo/1", "presets": {"fast": half}})))
    item = zoo.get("llava-1.5-7b/fast")
    assert (item.status, item.paper, item.tokens) == ("experimental", None, None)
    assert "zoo.yaml replaces" in item.notes[-1]
    row = next(row for row in zoo.preset_table("llava-1.5-7b") if row.preset == "fast")
    assert (row.tokens_in, row.tokens_kept) == (576, 288)
    assert zoo.get("llava-1.5-7b/smallest").status == "reported"


def test_a_missing_or_broken_further_file_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMEFF_ZOO", str(tmp_path / "absent.yaml"))
    with pytest.raises(ZooError, match=r"absent\.yaml(.|\n)*E-ZOO-01 file: .*check VLMEFF_ZOO"):
        zoo.load_zoo()
    broken = write(tmp_path, extended(entry(model="nothing")))
    monkeypatch.setenv("VLMEFF_ZOO", os.pathsep.join([str(write(tmp_path, EXTENSION, "good.yaml")), str(broken)]))
    with pytest.raises(ZooError) as error:
        zoo.load_zoo()
    assert error.value.path == str(broken)
    assert error.value.exit_code == 2
    assert any("unknown model 'nothing'" in problem for problem in error.value.problems)


# The published schema and the module's names


def test_json_schema_accepts_the_shipped_file_and_refuses_unknown_keys() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="checks the published schema with an independent validator")
    validator = jsonschema.Draft202012Validator(zoo.json_schema())
    content = yaml.safe_load((ROOT / "model_zoo.yaml").read_text(encoding="utf-8"))
    assert not list(validator.iter_errors(content))
    content["presets"]["fast"]["stepz"] = []
    assert list(validator.iter_errors(content))


def test_no_public_function_takes_the_name_of_a_function_of_the_package() -> None:
    assert not {"wrap", "report", "presets", "load", "plan"} & set(vars(zoo))
