"""The Generate tab: what it draws, against the models called directly."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmeff
from vlmeff.demo.generators import PROMPTS, draw_digits, make_clip, missing_extra
from vlmeff.demo.work import WAITING, Stop, Stopped, alone
from vlmeff.errors import ConfigError

H264_DB = 35.0  # of a decoded clip to the frames that were coded, at the quality that write_mp4 asks for


def test_digits_are_drawn_plainly_with_fewer_steps_and_speculatively():
    drawn = draw_digits(3, mode="coupled", seed=0, count=2)
    steps = vlmeff.load("tiny-mar")[0].config.seq_len
    passes = {row[0]: int(row[1]) for row in drawn.rows}
    plain = [passes[f"plain, {n} steps"] for n in (steps, steps // 2, steps // 4)]
    assert plain == [steps, steps // 2, steps // 4]
    (speculative,) = [row for row in drawn.rows if row[0].startswith("coupled")]
    assert int(speculative[1]) < steps
    assert float(speculative[2]) > 1
    assert all(len(row) == len(drawn.head) for row in drawn.rows)


def test_deviation_of_fewer_steps_is_that_of_the_latents():
    drawn = draw_digits(5, mode="exact", seed=1, count=2)
    model = vlmeff.load("tiny-mar")[0]
    steps = model.config.seq_len
    full, half = (
        model.sample(torch.tensor([5, 5]), num_iter=n, cfg=1.0, seed=1).latents.double() for n in (steps, steps // 2)
    )
    (row,) = [row for row in drawn.rows if row[0] == f"plain, {steps // 2} steps"]
    assert float(row[3]) == pytest.approx(float((half - full).square().mean().sqrt()), abs=1e-3)


@pytest.mark.parametrize(("digit", "mode"), [(3, "magic"), (10, "exact"), (-1, "exact")])
def test_what_cannot_be_drawn_is_refused(digit, mode):
    with pytest.raises(ConfigError, match="digit 0 to 9"):
        draw_digits(digit, mode=mode, seed=0)


def test_both_clips_are_mp4_files_of_the_frames_that_the_pipeline_makes(tmp_path):
    pytest.importorskip("diffusers")
    imageio = pytest.importorskip("imageio.v2")
    from vlmeff.diffusion.generating import call_defaults

    told: list[str] = []
    drawn = make_clip(PROMPTS[1], "fast", seed=2, folder=tmp_path, progress=told.append)
    assert told == [
        "loading tiny-wan", "unwrapped: warming up", "unwrapped: measuring", "wrapping with fast", "fast: measuring"
    ]  # fmt: skip
    pipe, _ = vlmeff.load("tiny-wan")
    generator = torch.Generator().manual_seed(2)
    direct = pipe(PROMPTS[1], generator=generator, output_type="np", **call_defaults(pipe)).frames[0]
    unwrapped, preset = (np.stack(imageio.mimread(clip, memtest=False)) / 255 for clip in drawn.clips)
    assert unwrapped.shape == preset.shape
    factor = unwrapped.shape[1] // direct.shape[1]
    large = np.asarray(direct).repeat(factor, 1).repeat(factor, 2)
    assert -10 * np.log10(np.square(unwrapped - large).mean()) > H264_DB
    assert not np.array_equal(unwrapped, preset)
    assert [row[0] for row in drawn.rows] == ["unwrapped", "fast"]


def test_a_stop_ends_the_drawing_before_the_next_run_and_a_clip_after_a_step(tmp_path):
    told: list[str] = []
    stop, steps = Stop(), 0

    def progress(run: str) -> None:
        stop.check()
        told.append(run)
        if len(told) == 2:
            stop.set()

    with pytest.raises(Stopped):
        draw_digits(3, mode="coupled", seed=0, count=1, progress=progress)
    assert told == ["warming up", "plain, 16 steps"]

    pytest.importorskip("diffusers")

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise Stopped

    with pytest.raises(Stopped):
        make_clip(PROMPTS[0], "fast", seed=0, folder=tmp_path, on_step=on_step)
    assert steps == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio")
    from vlmeff.demo.engine import Engine
    from vlmeff.demo.page import build_demo, launch_options
    from vlmeff.demo.site import Site

    site = Site(Engine("tiny-llava"), ["tiny-llava"])
    demo = build_demo(site)
    demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(site))
    yield demo.local_url
    demo.close()


@pytest.mark.parametrize(
    ("endpoint", "arguments"), [("draw", [3, "coupled", 0]), ("clip", [PROMPTS[0], "fast", 0])], ids=["draw", "clip"]
)
def test_the_page_waits_for_other_runs_and_its_stop_button_ends_that(address, endpoint, arguments):
    if endpoint == "clip":
        pytest.importorskip("diffusers")
    from gradio_client import Client

    client = Client(address, verbose=False)
    with alone:  # another visitor's run
        job = client.submit(*arguments, api_name=f"/{endpoint}")
        deadline = time.monotonic() + 60
        while not any(WAITING in str(told) for told in job.outputs()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.predict(api_name=f"/stop_{endpoint}")
        assert "stopped" in str(job.result(timeout=60)[0])
    sheet = client.predict(*arguments, api_name=f"/{endpoint}")[-2]
    assert Path(sheet).is_file()


def test_without_the_extra_the_page_says_what_to_install(monkeypatch):
    gr = pytest.importorskip("gradio")
    from vlmeff.demo.engine import Engine
    from vlmeff.demo.site import Site
    from vlmeff.demo.tabs import generate_tab

    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = missing_extra()
    assert said is not None
    assert said.startswith("E-ENV-01")
    assert 'pip install "vlmeff[diffusion]"' in said
    with gr.Blocks() as page:
        generate_tab.build(Site(Engine("tiny-llava"), ["tiny-llava"]))
    kinds = {type(block).__name__: block for block in page.blocks.values()}
    assert "Video" not in kinds
    assert any("E-ENV-01" in str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML))


def test_drawing_needs_no_command_line_module():
    code = (
        "import sys; from vlmeff.demo.generators import draw_digits; draw_digits(1, mode='cspd', seed=0, count=1);"
        "print([name for name in sys.modules if name.startswith('vlmeff.cli')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.stdout.strip() == "[]"
