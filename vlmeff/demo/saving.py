"""Keep a comparison that a visitor wants to keep: JSON and PNG files in ``--log-dir``, under names made here."""

from __future__ import annotations

import json
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from vlmeff import __version__
from vlmeff.demo.compare import Comparison
from vlmeff.errors import ConfigError

MOST_SAVED = 10_000  # some gigabytes; visitors decide how often the button is pressed


def save_comparison(log_dir: Path, now: Comparison, picture: Image.Image, question: str, model: str) -> Path:
    """Write ``comparison.json``, ``picture.png`` and the token maps into a new folder; returns the folder.

    Nothing of what the visitor sent gets into a file's name. A folder that could not be finished is removed.

    Raises:
        ConfigError: the folder cannot be written, or ``log_dir`` holds ``MOST_SAVED`` comparisons.
    """
    if log_dir.is_dir() and sum(1 for _ in log_dir.iterdir()) >= MOST_SAVED:
        raise ConfigError(f"{MOST_SAVED} comparisons are saved already: whoever serves this page must move some away.")
    moment = datetime.now(UTC)
    folder = log_dir / f"{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        picture.save(folder / "picture.png")
        runs = {name: _run(folder, now, name) for name in now.runs}
        record = {
            "schema": "vlmeff.demo-comparison/1",
            "saved": moment.isoformat(timespec="seconds"),
            "vlmeff": __version__,
            "model": model,
            "question": question,
            "order": list(now.order),
            "runs": runs,
        }
        (folder / "comparison.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"The comparison cannot be saved ({error.strerror}).") from error
    return folder


def _run(folder: Path, now: Comparison, name: str) -> dict[str, Any]:
    side = now.side(name)
    if side.done is None:
        return {"label": now.label(name), "failed": side.failed}
    maps = []
    for number, one in enumerate(side.done.maps, 1):
        file = f"{name}-map-{number}.png"
        one.after.save(folder / file)
        maps.append({"file": file, "what": one.label, "kept": one.kept, "of": one.total})
    return {
        "label": now.label(name),
        "answer": side.done.text,
        "report": side.done.report.to_dict(),
        "peak_bytes": side.done.peak_bytes,
        "maps": maps,
    }
