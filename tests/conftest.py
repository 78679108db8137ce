"""Which (family, method, modality) the tests prove: with the environment variable VLMEFF_COVERAGE_TABLE=FILE a run of
the tests writes it to FILE as JSON.

A test calls ``covered(family, method, modality)`` before anything that can fail. A cell is written if every test that
named it passed; one failure strikes it off. A skipped test proves nothing and harms nothing.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

TABLE = "VLMEFF_COVERAGE_TABLE"
CELL = "vlmeff_cell"


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest) -> None:
    """Random numbers that a test does not seed itself are those of its name, whatever ran before it."""
    import torch

    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def covered(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Note that the running test proves a method on a family ("image" or "video")."""

    def note(family: str, method: str, modality: str) -> None:
        request.node.user_properties.append((CELL, (family, method, modality)))

    return note


class _Table:
    """Collects the cells of passed and failed tests; reports come here from workers of pytest-xdist too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: Counter[tuple[str, ...]] = Counter()
        self.failed: set[tuple[str, ...]] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cells = {tuple(value) for name, value in report.user_properties if name == CELL}
        if report.failed:  # also in teardown, after a call that passed
            self.failed |= cells
        elif report.when == "call" and report.passed:
            self.passed.update(cells)

    def pytest_sessionfinish(self) -> None:
        cells = [
            {"family": family, "method": method, "modality": modality, "tests": self.passed[family, method, modality]}
            for family, method, modality in sorted(self.passed.keys() - self.failed)
        ]
        versions = {name: version(name) for name in ("transformers", "torch")}
        self.path.write_text(json.dumps({"cells": cells, **versions}, indent=1) + "\n")


def pytest_configure(config: Any) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: one thread each, set before torch is imported
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    if not torch.cuda.is_available():
        # Triton decides once, when it is first imported, which tests of other packages do too.
        os.environ["TRITON_INTERPRET"] = "1"
    if not config.getoption("--hypothesis-profile"):  # --hypothesis-profile=default draws new examples each time
        hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
        hypothesis.settings.load_profile("repeatable")
    path = os.environ.get(TABLE)
    if path and not hasattr(config, "workerinput"):  # a worker of pytest-xdist
        config.pluginmanager.register(_Table(Path(path)), "vlmeff-coverage-table")
