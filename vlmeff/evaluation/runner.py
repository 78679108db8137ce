"""``vlmeff eval``: every document through every run, one process or many, killed and gone on from.

Documents are the outer loop and runs the inner one, which take turns in another order for each document: clocks,
caches and the machine's other work drift alike for all of them, and a run that is cut short is cut at the same
document as the others.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from vlmeff import zoo
from vlmeff.errors import BadImageError, ConfigError, RunError, UnknownNameError
from vlmeff.evaluation.benchmarks import LoadedBenchmark, check_limit, get
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.storage import RowWriter, RunStore, fingerprint
from vlmeff.pictures import MAX_PIXELS

CONTROLS = ("random", "downsample", "blank")
ATTEMPTS = 2  # of a document that fails: the second one when the command is run again
EARLY = 3  # documents after which a run without effect is refused


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``vlmeff eval`` was asked for. ``limit``: groups (int) or a share of them (float).

    ``perf``: "accuracy" measures no times, "latency" takes the first 32 documents only, "both" times all of them.
    ``max_error_rate``: share of documents that may fail. ``rank_timeout``: seconds that rank 0 waits for the others.
    """

    model: str
    output: Path
    presets: tuple[str, ...] = ("fast",)
    benchmarks: tuple[str, ...] = ("easy_vqa",)
    controls: tuple[str, ...] = ("random", "downsample", "blank")
    baseline: bool = True
    revision: str | None = None
    data_root: Path | None = None
    source: str | None = None
    limit: int | float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    max_new_tokens: int | None = None
    perf: Literal["accuracy", "latency", "both"] = "both"
    warmup: int = 1
    resume: bool = True
    offline: bool = False
    skip_bad_images: bool = False
    max_error_rate: float = 0.01
    rank_timeout: float = 86_400.0
    max_image_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if not self.benchmarks:
            raise ConfigError("eval: --benchmarks names none; vlmeff eval --list shows them.")
        if self.warmup < 0:
            raise ConfigError(f"E-USE-02: warmup={self.warmup} must be 0 or more.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {self.dtype!r} must be auto, float32, bfloat16 or float16.")
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"--output {str(self.output)!r} is a file; name a folder.")
        if self.data_root is not None and not self.data_root.is_dir():
            raise ConfigError(f"--data-root {str(self.data_root)!r} is no folder.")
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise UnknownNameError("control", unknown[0], CONTROLS, code="E-USE-01")
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"max_error_rate={self.max_error_rate} must be a share, 0 to 1.")


@dataclass(frozen=True)
class Shard:
    """Which documents are this process's: those with index % world == rank."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Shard:
        """As torchrun sets it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class Interrupted(RunError):
    """The user stopped the run; what is finished is kept."""

    exit_code = 130


@dataclass(eq=False)
class Progress:
    """What the runner tells while it works; the command line draws it."""

    begin: Callable[[str, int, int], None] = field(default=lambda benchmark, done, total: None)
    step: Callable[[str, list[SampleRow]], None] = field(default=lambda benchmark, rows: None)
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
        limit = 32
    return get(name, settings.data_root).load(
        data_root=settings.data_root,
        source=settings.source,
        offline=settings.offline,
        limit=limit,
        max_image_pixels=settings.max_image_pixels,
    )


@dataclass(frozen=True)
class Task:
    """A document by its index, and the runs, by number and in their order, that answer it for the n-th time."""

    index: int
    runs: tuple[int, ...]
    attempts: tuple[int, ...]


Answered = Iterator[tuple[Task, list[SampleRow]]]


class Engine(Protocol):
    """What answers documents: a model in this process, or processes of its own. ``about``: model and environment."""

    runs: Sequence[Any]
    about: dict[str, Any]

    def answers(self, data: LoadedBenchmark, tasks: Sequence[Task], stop: threading.Event) -> Answered:
        """Each task with a row for each of its runs, in any order; once ``stop`` is set, what has begun already."""
        ...


