"""``vlmeff eval``: every document through every run, one process or many, killed and gone on from.

Documents are the outer loop and runs the inner one, which take turns in another order for each document: clocks,
caches and the machine's other work drift alike for all of them, and a run that is cut short is cut at the same
document as the others.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from vlmeff import zoo
from vlmeff.errors import ConfigError, RunError
from vlmeff.evaluation.benchmarks import LoadedBenchmark, get
from vlmeff.evaluation.loaded import Answered, Engine, LoadedModel, Task
from vlmeff.evaluation.runs import document_score
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.settings import CONTROLS, TIMED, Settings, Shard
from vlmeff.evaluation.storage import RowWriter, RunStore, fingerprint

__all__ = [
    "CONTROLS",
    "Answered",
    "Engine",
    "Interrupted",
    "LoadedModel",
    "Progress",
    "Session",
    "Settings",
    "Shard",
    "Task",
    "evaluate",
    "load_benchmark",
]

ATTEMPTS = 2  # of a document that fails: the second one when the command is run again
EARLY = 3  # documents after which a run without effect is refused


class Interrupted(RunError):
    """The user stopped the run; what is finished is kept."""

    exit_code = 130


@dataclass(eq=False)
class Progress:
    """What the runner tells while it works; the command line draws it.

    ``scored``, before ``step``: the mean score so far of the baseline and of each preset, 0 to 1 where the metric is.
    """

    begin: Callable[[str, int, int], None] = field(default=lambda benchmark, done, total: None)
    step: Callable[[str, list[SampleRow]], None] = field(default=lambda benchmark, rows: None)
    scored: Callable[[str, Mapping[str, float]], None] = field(default=lambda benchmark, so_far: None)
    say: Callable[[str], None] = field(default=lambda text: None)


def evaluate(settings: Settings, *, shard: Shard | None = None, progress: Progress | None = None) -> list[RunStore]:
    """Run everything that is not there yet and merge it; rank 0 returns the finished runs, other ranks nothing.

    Raises:
        ConfigError, DataError: before a model is loaded, where that is possible.
        RunError: E-RUN-01 to 03, E-MODEL-03; ``Interrupted``.
    """
    shard, progress = shard or Shard.of_environment(), progress or Progress()
    if shard.world > 1 and not settings.resume:
        # Processes do not talk to each other: one would go on in the folder that another is moving away.
        raise ConfigError("--no-resume does not work with several processes; choose another --output.")
    for preset in settings.presets:  # raises for a name that does not exist
        zoo.resolve(settings.model, preset)
    loaded = [load_benchmark(settings, name) for name in settings.benchmarks]
    return Session(settings, shard, progress, LoadedModel.load(settings, shard, progress.say)).run_all(loaded)


def load_benchmark(settings: Settings, name: str) -> LoadedBenchmark:
    limit = settings.limit
    if settings.perf == "latency" and limit is None:
        limit = TIMED
    return get(name, settings.data_root).load(
        data_root=settings.data_root,
        source=settings.source,
        offline=settings.offline,
        limit=limit,
        max_image_pixels=settings.max_image_pixels,
    )


@dataclass(eq=False)
class Session:
    """An evaluation: what is asked of an engine, and what becomes of its answers."""

    settings: Settings
    shard: Shard
    progress: Progress
    engine: Engine

    def run_all(self, loaded: Sequence[LoadedBenchmark]) -> list[RunStore]:
        """Every benchmark; rank 0 returns the finished runs."""
        done = []
        with _interruptible() as stop:
            for data in loaded:
                stores = self.open(data)
                self.run(data, stores, stop)
                if self.shard.rank == 0:
                    done += self.finish(data, stores, stop)
        return done

    # -- files

    def open(self, data: LoadedBenchmark) -> list[RunStore]:
        """The folder of each run; with ``resume`` off an old one is moved aside."""
        stores = []
        for run in self.engine.runs:
            about = self.describe(run, data)
            args = (self.settings.output, about["model"]["id"], data.benchmark.name, run.name, about)
            if not self.settings.resume and self.shard.rank == 0:
                moved = RunStore.at(*args).move_away()
                self.progress.say(f"--no-resume: what was there is kept in {moved}") if moved else None
            stores.append(RunStore.open(*args))
        return stores

    def describe(self, run: Any, data: LoadedBenchmark) -> dict[str, Any]:
        """run.json. Of the machine, the world size and the time nothing goes into the fingerprint."""
        benchmark, about = data.benchmark, self.engine.about
        identity = {
            "model": about["model"],
            "kind": run.kind,
            "preset": run.preset,
            "control": run.control,
            "parameters": run.parameters,
            "benchmark": benchmark.name,
            "data": {**data.data, "n_docs": data.n_docs, "n_groups": data.n_groups},
            "prompt": {"id": benchmark.template.name, "text": benchmark.template.text},
            "generation": {
                "max_new_tokens": self.settings.max_new_tokens or benchmark.max_new_tokens,
                "greedy": True,
                **({} if self.settings.batch_size == 1 else {"batch_size": self.settings.batch_size}),
                **({} if self.settings.fixed_output is None else {"fixed_output": self.settings.fixed_output}),
            },
            "seed": self.settings.seed,
            "max_image_pixels": self.settings.max_image_pixels,
            "versions": {name: _minor(about["environment"][name]) for name in ("vlmeff", "torch", "transformers")},
        }
        return {
            "schema": "vlmeff.run/1",
            **identity,
            "metric": benchmark.metric_name,
            "partial": data.partial,
            "caption_notes": list(data.notes),
            "perf": {"mode": self.settings.perf, "repeats": self.settings.repeats},
            "environment": about["environment"],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint(identity),
        }

    # -- work

    def run(self, data: LoadedBenchmark, stores: Sequence[RunStore], stop: threading.Event) -> None:
        """Answer what is not there yet of this process's documents."""
        for store in stores:
            store.begin_share(self.shard.rank)
        known = [store.rows() for store in stores]
        mine = [i for i in range(len(data)) if i % self.shard.world == self.shard.rank]
        tasks = [task for i in mine if (task := _task(i, data.doc_ids[i], known)).runs]
        self.progress.begin(data.benchmark.name, len(mine) - len(tasks), len(mine))
        if tasks:
            self._answer(data, stores, tasks, known, len(mine), stop)
        for store in stores if self.shard.world > 1 else ():
            store.end_share(self.shard.rank, self.shard.world, _launch())

    def _answer(
        self,
        data: LoadedBenchmark,
        stores: Sequence[RunStore],
        tasks: Sequence[Task],
        known: Sequence[Mapping[str, SampleRow]],
        total: int,
        stop: threading.Event,
    ) -> None:
        so_far = _ScoreSoFar(self.engine.runs, data, known)
        count, failed = 0, [0] * len(stores)
        first: list[list[SampleRow]] = [[] for _ in stores]
        with ExitStack() as stack:
            writers = [stack.enter_context(RowWriter(store, self.shard.rank)) for store in stores]
            for count, (task, rows) in enumerate(self.engine.answers(data, tasks, stop), 1):
                for number, row in zip(task.runs, rows, strict=True):
                    if stores[number].about["environment"] != self.engine.about["environment"]:
                        row = replace(row, timing_valid=False)  # begun on another machine
                    writers[number].write(row)
                    failed[number] += row.error is not None
                    first[number].append(row) if count <= EARLY else None
                self.progress.scored(data.benchmark.name, so_far.after(task, rows))
                self.progress.step(data.benchmark.name, rows)
                if count == min(EARLY, len(tasks)):
                    self._check_early(first)
                self._check_errors(failed, count, total)
            if stop.is_set():
                raise Interrupted(
                    f"interrupted after {count} of {len(tasks)} documents of {data.benchmark.name}; run the same "
                    "command again to go on."
                )

    def _check_early(self, first: Sequence[Sequence[SampleRow]]) -> None:
        from vlmeff.evaluation.answering import check_effect

        baseline = next((r for run, r in zip(self.engine.runs, first, strict=True) if run.kind == "baseline"), None)
        for run, rows in zip(self.engine.runs, first, strict=True):
            if rows and baseline:
                check_effect(run, rows, baseline)

    def _check_errors(self, failed: Sequence[int], count: int, total: int) -> None:
        """``failed`` of each run, of ``count`` documents answered now; ``total``: this process's, those before too."""
        worst = max(range(len(failed)), key=failed.__getitem__)
        hopeless = failed[worst] == count >= EARLY
        if hopeless or failed[worst] > max(self.settings.max_error_rate * total, EARLY - 1):
            raise _too_many(failed[worst], count, self.engine.runs[worst], self.settings.max_error_rate)

    # -- the end

    def finish(self, data: LoadedBenchmark, stores: Sequence[RunStore], stop: threading.Event) -> list[RunStore]:
        """Wait for the other processes, merge, and refuse a preset that changed nothing."""
        from vlmeff.evaluation.answering import check_effect

        wait_for_rows(data, stores, self.settings.rank_timeout, stop, self.shard)
        merged = [store.merge(data.doc_ids) for store in stores]
        baseline = next((r for run, r in zip(self.engine.runs, merged, strict=True) if run.kind == "baseline"), None)
        for run, rows in zip(self.engine.runs, merged, strict=True):
            check_effect(run, rows, baseline)
            failed = sum(row.error is not None for row in rows)
            if failed > self.settings.max_error_rate * len(rows):
                raise _too_many(failed, len(rows), run, self.settings.max_error_rate)
        return list(stores)


