"""The benchmarks of video transformers: their parts run on tiny sizes, the committed results are of the shipped
weights, and the page shows what the files hold.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from vlmeff.diffusion.schemes import SCHEMES
from vlmeff.loading import embedded_folder
from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.architecture import CALL, build_pipeline, digests

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
QUALITY, COST, PAGE = RESULTS / "dit_quality.json", RESULTS / "dit_cpu.json", ROOT / "docs" / "diffusion.md"
CPU = torch.device("cpu")
HEADER = ("device", "torch", "vlmeff", "date", "load_average")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    names = ("dit", "dit_cases", "dit_chart", "dit_quality", "dit_roofline", "dit_tables")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["dit", "dit_quality", "dit_roofline"])
def test_the_help_of_a_script_names_its_result(name: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{name}.py" in done.stdout


# ---- cost


def test_every_scheme_is_timed_and_ratios_are_those_of_the_times(scripts: SimpleNamespace, no_grad: None) -> None:
    (row,), left_out = scripts.dit.linears({"small": {"odd": (33, 80)}}, 5, 1, CPU)
    assert (row["m"], row["n"], row["k"], row["rounds"]) == (5, 33, 80, 1)
    cases = row["cases"]
    assert {"float32", "bfloat16", *SCHEMES} <= cases.keys() <= {"float32", "bfloat16", *SCHEMES, "torchao int8"}
    assert left_out.keys() <= {"torchao int8", "torchao fp8"}
    for name, spec in SCHEMES.items():
        case = cases[name]
        extra = 4 * 33 + (4 * 33 if spec.weight == "uint" and spec.a_bits < 16 else 0)  # the bias, the sums of codes
        assert case["bytes"] == spec.weight_bytes(33, 80, branch_bytes=4) + extra
        assert case["times_faster_than"]["float32"] == pytest.approx(
            cases["float32"]["ms"]["median"] / case["ms"]["median"], rel=0.1
        )
    assert cases["float32"]["bytes"] == 2 * cases["bfloat16"]["bytes"] == 4 * (33 * 80 + 33)


def test_random_layers_hold_legal_codes(scripts: SimpleNamespace, no_grad: None) -> None:
    for spec in SCHEMES.values():
        layer = scripts.dit_cases.random_layer(spec, 6, 7, torch.float32, CPU)
        codes = layer.codes().float()
        assert codes.unique().numel() > 3
        low, high = (-7, 7) if spec.packed else (-127, 127)
        if spec.weight == "uint":
            low, high = 0, 2**spec.w_bits - 1
        if spec.weight != "fp8":
            assert codes.min() >= low
            assert codes.max() <= high
        assert torch.isfinite(layer(torch.ones(2, 7))).all()


def test_bytes_of_tensors_within_tensors(scripts: SimpleNamespace, no_grad: None) -> None:
    assert scripts.dit_cases.bytes_of(torch.nn.Linear(3, 5)) == 4 * 20
    ao = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16))
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert 64 * 32 + 2 * 32 <= scripts.dit_cases.bytes_of(model) <= 64 * 32 + 8 * 32 + 2 * 32


def test_a_block_is_called_with_what_the_transformer_gives_it(scripts: SimpleNamespace, no_grad: None) -> None:
    small = scripts.dit.WAN_1_3B | {
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 40},
        **{"num_layers": 1},
    }
    size = ((2, 4, 4), 5)
    transformer = scripts.dit.random_transformer(small, torch.bfloat16, CPU)
    assert transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert transformer.scale_shift_table.dtype == torch.float32
    arguments, tokens = scripts.dit.block_call(transformer, size)
    assert tokens == 2 * 2 * 2
    seen: list[torch.Tensor] = []
    handle = transformer.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    transformer(**scripts.dit.transformer_inputs(transformer, size))
    handle.remove()
    assert torch.equal(seen[0], transformer.blocks[0](*arguments))
    row, _ = scripts.dit.block(small, size, 1, CPU)
    assert {"float32", "bfloat16", *SCHEMES} <= row["cases"].keys()
    assert row["cases"]["w8a8_int8"]["bytes"] < row["cases"]["bfloat16"]["bytes"] < row["cases"]["float32"]["bytes"]


def test_whole_steps_of_the_shipped_pipeline(scripts: SimpleNamespace, no_grad: None, monkeypatch: Any) -> None:
    few = CALL | {"num_inference_steps": 2}
    makers = scripts.dit.pipelines(embedded_folder("tiny_wan"), few, CPU)
    some = {name: makers[name] for name in ("float32", "w8a8_int8", "preset fast")}
    row, left_out = scripts.dit.end_to_end(some, 2, 1, CPU)
    assert not left_out
    for case in row["cases"].values():
        assert case["steps_per_s"] == pytest.approx(2000 / case["ms"]["median"], rel=1e-3)
        assert case["peak_bytes"] > 0
    assert row["cases"]["w8a8_int8"]["bytes"] == row["cases"]["preset fast"]["bytes"] < row["cases"]["float32"]["bytes"]


def test_what_cannot_run_is_left_out_with_the_reason_and_our_own_failures_are_not(scripts: SimpleNamespace) -> None:
    def broken() -> Any:
        raise NotImplementedError("no such kernel\nmore")

    left_out: dict[str, str] = {}
    cases, _ = scripts.dit_cases.collect({"torchao fp8": broken, "fine": lambda: lambda: None}, left_out, CPU)
    assert list(cases) == ["fine"]
    assert left_out == {"torchao fp8": "NotImplementedError: no such kernel"}
    with pytest.raises(NotImplementedError):
        scripts.dit_cases.collect({"w8a8_fp8": broken}, left_out, CPU)


# ---- quality


def test_settings_cover_every_scheme_and_the_judge_compares_all_three(
    scripts: SimpleNamespace, monkeypatch: Any
) -> None:
    settings = scripts.dit_quality.wrap_settings()
    smooth = {f"{name}, calibrated" for name, spec in SCHEMES.items() if spec.smooth}
    cached = {"preset fast", "fast, threshold 0.1", "fast, threshold 0.2"}
    assert settings.keys() == {*SCHEMES, *smooth, *cached}
    assert all(batch == 1 for name, (_, batch) in settings.items() if name in cached)
    found = [("red", "circle", "left"), ("red", "square", "left"), ("blue", "circle", "up")]
    monkeypatch.setattr(
        scripts.dit_quality, "classify", lambda probe, frames: [found[int(f[0, 0, 0, 0])] for f in frames]
    )
    frames = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1, 1)
    prompts = [clips.prompt_of("red", "circle", "left")] * 2 + [clips.prompt_of("blue", "circle", "up")]
    assert scripts.dit_quality.judge_of(None)(frames, prompts) == [True, False, True]


def test_trainings_differ_in_the_module_only(scripts: SimpleNamespace) -> None:
    plain, qvgen = (scripts.dit_quality.training_config(4, kind, 42, 60) for kind in ("plain", "QVGen"))
    assert (plain.phi, qvgen.phi, qvgen.decay_fraction) == (None, "svd", 0.5)
    assert plain.to_dict() | {"phi": "svd"} == qvgen.to_dict()
    assert (plain.w_bits, plain.a_bits, plain.steps, plain.seed) == (4, 4, 60, 42)


def test_blocks_are_ranked_on_recorded_calls(scripts: SimpleNamespace, no_grad: None, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(scripts.dit_quality, "CALIBRATION", {"num_inference_steps": 1})
    order, curve = scripts.dit_quality.block_order(pipe)
    assert [row["kept"] for row in curve] == [4, 3, 2, 1]
    assert curve[0]["error_of_a_call"] == 0 < curve[-1]["error_of_a_call"]
    assert len(set(order)) == 3
    assert len(pipe.transformer.blocks) == 4


@pytest.mark.slow
def test_a_small_run_writes_what_it_measured_and_goes_on(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out, work = tmp_path / "q.json", tmp_path / "work"
    monkeypatch.setattr(scripts.dit_quality, "CALL", CALL | {"num_inference_steps": 2})
    some = dict(list(scripts.dit_quality.wrap_settings().items())[:1])
    monkeypatch.setattr(scripts.dit_quality, "wrap_settings", lambda: some)
    monkeypatch.setattr(scripts.dit_quality, "runs", lambda args: [(4, "QVGen", 7)])
    small = ["--prompts", "2", "--seeds", "1", "--training-clips", "6", "--steps", "12", "--work", str(work)]
    arguments = ["dit_quality.py", "--out", str(out), *small, "--only", "w8a16"]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        scripts.dit_quality.main()
        first = result(out)
        scripts.dit_quality.main()
    finally:
        torch.set_grad_enabled(True)
    again = result(out)
    assert list(first["settings"]) == ["unwrapped", "w8a16_int8", "W4A4 trained, QVGen, seed 7"]
    trained = first["settings"]["W4A4 trained, QVGen, seed 7"]
    assert trained["training"]["steps"] == 12
    assert trained["transformer_bytes"] < first["settings"]["unwrapped"]["transformer_bytes"]
    assert again["settings"]["W4A4 trained, QVGen, seed 7"]["latent_error"] == trained["latent_error"]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert scripts.dit_quality.table(again) in capsys.readouterr().out


def test_tables_hold_a_row_for_each_setting(scripts: SimpleNamespace) -> None:
    rows = scripts.dit_roofline.roofline().splitlines()
    assert len(rows) == 2 + 7
    assert "| Wan2.1 T2V 1.3B | 480 x 832 x 81 | 32,760 | 283 | 29% |" in "\n".join(rows)
    assert len(scripts.dit_roofline.schemes().splitlines()) == 2 + len(SCHEMES)
    assert "| Wan2.1 T2V 14B | `WanTransformer3DModel` | 406 | 400 | 26.18 |" in scripts.dit_roofline.families()


# ---- committed results


def test_the_committed_quality_is_of_the_shipped_weights_and_complete(scripts: SimpleNamespace) -> None:
    found = result(QUALITY)
    assert found["weights_sha256"] == digests(embedded_folder("tiny_wan"))
    assert all(found[name] for name in HEADER)
    rows = found["settings"]
    assert found["call"] == CALL
    assert {"unwrapped", *scripts.dit_quality.wrap_settings(), "3 of 4 blocks", "1 of 4 blocks"} <= rows.keys()
    trained = [(bits, kind) for bits in (4, 3) for kind in ("plain", "QVGen")]
    for bits, kind in trained:
        row = rows[scripts.dit_quality.run_name(bits, kind, 42)]
        assert row["training"]["settings"]["phi"] == scripts.dit_quality.KINDS[kind]["phi"]
        assert row["training"]["steps"] == rows[scripts.dit_quality.run_name(4, "plain", 42)]["training"]["steps"]
    for row in rows.values():
        assert row["clips"] == found["prompts"] * found["seeds"]
        assert 0 <= row["right_95"][0] <= row["right"] / row["clips"] <= row["right_95"][1] <= 1
    assert rows["unwrapped"]["right"] >= 0.9 * rows["unwrapped"]["clips"]
    assert QUALITY.with_suffix(".png").exists()


def test_the_committed_cost_is_of_the_shipped_weights_and_says_that_it_is_a_cpus() -> None:
    found = result(COST)
    assert found["end_to_end"]["weights_sha256"] == digests(embedded_folder("tiny_wan"))
    assert all(found[name] for name in HEADER)
    assert found["device"].startswith("CPU")
    assert "say nothing about a GPU" in found["notes"][0]
    shapes = {(row["model"], row["n"], row["k"]) for row in found["linears"]}
    assert shapes >= {("Wan-1.3B", 8960, 1536), ("Wan-14B", 13824, 5120), ("Wan-14B", 5120, 5120)}
    for cases in [row["cases"] for row in found["linears"]] + [
        found[part]["cases"] for part in ("block", "end_to_end")
    ]:
        assert {"float32", "bfloat16", *SCHEMES} <= cases.keys()
        assert all(case["times_faster_than"]["float32"] > 0 for case in cases.values())
    assert "torchao int8" in found["block"]["cases"]


def test_no_result_names_a_path_of_the_machine() -> None:
    for path in (QUALITY, COST):
        assert "/tmp" not in path.read_text()
        assert str(ROOT) not in path.read_text()


def test_the_page_shows_the_tables(scripts: SimpleNamespace) -> None:
    page = PAGE.read_text()
    quality, cost = result(QUALITY), result(COST)
    for table in (
        scripts.dit_quality.table(quality),
        scripts.dit_quality.training_table(quality),
        scripts.dit_tables.markdown(cost),
        scripts.dit_roofline.families(),
        scripts.dit_roofline.schemes(),
        scripts.dit_roofline.roofline(),
    ):
        assert table in page