@dataclass(eq=False)
class LoadedModel:
    """The engine of one process: a model with its runs."""

    settings: Settings
    answerer: Any
    runs: Sequence[Any]
    about: dict[str, Any]
    say: Callable[[str], None]

    @classmethod
    def load(cls, settings: Settings, shard: Shard, say: Callable[[str], None]) -> LoadedModel:
        import torch

        from vlmeff.evaluation.answering import Answerer
        from vlmeff.evaluation.controls import make_runs
        from vlmeff.evaluation.identity import describe_model, environment
        from vlmeff.loading import load

        device = settings.device
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if shard.world > 1:
            if device in (None, "cuda") and torch.cuda.is_available():
                device = f"cuda:{local}"
            else:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        say(f"loading {settings.model}")
        options = {} if settings.attention is None else {"attn_implementation": settings.attention}
        model, processor = load(
            settings.model, revision=settings.revision, dtype=settings.dtype, device=device, **options
        )
        runs = make_runs(model, settings.presets, settings.controls, baseline=settings.baseline, seed=settings.seed)
        answerer = Answerer(
            model, processor, settings.max_new_tokens, timed=settings.perf != "accuracy", rank=shard.rank
        )
        about = {"model": describe_model(settings.model, model), "environment": environment(model)}
        return cls(settings, answerer, runs, about, say)

    def answers(self, data: LoadedBenchmark, tasks: Sequence[Task], stop: threading.Event) -> Answered:
        self.warm_up(data, tasks[0].index)
        for task in tasks:
            yield task, self.answer(data, task)
            if stop.is_set():
                return

    def answer(self, data: LoadedBenchmark, task: Task) -> list[SampleRow]:
        sample = data[task.index]
        try:
            return self.answerer.answer(data.benchmark, sample, [self.runs[n] for n in task.runs], task.attempts)
        except BadImageError as error:
            if not self.settings.skip_bad_images:
                raise
            return [self.answerer.failed(data.benchmark, sample, str(error), n) for n in task.attempts]

    def warm_up(self, data: LoadedBenchmark, index: int) -> None:
        """What is set up once (kernels, thread pools, allocator) must not be paid for by the first document."""
        everything = Task(index, tuple(range(len(self.runs))), (1,) * len(self.runs))
        for _ in range(self.settings.warmup if self.answerer.timed else 0):
            self.say("warming up")
            self.answer(data, everything)


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
                RunStore.at(*args).move_away()
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
            "generation": {"max_new_tokens": self.settings.max_new_tokens or benchmark.max_new_tokens, "greedy": True},
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
            "perf": {"mode": self.settings.perf},
            "environment": about["environment"],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint(identity),
        }

    # -- work

    def run(self, data: LoadedBenchmark, stores: Sequence[RunStore], stop: threading.Event) -> None:
        """Answer what is not there yet of this process's documents."""
        known = [store.rows() for store in stores]
        mine = [i for i in range(len(data)) if i % self.shard.world == self.shard.rank]
        tasks = [task for i in mine if (task := _task(i, data.doc_ids[i], known)).runs]
        self.progress.begin(data.benchmark.name, len(mine) - len(tasks), len(mine))
        if not tasks:
            return
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
                self.progress.step(data.benchmark.name, rows)
                if count == min(EARLY, len(tasks)):
                    self._check_early(first)
                self._check_errors(failed, count, len(mine))
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

        wait_for_rows(data, stores, self.settings.rank_timeout, stop)
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


def wait_for_rows(data: LoadedBenchmark, stores: Sequence[RunStore], timeout: float, stop: threading.Event) -> None:
    """Until every document has a row in every run; raises ``RunError`` (E-RUN-02) when time is up."""
    end, pause = time.monotonic() + timeout, 0.05
    for store in stores:
        while missing := set(data.doc_ids) - store.rows().keys():
            if stop.is_set():
                raise Interrupted("interrupted while waiting for the other processes; run the same command again.")
            if time.monotonic() > end:
                raise RunError(
                    f"E-RUN-02: {store.path.name}: {len(missing)} documents of other processes are missing after "
                    f"{timeout:.0f} s (for example {min(missing)!r}). Run the command again to go on."
                )
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


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