def _too_many(failed: int, count: int, run: Any, allowed: float) -> RunError:
    return RunError(
        f"E-RUN-03: {failed} of {count} documents failed in {run.name} (allowed: {allowed:.1%}). Look at 'error' in "
        "its samples.rank*.jsonl; the same command tries each once more, --max-error-rate raises the limit."
    )


def _task(index: int, doc_id: str, known: Sequence[dict[str, SampleRow]]) -> Task:
    """The runs that have no row of a document yet, or one that failed for the first time; who begins goes round."""
    order, attempts = [], {}
    for number, rows in enumerate(known):
        row = rows.get(doc_id)
        if row is None or (row.error is not None and row.attempt < ATTEMPTS):
            order.append(number)
            attempts[number] = 1 + (row.attempt if row else 0)
    turn = index % max(1, len(order))
    order = order[turn:] + order[:turn]
    return Task(index, tuple(order), tuple(attempts[n] for n in order))


class _ScoreSoFar:
    """The mean score of the baseline and of each preset over the documents that have one."""

    def __init__(self, runs: Sequence[Any], data: LoadedBenchmark, known: Sequence[Mapping[str, SampleRow]]) -> None:
        self._names = {n: run.name for n, run in enumerate(runs) if run.kind != "control"}
        self._key = data.benchmark.metric.per_document
        self._rows: dict[int, dict[str, float]] = {n: {} for n in self._names}
        documents = set(data.doc_ids)
        for number in self._names:
            for row in known[number].values():
                self._take(number, row) if row.doc_id in documents else None
        self._sums = {n: sum(scores.values()) for n, scores in self._rows.items()}

    def after(self, task: Task, rows: Sequence[SampleRow]) -> dict[str, float]:
        for number, row in zip(task.runs, rows, strict=True):
            if number in self._names:
                before = self._rows[number].get(row.doc_id, 0.0)
                self._take(number, row)
                self._sums[number] += self._rows[number].get(row.doc_id, 0.0) - before
        return {name: self._sums[n] / len(self._rows[n]) for n, name in self._names.items() if self._rows[n]}

    def _take(self, number: int, row: SampleRow) -> None:
        score = document_score(row, self._key)
        if score is not None:
            self._rows[number][row.doc_id] = score


