"""``vlmeff eval``: what a preset costs in accuracy and what it saves, with statistics."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vlmeff.errors import ConfigError
from vlmeff.integrations.lmms_command import lmms_command

eval_app = typer.Typer(
    invoke_without_command=True, help="Prove on VQA benchmarks what a preset costs in accuracy and what it saves."
)
out = Console()
err = Console(stderr=True)

REGRESSION = 5  # exit code
QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


@eval_app.callback()
def evaluate_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
    presets: Annotated[str, typer.Option(help="Presets, separated by commas; none for the baseline alone.")] = "fast",
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="Run the unwrapped model too.")] = True,
    benchmarks: Annotated[str, typer.Option(help="Benchmarks, separated by commas (--list).")] = "easy_vqa",
    data_root: Annotated[Path | None, typer.Option(help="Folder with a folder for each benchmark.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Take the data from here alone: folder, package, generated, hf-disk, hf.")
    ] = None,
    limit: Annotated[str | None, typer.Option(help="So many groups of each benchmark, or a share such as 0.1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random control and of every interval.")] = 0,
    controls: Annotated[
        str, typer.Option(help="Controls at the preset's budget: random, downsample, blank; or none.")
    ] = "random,downsample,blank",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of every answer; the benchmark's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents in one padded call; more than 1 takes no times.")] = 1,
    perf: Annotated[str, typer.Option(help="accuracy (no times), latency (32 documents) or both.")] = "both",
    repeats: Annotated[int, typer.Option(help="Times that each document is timed; the median counts.")] = 1,
    fixed_output: Annotated[
        int | None, typer.Option(help="Generate so many tokens for every answer, so that times compare.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured answers before the first document.")] = 1,
    output: Annotated[Path, typer.Option(help="Where runs and reports are written.")] = Path("vlmeff-eval"),
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with what is there.")] = True,
    margin: Annotated[float, typer.Option(help="Loss in points that is accepted as none.")] = 1.0,
    fail_on_regression: Annotated[bool, typer.Option(help="Exit with 5 when a preset is inferior.")] = False,
    engine: Annotated[str, typer.Option(help="local (also under torchrun) or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Of --engine ray; one per GPU, else one.")] = None,
    offline: Annotated[bool, typer.Option(help="Use no network, only what is there.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model (data sets: never).")
    ] = False,
    max_image_pixels: Annotated[int, typer.Option(help="A picture with more is an error, before it is decoded.")] = (
        50_000_000
    ),
    skip_bad_images: Annotated[bool, typer.Option(help="Count broken pictures as failures and go on.")] = False,
    max_error_rate: Annotated[float, typer.Option(help="Share of documents that may fail.")] = 0.01,
    rank_timeout: Annotated[float, typer.Option(help="Seconds that rank 0 waits for the others.")] = 86_400.0,
    show_list: Annotated[bool, typer.Option("--list", help="List the benchmarks and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare presets with the unwrapped model and with controls at the same number of tokens."""
    if context.invoked_subcommand is not None:
        return
    if show_list:
        _list(data_root, as_json=as_json)
        return
    if perf not in ("accuracy", "latency", "both"):
        raise ConfigError(f"--perf {perf!r} must be accuracy, latency or both.")
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine {engine!r} must be local or ray.")
    if not 0 <= margin < float("inf"):  # also false for NaN
        raise ConfigError(f"E-USE-02: --margin {margin:g} must be 0 or more points.")
    if fail_on_regression and not (baseline and _names(presets)):
        raise ConfigError("--fail-on-regression needs a baseline and a preset to compare.")
    if workers is not None and engine != "ray":
        raise ConfigError("--workers is about --engine ray; under torchrun say --nproc-per-node.")
    from vlmeff.evaluation.benchmarks import parse_limit
    from vlmeff.evaluation.runner import Progress, Settings, Shard, evaluate

    settings = Settings(
        model=model,
        revision=revision,
        output=output,
        presets=_names(presets),
        benchmarks=_names(benchmarks),
        controls=_names(controls),
        baseline=baseline,
        data_root=data_root,
        source=source,
        limit=None if limit is None else parse_limit(limit),
        seed=seed,
        dtype=dtype,
        device=device,
        attention=attention,
        max_new_tokens=max_new_tokens,
        perf=perf,  # type: ignore[arg-type]
        warmup=warmup,
        resume=resume,
        offline=offline,
        skip_bad_images=skip_bad_images,
        max_error_rate=max_error_rate,
        rank_timeout=rank_timeout,
        max_image_pixels=max_image_pixels,
        batch_size=batch_size,
        repeats=repeats,
        fixed_output=fixed_output,
        trust_remote_code=trust_remote_code,
    )
    shard = Shard.of_environment()
    shown = _Shown(quiet=shard.rank > 0)
    progress = Progress(begin=shown.begin, step=shown.step, say=shown.say, scored=shown.scored)
    with shown:
        if engine == "ray":
            from vlmeff.evaluation.ray_engine import evaluate_on_ray

            stores = evaluate_on_ray(settings, workers=workers, progress=progress)
        else:
            stores = evaluate(settings, shard=shard, progress=progress)
    if shard.rank > 0:
        return
    pictures = {name: _Pictures(settings, name) for name in settings.benchmarks}
    about = [store.about["fingerprint"] for store in stores]
    results, where = _report(output, model, margin=margin, seed=seed, pictures=pictures, fingerprints=about)
    _show(results, where, as_json=as_json, of_this_command=about)
    if fail_on_regression and results.regressions:
        err.print(f"inferior to the baseline: {', '.join(c.label for c in results.regressions)} (--fail-on-regression)")
        raise typer.Exit(REGRESSION)


