"""``--engine ray``: the documents of an evaluation go to worker processes of a Ray cluster, their rows come back here.

One worker per GPU, or workers of one CPU each. A worker loads the model once and is asked one document (or batch) at a
time: a question of Ray costs about a millisecond and an answer far more, nobody waits at the end for another's share,
and a worker that dies takes one document with it; the documents of a batch are asked one by one afterwards. The files
are written by the process that the user started, so that no machine needs to see its folders; the model and the data
must be within reach of every machine.

Everything else (what is still to do, files, error budget, merging) is the ``Session`` of the local engine.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmeff.errors import ConfigError, DataError, MissingExtraError, RunError, VlmeffError
from vlmeff.evaluation.benchmarks import LoadedBenchmark
from vlmeff.evaluation.controls import RunSpec
from vlmeff.evaluation.loaded import Answered, LoadedModel, Task, batches
from vlmeff.evaluation.runner import Progress, Session, load_benchmark
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.settings import Settings, Shard
from vlmeff.evaluation.storage import RunStore

LOSSES = 3  # workers that one document, or loading, may cost
OBJECT_STORE = 80 * 2**20  # bytes; rows are small and Ray takes a third of the memory otherwise
POLL_SECONDS = 0.5  # between two looks at Ctrl-C
# For Ray on this machine alone; each is read while Ray is imported.
ALONE = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it would copy the whole working directory
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever the system, this is what binds it to 127.0.0.1
    "RAY_worker_niceness": "0",  # 15 unless told, and then the times measured are those of a starved process
}


def evaluate_on_ray(
    settings: Settings, *, workers: int | None = None, progress: Progress | None = None
) -> list[RunStore]:
    """``runner.evaluate`` with the documents answered by Ray workers; returns the finished runs.

    A cluster is used where ``RAY_ADDRESS`` names one, or where the caller has connected to one; else Ray is started on
    this machine, reachable from it alone, and ended afterwards.

    Args:
        workers: how many; one per GPU when left out, and one where there is no GPU.
    Raises:
        MissingExtraError: Ray is not installed.  ConfigError: more workers than the cluster has GPUs or CPUs.
        RunError: E-RUN-04, workers are lost while they load; and all that ``evaluate`` raises.
    """
    progress = progress or Progress()
    if Shard.of_environment().world > 1:
        raise ConfigError("--engine ray starts its own workers: run it without torchrun.")
    ray = _import_ray()
    loaded = [load_benchmark(settings, name) for name in settings.benchmarks]
    with _running(ray, workers):
        count, gpus = _how_many(ray, settings, workers)
        engine = Workers(ray, _for_workers(settings, gpus=gpus), count, {"num_cpus": 1, "num_gpus": int(gpus)})
        try:
            progress.say(f"loading {settings.model} in {count} {'worker' if count == 1 else 'workers'}")
            engine.load()
            return Session(settings, Shard(), progress, engine).run_all(loaded)
        finally:
            engine.close()


# -- in the worker's process


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error of vlmeff on its way home: by class and text, for some have constructors that pickle cannot call."""

    kind: type[VlmeffError]
    text: str

    def error(self) -> VlmeffError:
        return self.kind.__new__(self.kind, self.text)


