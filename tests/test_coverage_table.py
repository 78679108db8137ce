"""The table of proven cells lists what passed, and only that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = """
import pytest

def test_passes(covered):
    covered("llava", "hiprune", "image")
    covered("llava", "hiprune", "image")

@pytest.mark.parametrize("n", [1, 2])
def test_passes_twice(covered, n):
    covered("llava", "hiprune", "image")
    covered("qwen3_vl", "fourier", "video")

def test_fails(covered):
    covered("qwen3_vl", "fourier", "image")
    assert False

@pytest.mark.parametrize("n", [1, 2])
def test_fails_once(covered, n):
    covered("gemma3", "scope", "image")
    assert n == 1

@pytest.fixture
def breaks():
    yield
    raise RuntimeError

def test_breaks_afterwards(covered, breaks):
    covered("smolvlm", "scope", "image")

def test_is_skipped(covered):
    covered("paligemma", "scope", "image")
    pytest.skip()
"""


def test_the_table_lists_cells_whose_tests_all_passed(tmp_path):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    table = tmp_path / "table.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    subprocess.run(command, env={**os.environ, "VLMEFF_COVERAGE_TABLE": str(table)}, capture_output=True, timeout=120)
    assert json.loads(table.read_text()) == {
        "cells": [
            {"family": "llava", "method": "hiprune", "modality": "image", "tests": 3},
            {"family": "qwen3_vl", "method": "fourier", "modality": "video", "tests": 2},
        ],
        "transformers": version("transformers"),
        "torch": version("torch"),
    }