@eval_app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of vlmeff eval.")],
    margin: Annotated[float, typer.Option(help="Loss in points that is accepted as none.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of every interval.")] = 0,
    allow_partial_join: Annotated[bool, typer.Option(help="Compare runs on the documents that they share.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write the tables, plots and statistics again from the rows alone; no model and no torch is needed."""
    if as_json and len(folders) > 1:
        raise ConfigError("eval report: --json is of one folder; run it for each.")
    for folder in folders:
        results, where = _report(folder, None, margin=margin, seed=seed, allow_partial_join=allow_partial_join)
        _show(results, where, as_json=as_json)


@eval_app.command("verify")
def verify_command(
    zoo_entry: Annotated[str, typer.Option(help="An entry of the model zoo, such as tiny-llava/fast.")],
    output: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("vlmeff-verify"),
    data_root: Annotated[Path | None, typer.Option(help="Folder with a folder for each benchmark.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    offline: Annotated[bool, typer.Option(help="Use no network, only what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run the benchmarks of a zoo entry again and compare with what it expects; 5 is returned when they differ."""
    import dataclasses

    from vlmeff.evaluation import terminal
    from vlmeff.evaluation.runner import Progress
    from vlmeff.evaluation.verifying import verify_entry

    with _Shown(quiet=False) as shown:
        progress = Progress(begin=shown.begin, step=shown.step, say=shown.say, scored=shown.scored)
        checks = verify_entry(
            zoo_entry,
            output,
            progress=progress,
            change=lambda s: dataclasses.replace(s, data_root=data_root, device=device, offline=offline),
        )
    if as_json:
        told = [{**dataclasses.asdict(check), "holds": check.holds} for check in checks]
        print(json.dumps({"zoo_entry": zoo_entry, "checks": told}))
    else:
        out.print(terminal.checks_table(checks))
    if not all(check.holds for check in checks):
        raise typer.Exit(REGRESSION)


@eval_app.command("import-tsv")
def import_tsv_command(
    file: Annotated[Path, typer.Argument(help="A TSV of VLMEvalKit, with pictures in base64.")],
    benchmark: Annotated[str, typer.Option(help="The benchmark that it holds.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The data root to put its folder into.")],
    metric: Annotated[str | None, typer.Option(help="Of a benchmark of your own; guessed from its answers.")] = None,
) -> None:
    """Turn a TSV of VLMEvalKit into the folder that --data-root takes."""
    from vlmeff.evaluation.import_tsv import import_tsv

    made = import_tsv(file, benchmark, out_folder, metric=metric)
    out.print(Text(str(made)), soft_wrap=True)


@eval_app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of results.json."""
    from vlmeff.evaluation.results_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


eval_app.command("lmms")(lmms_command)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else tuple(dict.fromkeys(names))


def _list(data_root: Path | None, *, as_json: bool) -> None:
    from vlmeff.evaluation.terminal import listing

    table, found = listing(data_root)
    if as_json:
        print(json.dumps(found))
    else:
        out.print(table)
    for error in found["broken"].values():
        err.print(Text(error), soft_wrap=True)


def _report(folder: Path, model: str | None, **options: Any) -> tuple[Any, Path]:
    """The results and their folder: ``folder`` itself while it holds one model, else that of the model in it."""
    from vlmeff.evaluation.results import build_report
    from vlmeff.evaluation.storage import slug

    if model is not None and len({path.parents[2] for path in folder.glob("*/*/*/run.json")}) > 1:
        folder = folder / slug(Path(model).name if Path(model).is_dir() else model)
    return build_report(folder, **options), folder


def _show(results: Any, folder: Path, *, as_json: bool, of_this_command: Collection[str] | None = None) -> None:
    """``of_this_command``: fingerprints of the runs of an evaluation; the report may be of others as well."""
    from vlmeff.evaluation import terminal

    before = [] if of_this_command is None else [r for r in results.runs if r.fingerprint not in of_this_command]
    if before:
        named = ", ".join(f"{run.benchmark}: {run.label} ({run.created[:10]})" for run in before)
        text = f"the report is also of runs of earlier commands in {folder.as_posix()}: {named}"
        err.print(Text(f"{text}; another --output keeps them apart.", style="dim"))
    if as_json:
        headline = terminal.headline(results)
        for row, run in zip(headline, results.runs, strict=True):
            row["earlier"] = run in before
        print(json.dumps({"results": (folder / "results.json").as_posix(), "headline": headline}))
        return
    for benchmark in results.benchmarks:
        out.print(terminal.benchmark_table(results, benchmark))
        if (beside := terminal.controls_table(results, benchmark)) is not None:
            out.print(beside)
    where = folder.as_posix()
    err.print(Text(f"{where}: results.md, results.json, frontier.png, regressions.html", style="dim"))


class _Pictures:
    """The pictures of a benchmark's documents, for the page of regressions; its data are opened once more when first
    asked."""

    def __init__(self, settings: Any, benchmark: str) -> None:
        self._settings, self._benchmark = settings, benchmark
        self._data: Any = None
        self._places: dict[str, int] = {}

    def __call__(self, doc_id: str) -> Any:
        if self._data is None:
            from vlmeff.evaluation.runner import load_benchmark

            self._data = load_benchmark(self._settings, self._benchmark)
            self._places = {doc: i for i, doc in enumerate(self._data.doc_ids)}
        images = self._data[self._places[doc_id]].images
        return images[0]() if images else None


class _Shown:
    """Progress on stderr: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = 0
        self._last = 0.0
        self._scores = ""

    def __enter__(self) -> _Shown:
        if not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=err)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            err.print(Text(text, style="dim"))

    def begin(self, benchmark: str, done: int, total: int) -> None:
        self._done, self._total, self._scores = done, total, ""
        self._last = time.monotonic()
        if done:
            self.say(f"{benchmark}: {done} of {total} documents are there already")
        if self._bar is not None:
            self._task = self._bar.add_task(benchmark, total=total, completed=done)

    def scored(self, benchmark: str, so_far: Mapping[str, float]) -> None:
        self._scores = ", ".join(f"{name} {100 * score:.1f}" for name, score in so_far.items())

    def step(self, benchmark: str, rows: list[Any]) -> None:
        self._done += 1
        kept = [row.visual_tokens_kept / row.visual_tokens_in for row in rows if row.visual_tokens_in]
        label = f"{benchmark}, tokens kept {min(kept):.0%}" if kept else benchmark
        label += f", score so far: {self._scores}" if self._scores else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=label)
        elif time.monotonic() - self._last > QUIET_SECONDS and not self.quiet:
            self._last = time.monotonic()
            err.print(Text(f"{label}: {self._done} of {self._total} documents"), soft_wrap=True)