class Worker:
    """What a Ray actor is made of: the model, loaded once, and the benchmarks that it was asked about."""

    def __init__(self, settings: Settings, number: int) -> None:
        self._settings, self._number = settings, number
        self._data: dict[str, LoadedBenchmark] = {}

    def describe(self) -> tuple[list[RunSpec], dict[str, Any]] | Refusal:
        """The runs without what cannot travel, and what the model and the environment are."""
        return _or_refusal(lambda: (_plain(self._model.runs), self._model.about))

    def answer(
        self, benchmark: str, doc_ids: Sequence[str], tasks: Sequence[Task], about: dict[str, Any]
    ) -> list[list[SampleRow]] | Refusal:
        """The rows of each document. ``about``: the model, environment and data that the other rows are of."""
        return _or_refusal(lambda: self._answer(benchmark, doc_ids, tasks, about))

    @cached_property
    def _model(self) -> LoadedModel:
        return LoadedModel.load(self._settings, Shard(self._number), lambda text: None)

    def _answer(
        self, benchmark: str, doc_ids: Sequence[str], tasks: Sequence[Task], about: dict[str, Any]
    ) -> list[list[SampleRow]]:
        known, mine = benchmark in self._data, self._model.about
        data = self._data[benchmark] = self._data.get(benchmark) or load_benchmark(self._settings, benchmark)
        theirs = [data.doc_ids[task.index] if task.index < len(data) else None for task in tasks]
        if data.data != about["data"] or theirs != list(doc_ids):
            raise DataError(f"E-DATA-04: a worker's machine has other data of {benchmark} ({data.data}).")
        if mine["model"] != about["model"]:
            raise RunError(f"E-RUN-04: a worker's machine has another {self._settings.model} ({mine['model']}).")
        if not known:
            self._model.warm_up(data, tasks[0].index)
        found = self._model.answer(data, tasks)
        # Times of another kind of machine are not to be compared with the rest.
        if mine["environment"] == about["environment"]:
            return found
        return [[dataclasses.replace(row, timing_valid=False) for row in rows] for rows in found]


def _or_refusal(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except VlmeffError as error:
        return Refusal(type(error), str(error))


def _plain(runs: Sequence[RunSpec]) -> list[RunSpec]:
    return [dataclasses.replace(run, plan=None, family=None, change=None) for run in runs]


# -- in the user's process


class Workers:
    """The engine: actors, the documents that they are at, and others in place of those that die."""

    worker = Worker

    def __init__(self, ray: Any, settings: Settings, count: int, resources: dict[str, int]) -> None:
        self.runs: Sequence[RunSpec] = []
        self.about: dict[str, Any] = {}
        self._ray, self._settings = ray, settings
        # Ray itself starts nothing again: which document a worker died of would be lost.
        self._kind = ray.remote(self.worker).options(max_restarts=0, max_task_retries=0, **resources)
        self._lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
        self._asked: dict[Any, tuple[int, list[Task] | None]] = {}  # by the reference to the answer; None: to load
        self._idle: list[int] = []
        self._loading_lost: Counter[int] = Counter()
        self._actors: dict[int, Any] = {}
        for number in range(count):
            self._start(number)

    def load(self) -> None:
        """Wait until every worker has the model."""
        while len(self._idle) < len(self._actors):
            self._ready()

    def answers(self, data: LoadedBenchmark, tasks: Sequence[Task], stop: threading.Event) -> Answered:
        waiting, lost = deque(batches(tasks, self._settings)), Counter[int]()
        about = {**self.about, "data": data.data}
        while (waiting and not stop.is_set()) or any(asked for _, asked in self._asked.values()):
            while waiting and self._idle and not stop.is_set():
                batch, number = waiting.popleft(), self._idle.pop()
                doc_ids = [data.doc_ids[task.index] for task in batch]
                self._asked[self._actors[number].answer.remote(data.benchmark.name, doc_ids, batch, about)] = (
                    number,
                    batch,
                )
            for number, batch, found, reason in self._ready():
                if found is not None:
                    yield from zip(batch, found, strict=True)
                    continue
                again = []
                for task in batch:
                    lost[task.index] += len(batch) == 1  # which of several it was is not known
                    if lost[task.index] < LOSSES:
                        again.append([task])
                        continue
                    reason = f"{LOSSES} workers were lost at it, the last: {reason}"
                    yield task, _given_up(data, task, number, reason)
                what = repr(data.doc_ids[batch[0].index]) + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
                warnings.warn(
                    f"worker {number} was lost at {what} ({reason}); another takes its place"
                    + (" and the document is asked again." if again else f": the {LOSSES}rd at this document."),
                    stacklevel=2,
                )
                waiting.extendleft(reversed(again))

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor, no_restart=True)

    def _start(self, number: int) -> None:
        self._actors[number] = self._kind.remote(self._settings, number)
        self._asked[self._actors[number].describe.remote()] = number, None

    def _ready(self) -> list[tuple[int, list[Task], list[list[SampleRow]] | None, str]]:
        """Wait a little for answers: (worker, tasks, rows of each, "") or, where the worker is lost, (.., None, why).

        Raises:
            VlmeffError: what the worker refused.  RunError: E-RUN-04.
        """
        out: list[tuple[int, list[Task], list[list[SampleRow]] | None, str]] = []
        for reference in self._ray.wait(list(self._asked), timeout=POLL_SECONDS)[0]:
            number, batch = self._asked.pop(reference)
            try:
                found = self._ray.get(reference)
            except self._lost as error:
                self._start(number)
                if batch is None:
                    self._loading_failed(number, _brief(error))
                else:
                    out.append((number, batch, None, _brief(error)))
                continue
            if isinstance(found, Refusal):
                raise found.error()
            self._idle.append(number)
            if batch is not None:
                out.append((number, batch, found, ""))
            else:
                self._loading_lost[number] = 0
                self.runs, self.about = (self.runs, self.about) if self.about else found
        return out

    def _loading_failed(self, number: int, reason: str) -> None:
        self._loading_lost[number] += 1
        if self._loading_lost[number] >= LOSSES:
            raise RunError(
                f"E-RUN-04: {LOSSES} workers were lost while they loaded {self._settings.model} ({reason}). Take fewer "
                "--workers, a smaller --dtype, or machines with more memory."
            )


