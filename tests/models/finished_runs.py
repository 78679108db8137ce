"""Finished runs written by hand, as a runner would leave them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmeff.evaluation.samples import SampleRow

ENVIRONMENT = {
    "python": "3.12.1",
    "torch": "2.11.0",
    "transformers": "5.23.0",
    "cuda": None,
    "device_name": "test machine",
    "n_devices": 1,
    "os": "Linux",
    "hostname": "secret-host",
    "user": "alice",
}


def row(doc_id: str, right: float, *, score: str = "right", **fields: Any) -> SampleRow:
    """A document scored ``right`` under the name ``score``; every other field as given."""
    given = {"prediction": "yes" if right else "no", "parsed": "yes" if right else "no", "n_images": 1}
    given |= {"visual_tokens_in": 64, "visual_tokens_kept": 64, "prompt_tokens": 80, "prefill_tokens": 80}
    return SampleRow(doc_id=doc_id, **{**given, "scores": {score: right}, **fields})


def write_run(
    output: Path,
    rows: Sequence[SampleRow],
    *,
    kind: str = "baseline",
    preset: str | None = None,
    control: str | None = None,
    benchmark: str = "quiz",
    metric: str = "exact",
    done: bool = True,
    **info: Any,
) -> Path:
    """Write run.json, samples.jsonl and done.json of one run; ``info`` replaces entries of run.json."""
    run = {
        "schema": "vlmeff.run/1",
        "model": {"id": "tiny/model", "revision": None, "dtype": "float32", "attn_implementation": "sdpa",
                  "params": 1000, "license": "Apache-2.0"},
        "environment": ENVIRONMENT,
        "kind": kind,
        "preset": preset,
        "control": control,
        "parameters": {},
        "benchmark": benchmark,
        "data": {"source": "folder", "id": None, "revision": None, "sha256": "ab" * 32, "n_docs": len(rows),
                 "n_groups": len({r.group or r.doc_id for r in rows})},
        "partial": False,
        "created": "2026-01-01T00:00:00+00:00",
        "caption_notes": [],
        "metric": metric,
        "perf": None,
        **info,
    }  # fmt: skip
    run.setdefault("fingerprint", hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest())
    slug = "-".join(filter(None, (control, preset))) or "baseline"
    folder = output / "tiny-model" / benchmark / f"{slug}-{run['fingerprint'][:8]}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    lines = (json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in rows)
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    if done:
        (folder / "done.json").write_text("{}", encoding="utf-8")
    return folder
