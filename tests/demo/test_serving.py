"""``vlmeff demo``: who may reach the page, and what fails before it is served."""

from __future__ import annotations

import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlmeff.cli import app
from vlmeff.demo.serving import check_gradio, read_auth, serve_demo
from vlmeff.errors import ConfigError, MissingExtraError, UnknownModelError

ROOT = Path(__file__).resolve().parents[2]
gradio = pytest.importorskip("gradio", reason="needs the extra demo")
httpx = pytest.importorskip("httpx")


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))


@contextmanager
def served(**options: Any) -> Iterator[tuple[str, list[str]]]:
    """(address, what was said) of a page on a free port."""
    said: list[str] = []
    demo = serve_demo(["tiny-llava"], port=0, block=False, say=said.append, **options)
    try:
        yield demo.local_url.rstrip("/"), said
    finally:
        demo.close()


def visitor(address: str) -> Any:
    return httpx.Client(base_url=address, timeout=60)  # other tests share the cores


def test_with_a_password_nothing_is_served_without_it(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("correct horse\nnot this\n")
    with served(auth=read_auth(f"ann:{file}")) as (address, said), visitor(address) as client:
        for path in ("/gradio_api/info", "/config", "/gradio_api/file=x"):
            assert client.get(path).status_code == 401, path
        asked = client.post("/gradio_api/call/about", json={"data": ["tiny-llava"]})
        assert asked.status_code == 401
        wrong = client.post("/login", data={"username": "ann", "password": "not this"})
        assert wrong.status_code == 400
        assert client.get("/config").status_code == 401
        right = client.post("/login", data={"username": "ann", "password": "correct horse"})
        assert right.status_code == 200
        assert client.get("/config").status_code == 200
    assert not any("correct" in line for line in said)


def test_another_address_without_a_password_is_warned_about(tmp_path: Path) -> None:
    with served(host="0.0.0.0") as (_, said):
        assert said[0].startswith("warning: 0.0.0.0 can be reached from other machines and there is no password")
    with served(host="0.0.0.0", auth=("ann", "secret")) as (_, said):
        assert not any("warning" in line for line in said)
    with served() as (address, said):
        assert not any("warning" in line for line in said)
        assert address.startswith("http://127.0.0.1:")


def test_the_page_says_nothing_to_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    real = gradio.Blocks.launch

    def launch(self: Any, **options: Any) -> Any:
        given.update(options, analytics=self.analytics_enabled)
        return real(self, **options)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    with served():
        pass
    assert (given["analytics"], given["share"], given["show_error"], given["allowed_paths"]) == (False,) * 3 + ([],)
    assert given["max_file_size"] == 10 * 2**20
    assert given["blocked_paths"] == [str(Path.cwd().resolve())]


def test_the_page_works_from_a_folder_that_holds_the_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocking that folder would block every picture; its other files are not served either way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    picture = ROOT / "vlmeff" / "demo" / "examples" / "one-shape.png"
    with served() as (address, _), visitor(address) as client:
        sent = client.post("/gradio_api/upload", files={"files": ("p.png", picture.read_bytes())})
        (path,) = sent.json()
        assert client.get(f"/gradio_api/file={path}").content == picture.read_bytes()
        assert client.get(f"/gradio_api/file={tmp_path / 'secret.txt'}").status_code == 403


def test_a_port_in_use_is_said_in_plain_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: .* in use\? 0 takes a free port"):
            serve_demo(["tiny-llava"], port=port, block=False, say=lambda line: None)


def test_an_unknown_model_fails_at_the_start_with_the_zoos_error() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'tiny-llava'"):
        serve_demo(["tiny-lava"], port=0, block=False, say=lambda line: None)


@pytest.mark.parametrize("text", ["ann", ":file", "ann:", "ann:missing-file"])
def test_other_forms_of_auth_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--auth"):
        read_auth(text)


def test_a_password_in_the_place_of_its_file_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        read_auth("ann:very-secret")
    assert "very-secret" not in str(caught.value)


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("\nsecond line\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_auth(f"ann:{tmp_path / 'password'}")


def test_without_gradio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gradio" else real(name, *rest))
    for call in (check_gradio, lambda: serve_demo(["tiny-llava"], port=0, block=False, say=lambda line: None)):
        with pytest.raises(MissingExtraError, match=r'pip install "vlmeff\[demo\]"'):
            call()


def test_the_command_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "vlmeff.demo.serving.serve_demo", lambda models, **options: given.update(options, models=models)
    )
    (tmp_path / "password").write_text("secret\n")
    line = ["demo", "--model", "tiny-qwen", "--model", "tiny-llava", "--port", "0", "--max-pixels", "99"]
    line += ["--auth", f"ann:{tmp_path / 'password'}", "--log-dir", str(tmp_path / "log"), "--max-question-chars", "9"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert given["models"] == ["tiny-qwen", "tiny-llava"]
    assert (given["host"], given["port"], given["auth"]) == ("127.0.0.1", 0, ("ann", "secret"))
    assert (given["limits"].max_pixels, given["limits"].max_question_chars) == (99, 9)
    assert given["log_dir"] == tmp_path / "log"


def test_the_command_refuses_another_dtype() -> None:
    done = CliRunner().invoke(app, ["demo", "--dtype", "int8"])
    assert isinstance(done.exception, ConfigError)
    assert "--dtype 'int8'" in str(done.exception)


def test_importing_the_command_line_does_not_import_gradio() -> None:
    code = "import sys, vlmeff.cli; print([m for m in ('gradio', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_examples_are_in_the_wheel(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    from vlmeff.demo.samples import EXAMPLES

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    assert {f"vlmeff/demo/examples/{example.file}" for example in EXAMPLES} <= set(names)