def _given_up(data: LoadedBenchmark, task: Task, number: int, reason: str) -> list[SampleRow]:
    """A document that no worker survives counts as wrong, and towards the error budget."""
    from vlmeff.evaluation.answering import described
    from vlmeff.evaluation.metrics import failed

    sample = data[task.index]
    scores = failed(data.benchmark.metric, sample)["scores"]
    wrong = {**described(sample), "rank": number, "scores": scores, "unparsed": True, "timing_valid": False}
    return [SampleRow(**wrong, attempt=attempt, error=f"E-RUN-04: {reason}") for attempt in task.attempts]


def _brief(error: BaseException) -> str:
    """The cause, in Ray's message of many lines."""
    text = " ".join(str(error).split())
    return (text.partition("is dead because ")[2] or text).partition(". ")[0][:120].rstrip(".")


def _import_ray() -> Any:
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "evaluations with --engine ray") from error
    return ray


@contextmanager
def _running(ray: Any, workers: int | None) -> Iterator[None]:
    """Ray, connected: a connection that is there already is used and left, one that is made here is closed."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    alone = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
        "num_cpus": max(workers or 1, os.cpu_count() or 1),
    }
    try:
        ray.init(**quiet, **({} if os.environ.get("RAY_ADDRESS") else alone))
        yield
    finally:
        ray.shutdown()


def _how_many(ray: Any, settings: Settings, workers: int | None) -> tuple[int, bool]:
    """The number of workers and whether each has a GPU."""
    if settings.device is not None and settings.device.startswith("cuda:"):
        raise ConfigError(f"--device {settings.device}: Ray chooses the GPU of each worker; use --device cuda.")
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if settings.device is None or settings.device.startswith("cuda") else 0
    count = workers or gpus or 1
    most, kind = (gpus, "GPUs") if gpus else (int(there.get("CPU", 0)), "CPUs")
    if count > most:
        raise ConfigError(f"--workers {count}: the cluster has {most} {kind}, and each worker needs one.")
    return count, gpus > 0


def _for_workers(settings: Settings, *, gpus: bool) -> Settings:
    """Workers have another working directory, and see one GPU each."""
    model = Path(settings.model)
    return dataclasses.replace(
        settings,
        model=str(model.resolve()) if model.is_dir() else settings.model,
        data_root=settings.data_root and settings.data_root.resolve(),
        device="cuda" if gpus else settings.device,
    )
