"""The engine of one process: a loaded model that answers documents, one by one or in batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vlmeff.errors import BadImageError
from vlmeff.evaluation.benchmarks import LoadedBenchmark
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.settings import TIMED, Settings, Shard


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
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=device,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=settings.offline,
            **options,
        )
        runs = make_runs(model, settings.presets, settings.controls, baseline=settings.baseline, seed=settings.seed)
        answerer = Answerer(
            model,
            processor,
            settings.max_new_tokens,
            timed=settings.perf != "accuracy",
            rank=shard.rank,
            repeats=settings.repeats,
            fixed_output=settings.fixed_output,
        )
        about = {"model": describe_model(settings.model, model), "environment": environment(model)}
        return cls(settings, answerer, runs, about, say)

    def answers(self, data: LoadedBenchmark, tasks: Sequence[Task], stop: threading.Event) -> Answered:
        self.warm_up(data, tasks[0].index)
        for batch in batches(tasks, self.settings):
            yield from zip(batch, self.answer(data, batch), strict=True)
            if stop.is_set():
                return

    def answer(self, data: LoadedBenchmark, tasks: Sequence[Task]) -> list[list[SampleRow]]:
        """The rows of each task. Several tasks, all of the same runs, are answered in one batch if they can be."""
        if len(tasks) == 1:
            return [self._answer_one(data, tasks[0])]
        runs = tasks[0].runs
        try:
            found = self.answerer.answer_together(
                data.benchmark,
                [data[task.index] for task in tasks],
                [self.runs[n] for n in runs],
                [[task.attempts[task.runs.index(n)] for n in runs] for task in tasks],
            )
        except Exception as error:
            # Which document it is of, and whether it is one of batches alone, shows when each is asked on its own.
            self.say(f"a batch of {len(tasks)} documents is answered one by one: {type(error).__name__}: {error}"[:300])
            return [self._answer_one(data, task) for task in tasks]
        return [[rows[runs.index(n)] for n in task.runs] for task, rows in zip(tasks, found, strict=True)]

    def _answer_one(self, data: LoadedBenchmark, task: Task, *, repeats: int | None = None) -> list[SampleRow]:
        sample, settings = data[task.index], self.settings
        try:
            return self.answerer.answer(
                data.benchmark,
                sample,
                [self.runs[n] for n in task.runs],
                task.attempts,
                timed=settings.batch_size == 1 or task.index < TIMED,
                repeats=repeats,
            )
        except BadImageError as error:
            if not settings.skip_bad_images:
                raise BadImageError(
                    f"{error} --skip-bad-images counts such documents as failures, --max-image-pixels sets the limit "
                    f"({settings.max_image_pixels})."
                ) from error
            return [self.answerer.failed(data.benchmark, sample, str(error), n) for n in task.attempts]

    def warm_up(self, data: LoadedBenchmark, index: int) -> None:
        """What is set up once (kernels, thread pools, allocator) must not be paid for by the first document."""
        everything = Task(index, tuple(range(len(self.runs))), (1,) * len(self.runs))
        for _ in range(self.settings.warmup if self.answerer.timed else 0):
            self.say("warming up")
            self._answer_one(data, everything, repeats=1)


def batches(tasks: Sequence[Task], settings: Settings) -> Iterator[list[Task]]:
    """Tasks that are answered together: those of the same runs, at their first attempt and not timed."""
    waiting: dict[tuple[int, ...], list[Task]] = {}
    for task in tasks:
        timed = settings.perf != "accuracy" and task.index < TIMED
        if settings.batch_size == 1 or timed or set(task.attempts) != {1}:
            yield [task]
            continue
        of_runs = waiting.setdefault(tuple(sorted(task.runs)), [])
        of_runs.append(task)
        if len(of_runs) == settings.batch_size:
            yield waiting.pop(tuple(sorted(task.runs)))
    yield from waiting.values()