def wait_for_rows(
    data: LoadedBenchmark, stores: Sequence[RunStore], timeout: float, stop: threading.Event, shard: Shard
) -> None:
    """Until every document has a row in every run, and every process that may still try one again has ended its share.

    Raises:
        RunError: E-RUN-02, time is up.  Interrupted.
    """
    end, pause = time.monotonic() + timeout, 0.05
    for store in stores:
        while awaited := _awaited(data, store, shard):
            if stop.is_set():
                raise Interrupted("interrupted while waiting for the other processes; run the same command again.")
            if time.monotonic() > end:
                raise RunError(
                    f"E-RUN-02: {store.path.name}: {len(awaited)} documents of other processes are missing after "
                    f"{timeout:.0f} s (for example {min(awaited)!r}). Run the command again to go on."
                )
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def _awaited(data: LoadedBenchmark, store: RunStore, shard: Shard) -> set[str]:
    """Documents without a row, and those that failed once and whose process has not ended its share in this launch.

    A process that has ended it has tried them again, or they failed in this launch and are left for the next one.
    """
    rows = store.rows()
    ended = store.ended_shares(shard.world, _launch()) | {shard.rank}
    out = set()
    for index, doc_id in enumerate(data.doc_ids):
        row = rows.get(doc_id)
        again = row is not None and row.error is not None and row.attempt < ATTEMPTS
        if row is None or (again and index % shard.world not in ended):
            out.add(doc_id)
    return out


def _launch() -> str:
    """The same for all processes that were started together, and another for those of the next start, where the
    starter says so."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    return hashlib.sha256("\0".join(os.environ.get(name, "") for name in names).encode()).hexdigest()[:16]


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C (once) ends after the current document; a second one at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
