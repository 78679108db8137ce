"""The files of one run: rows are appended one by one, survive a kill, and are merged in the order of the data set.

    <output>/<model>/<benchmark>/<run>-<fingerprint>/
        run.json              what the run is, written first
        samples.rank0.jsonl   one line per finished document, by each process its own
        ended.rank1.json      by each of several processes when it has tried all of its documents; gone once merged
        samples.jsonl         all of them, written at once at the end
        done.json             written last

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmeff.errors import DataError, RunError
from vlmeff.evaluation.samples import SampleRow

SYNC_ROWS, SYNC_SECONDS = 50, 10.0


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of canonical JSON: the same inputs give the same run, whatever the order of their keys."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def slug(name: str) -> str:
    """A folder name: "llava-hf/llava-1.5-7b-hf" -> "llava-hf--llava-1.5-7b-hf"."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name.strip("/").replace("/", "--")).strip("-.") or "model"


def write_json(path: Path, content: Any) -> None:
    """Write the whole file or nothing."""
    _replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class RunStore:
    """The folder of a run with this fingerprint; ``open`` makes it and writes ``run.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}  # of ``open``: the content of run.json, as it was first written

    @classmethod
    def at(cls, output: Path, model: str, benchmark: str, name: str, about: Mapping[str, Any]) -> RunStore:
        """Where ``open`` would put a run; nothing is written."""
        return cls(output / slug(model) / slug(benchmark) / f"{slug(name)}-{about['fingerprint'][:8]}")

    @classmethod
    def open(cls, output: Path, model: str, benchmark: str, name: str, about: Mapping[str, Any]) -> RunStore:
        """Args: about: the content of run.json, with "fingerprint".

        Raises:
            DataError: the folder holds a run of another fingerprint.
        """
        folder = cls.at(output, model, benchmark, name, about)
        folder.path.mkdir(parents=True, exist_ok=True)
        file = folder.path / "run.json"
        if file.exists():
            folder.about = json.loads(file.read_text(encoding="utf-8"))
            theirs = folder.about.get("fingerprint")
            if theirs != about["fingerprint"]:
                raise DataError(f"{file}: of another run (fingerprint {theirs}); move the folder away.")
        else:
            folder.about = dict(about)
            write_json(file, folder.about)
        return folder

    @property
    def is_done(self) -> bool:
        return (self.path / "done.json").exists()

    def move_away(self) -> Path | None:
        """Keep an old run beside the new one (``--no-resume``); returns where it is now, None if there was none.

        Raises:
            RunError: a living process writes there (E-RUN-01).
        """
        if not self.path.exists():
            return None
        for lock in self.path.glob("lock.rank*.json"):
            holder = _holder(lock)
            if holder is not None:
                raise _locked(self.path.name, holder)
        name = f"{self.path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
        places = (self.path.with_name(name + (f"-{n}" if n else "")) for n in itertools.count())
        place = next(place for place in places if not place.exists())
        self.path.rename(place)
        return place

    # -- shares of processes: which have ended in one launch

    def begin_share(self, rank: int) -> None:
        """A process begins: that it ended an earlier time counts no more."""
        self._share(rank).unlink(missing_ok=True)

    def end_share(self, rank: int, world: int, launch: str) -> None:
        """A process has tried all of its documents. ``launch``: the same for the processes started with it."""
        write_json(self._share(rank), {"world": world, "launch": launch})

    def ended_shares(self, world: int, launch: str) -> set[int]:
        """The ranks of so many processes of this launch that have ended."""
        found = set()
        for rank in range(world):
            with suppress(FileNotFoundError):
                about = json.loads(self._share(rank).read_text(encoding="utf-8"))
                if (about.get("world"), about.get("launch")) == (world, launch):
                    found.add(rank)
        return found

    def _share(self, rank: int) -> Path:
        return self.path / f"ended.rank{rank}.json"

    def rows(self) -> dict[str, SampleRow]:
        """The last whole line of every document, over the files of all processes."""
        found: dict[str, SampleRow] = {}
        for file in sorted(self.path.glob("samples.rank*.jsonl")):
            for row in _read(file):
                before = found.get(row.doc_id)
                if before is None or (row.error is None, row.attempt) >= (before.error is None, before.attempt):
                    found[row.doc_id] = row
        return found

    def merge(self, doc_ids: Sequence[str]) -> list[SampleRow]:
        """Write ``samples.jsonl`` in the order of ``doc_ids`` and ``done.json``; returns the rows.

        Raises:
            RunError: documents are missing.
        """
        found = self.rows()
        missing = [doc_id for doc_id in doc_ids if doc_id not in found]
        if missing:
            raise RunError(
                f"E-RUN-02: {self.path.name}: {len(missing)} of {len(doc_ids)} documents have no row, "
                f"{missing[0]!r} first; run the command again to go on."
            )
        rows = [found[doc_id] for doc_id in doc_ids]
        _replace(self.path / "samples.jsonl", "".join(_line(row) for row in rows))
        write_json(self.path / "done.json", {"documents": len(rows), "errors": sum(r.error is not None for r in rows)})
        for share in self.path.glob("ended.rank*.json"):
            share.unlink(missing_ok=True)
        return rows


class RowWriter:
    """Appends rows of one process; one writer per process and run at a time.

    Raises:
        RunError (on entering): another live process writes there.
    """

    def __init__(self, folder: RunStore, rank: int = 0) -> None:
        self.path = folder.path / f"samples.rank{rank}.jsonl"
        self._lock = folder.path / f"lock.rank{rank}.json"
        self._unsynced, self._synced = 0, time.monotonic()

    def __enter__(self) -> RowWriter:
        self._take_lock()
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()
        self._lock.unlink(missing_ok=True)

    def write(self, row: SampleRow) -> None:
        self._file.write(_line(row))
        self._file.flush()  # a killed process loses nothing; a machine that loses power at most what is not synced
        self._unsynced += 1
        if self._unsynced >= SYNC_ROWS or time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced, self._synced = 0, time.monotonic()

    def _take_lock(self) -> None:
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()})
        for _ in range(2):
            try:
                handle = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                holder = _holder(self._lock)
                if holder is not None:
                    raise _locked(self._lock.parent.name, holder) from None
                self._lock.unlink(missing_ok=True)
            else:
                with os.fdopen(handle, "w") as file:
                    file.write(mine)
                return
        raise RunError(f"E-RUN-01: {self._lock} cannot be taken; choose another --output.")


def _locked(run: str, holder: str) -> RunError:
    return RunError(f"E-RUN-01: {run} is being written by process {holder}; wait for it, or choose another --output.")


def _holder(lock: Path) -> str | None:
    """Who holds a lock; None when nobody does any more."""
    try:
        held = json.loads(lock.read_text())
        pid, host = int(held["pid"]), str(held["host"])
    except (OSError, ValueError, KeyError):
        return None
    if host != socket.gethostname():
        return f"{pid} on another machine"
    if pid == os.getpid():
        return str(pid)
    with suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return str(pid)
        return str(pid)
    return None


def _line(row: SampleRow) -> str:
    return json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n"


def _read(file: Path) -> Iterable[SampleRow]:
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    if lines[-1]:
        warnings.warn(f"{file.name}: the last line was being written when the run ended; dropped.", stacklevel=3)
    for number, line in enumerate(lines[:-1], 1):
        if line.strip():
            try:
                yield SampleRow.from_json(json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"E-DATA-03: {file}, line {number}: not a row of a run ({error}).") from error


def _drop_torn_line(file: Path) -> None:
    """What follows the last newline was being written when the process ended."""
    if not file.exists():
        return
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        with file.open("r+b") as handle:
            handle.truncate(end)
