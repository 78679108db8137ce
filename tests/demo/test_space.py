"""demos/space is what a Hugging Face Space needs: configuration, dependencies, and an app that serves the same page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

pytest.importorskip("gradio", reason="needs the extra demo")

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "demos" / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# https://huggingface.co/docs/hub/spaces-config-reference
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
DOCUMENTED = set(
    "title emoji colorFrom colorTo sdk python_version sdk_version suggested_hardware suggested_storage app_file "
    "app_build_command app_port base_path fullWidth header short_description models datasets tags thumbnail pinned "
    "hf_oauth hf_oauth_scopes hf_oauth_expiration_minutes hf_oauth_authorized_org disable_embedding "
    "startup_duration_timeout custom_headers preload_from_hub license".split()
)
MOST_CHARS = 60  # of short_description


def front_matter() -> dict[str, Any]:
    _, head, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    loaded = yaml.safe_load(head)
    assert isinstance(loaded, dict)
    return loaded


def requirements() -> dict[str, Requirement]:
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {one.name: one for one in parsed}
    assert len(found) == len(parsed), "something is named twice"
    return found


def test_the_front_matter_is_what_spaces_document() -> None:
    head = front_matter()
    assert set(head) <= DOCUMENTED
    assert {"title", "emoji", "sdk", "sdk_version", "app_file", "license"} <= set(head)
    assert head["sdk"] == "gradio"
    assert {head["colorFrom"], head["colorTo"]} <= COLORS
    assert not re.search(r"[\w\s]", head["emoji"])
    assert (SPACE / head["app_file"]).is_file()
    assert len(head["short_description"]) <= MOST_CHARS
    assert head["license"] == PROJECT["license"].lower()
    assert head["suggested_hardware"] == "cpu-basic"


def test_its_python_and_gradio_are_ours() -> None:
    head = front_matter()
    assert isinstance(head["python_version"], str), "without quotes 3.10 would be the number 3.1"
    assert head["python_version"] in SpecifierSet(PROJECT["requires-python"])
    assert head["sdk_version"] in requirements()["gradio"].specifier


def test_the_requirements_are_those_of_the_package() -> None:
    extras = PROJECT["optional-dependencies"]
    ours = [*PROJECT["dependencies"], *extras["demo"], *extras["diffusion"]]
    assert {str(one) for one in requirements().values()} == {str(Requirement(one)) for one in ours}


@pytest.mark.slow
def test_the_app_serves_the_page_from_a_folder_made_as_the_readme_says(tmp_path: Path) -> None:
    """The package lies beside app.py, as a wheel unpacks, and nothing of the checkout can be imported."""
    from hatchling.builders.wheel import WheelBuilder

    readme = (SPACE / "README.md").read_text(encoding="utf-8")
    assert "pip install --no-deps --target space ." in readme
    space = tmp_path / "space"
    shutil.copytree(SPACE, space)
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(space)
    code = (
        "import json, os, urllib.request, app, vlmeff;"
        "page = app.main(port=0, block=False);"
        "address = f'http://127.0.0.1:{page.server_port}';"
        "config = json.load(urllib.request.urlopen(address + '/config'));"
        "names = [c['props'].get('elem_id') for c in config['components']];"
        "print(json.dumps({'code': vlmeff.__file__, 'host': page.server_name, 'title': config['title'],"
        " 'names': names, 'analytics': [page.analytics_enabled, os.environ['GRADIO_ANALYTICS_ENABLED']]}));"
        "page.close()"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GRADIO_ANALYTICS_ENABLED")}
    env |= {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    done = subprocess.run([sys.executable, "-c", code], cwd=space, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["code"].startswith(str(space))
    assert found["host"] == "0.0.0.0"
    assert found["title"] == "vlmeff"
    assert {"compare-run", "chat-box", "sweep-run"} <= set(found["names"])
    assert found["analytics"] == [False, "False"]


@pytest.mark.slow
def test_the_app_serves_at_the_port_of_spaces_when_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    from vlmeff.demo import serving

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(serving, "serve_demo", lambda **given: calls.append(given))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    runpy.run_path(str(SPACE / "app.py"), run_name="app")
    assert calls == [], "importing must serve nothing"
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == [{"host": "0.0.0.0", "port": 7860, "block": True}]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
