"""``vlmeff quantize`` on the shipped tiny-wan."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmeff
from vlmeff.cli import app
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.errors import ConfigError, QuantConfigError, UnknownNameError, VlmeffError


def run(*arguments: str):
    return CliRunner().invoke(app, ["quantize", *arguments])


def test_what_it_writes_loads_as_it_says(tmp_path: Path) -> None:
    done = run("--model", "tiny-wan", "--scheme", "w4a8_int8", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout.strip().splitlines()[-1])["components"]["transformer"]
    pipe, _ = vlmeff.load(tmp_path / "out")
    layers = [m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 40 == sum(group["count"] for group in table["groups"] if group["scheme"])
    assert {layer.spec.scheme for layer in layers} == {"w4a8_int8"}
    assert (tmp_path / "out" / "call.json").is_file()


def test_a_dry_run_writes_nothing_and_counts_the_group(tmp_path: Path) -> None:
    def after(*arguments: str) -> int:
        done = run("--model", "tiny-wan", "--scheme", "w4a16", "--dry-run", "--json", *arguments)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.strip().splitlines()[-1])["transformer"]["bytes_after"]

    assert after("--group", "16") > after()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--scheme", "w4a4", "--dry-run"), UnknownNameError, "w4a4_int"),
        ((), ConfigError, "--out"),
        (("--scheme", "w8a8_int8", "--rank", "8", "--dry-run"), QuantConfigError, "svdq"),
        (("--keep", "*", "--dry-run"), QuantConfigError, "regular expression"),
        (("--alpha", "3", "--dry-run"), QuantConfigError, "alpha"),
        (("--text-encoder", "w8a8_int8", "--dry-run"), UnknownNameError, "text encoder"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(arguments, error, words, monkeypatch) -> None:
    monkeypatch.setattr("vlmeff.loading.load", lambda *_, **__: pytest.fail("loaded"))
    done = run("--model", "tiny-wan", *arguments)
    assert isinstance(done.exception, error)
    assert words in str(done.exception)


def test_a_folder_with_files_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("--model", "tiny-wan", "--out", str(tmp_path))
    assert isinstance(done.exception, VlmeffError)
    assert "--overwrite" in str(done.exception)


def test_the_list_names_every_scheme() -> None:
    from vlmeff.diffusion.schemes import SCHEMES

    done = run("--list")
    assert all(name in done.stdout for name in SCHEMES)
