"""``vlmeff eval lmms``: tasks of lmms-eval with and without presets, compared document by document."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlmeff import __version__
from vlmeff.errors import (
    ConfigError,
    DataError,
    EnvironmentMismatchError,
    MissingExtraError,
    RunError,
    UnknownNameError,
)

TESTED = ">=0.7.3,<0.8"
BASELINE = "baseline"
LAYOUTS = (
    "a folder written by datasets' save_to_disk, or a folder of the split ('test') with metadata.jsonl and the pictures"
)

out = Console()
err = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every run of one comparison has in common."""

    model: str
    tasks: tuple[str, ...]
    output: Path
    include: Path | None = None
    revision: str | None = None
    limit: int | None = None
    processes: int = 1
    device: str | None = None
    dtype: str = "auto"
    force_simple: bool = False
    offline: bool = False


def lmms_command(
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval, separated by commas; no groups.")],
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "fast",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with a folder for each task: " + LAYOUTS)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    output: Annotated[Path, typer.Option(help="Where samples and the comparison are written.")] = Path("vlmeff-lmms"),
    processes: Annotated[int, typer.Option(min=1, help="Started by torchrun; one per GPU.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when there is no GPU.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    force_simple: Annotated[bool, typer.Option(help="lmms-eval's simple mode instead of its chat mode.")] = False,
    offline: Annotated[bool, typer.Option(help="Use no network, only what is there.")] = False,
    margin: Annotated[float, typer.Option(min=0, help="Loss in points that is accepted as none.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of every interval.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run tasks of lmms-eval on the model as it is and with presets, and compare the answers pair by pair."""
    from vlmeff.integrations import lmms_pairs

    check_installed()
    names = _names(tasks)
    wanted = _names(presets)
    if not names or not wanted:
        raise ConfigError("eval lmms: --tasks and --presets need a name each.")
    output = output.absolute()
    include, run_names = (None, names) if data_root is None else write_local_tasks(names, data_root, output / "tasks")
    request = Request(
        model=model,
        tasks=run_names,
        output=output,
        include=include,
        revision=revision,
        limit=limit,
        processes=processes,
        device=device,
        dtype=dtype,
        force_simple=force_simple,
        offline=offline,
    )
    files = {name: run(request, name) for name in (BASELINE, *wanted)}
    rows = []
    for task in run_names:
        before = lmms_pairs.read_samples(files[BASELINE][task])
        for name in wanted:
            after = lmms_pairs.read_samples(files[name][task])
            found = lmms_pairs.compare(task, name, before, after, margin=margin, seed=seed)
            if not found:
                err.print(f"{task}: lmms-eval logs no score of single documents; it cannot be compared in pairs.")
            rows += found
    rows = lmms_pairs.adjust(rows)
    report = {
        "schema": "vlmeff.lmms/1",
        "model": model,
        "limit": limit,
        "rows": [row.to_dict() for row in rows],
        "throughput_of_rank_0": {name: _throughput(next(iter(found.values()))) for name, found in files.items()},
    }
    (output / "comparison.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps({"comparison": (output / "comparison.json").as_posix(), **report}))
        return
    _show(rows)
    err.print(f"[dim]{(output / 'comparison.json').as_posix()}[/]", highlight=False)


def check_installed() -> None:
    """Raise unless lmms-eval is there in a tested version and knows the model ``vlmeff``."""
    try:
        version = metadata.version("lmms_eval")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("lmms-eval", "lmms", "tasks of lmms-eval") from error
    from packaging.specifiers import SpecifierSet

    if version not in SpecifierSet(TESTED):
        raise EnvironmentMismatchError(
            f'E-ENV-02: lmms-eval {version} is outside the tested range {TESTED}: pip install "lmms-eval{TESTED}"'
        )
    if "vlmeff" not in {point.name for point in metadata.entry_points(group="lmms_eval.models")}:
        raise EnvironmentMismatchError(
            'lmms-eval does not see vlmeff: its entry point is not installed. pip install "vlmeff[lmms]"'
        )


def command(request: Request, name: str) -> list[str]:
    """The command of one run; ``name`` is a preset or "baseline".

    Raises:
        ConfigError: a name has a comma or quotes, which lmms-eval's parser splits at.
    """
    arguments = {
        "pretrained": request.model,
        "preset": "none" if name == BASELINE else name,
        "dtype": request.dtype,
        **({} if request.revision is None else {"revision": request.revision}),
        # Part of the key of lmms-eval's response cache, which does not see our version otherwise.
        "vlmeff_rev": __version__,
    }
    for key, value in arguments.items():
        if re.search(r"[,'\"\[\]{}]", value):
            raise ConfigError(f"eval lmms: {key}={value!r}: lmms-eval cannot take commas, quotes and brackets in it.")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.processes}"]
    options = {
        "--model": "vlmeff",
        "--model_args": ",".join(f"{key}={value}" for key, value in arguments.items()),
        "--tasks": ",".join(request.tasks),
        "--output_path": str(request.output / name),
        "--include_path": None if request.include is None else str(request.include),
        "--limit": None if request.limit is None else str(request.limit),
        "--device": request.device,
    }
    given = [part for key, value in options.items() if value is not None for part in (key, value)]
    return [
        sys.executable,
        *(launcher if request.processes > 1 else []),
        "-m",
        "lmms_eval",
        *given,
        "--log_samples",
        *(["--force_simple"] if request.force_simple else []),
    ]


def run(request: Request, name: str) -> dict[str, Path]:
    """Run lmms-eval and return the sample file of each task.

    Raises:
        RunError: it ended without one. (lmms-eval prints errors and exits with 0, so the files are what counts.)
    """
    folder = request.output / name
    before = set(folder.rglob("*.jsonl"))
    environment = dict(os.environ)
    if request.offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    err.print(f"[dim]lmms-eval, {name}[/]", highlight=False)
    # What lmms-eval prints goes to stderr, so that stdout is ours alone.
    ended = subprocess.run(command(request, name), env=environment, stdout=sys.stderr.fileno(), check=False)
    files = {}
    for task in request.tasks:
        new = sorted(set(folder.rglob(f"*_samples_{task}.jsonl")) - before)
        if not new:
            raise RunError(
                f"eval lmms: lmms-eval wrote no samples of task {task!r} for {name} (it ended with "
                f"{ended.returncode}). Its messages stand above."
            )
        files[task] = new[-1]
    return files


def write_local_tasks(tasks: Sequence[str], data_root: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Tasks that read ``data_root/<task>`` instead of the hub: (folder for --include_path, names of the tasks).

    Raises:
        UnknownNameError: lmms-eval has no such task.  DataError: E-DATA-02, there is no data in a known layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task in tasks:
        data = (data_root / task).absolute()
        if (data / "dataset_dict.json").is_file():
            where: dict[str, Any] = {"dataset_path": str(data), "dataset_kwargs": {"load_from_disk": True}}
        elif any(data.glob("*/metadata.jsonl")) or any(data.glob("*/metadata.csv")):
            where = {"dataset_path": "imagefolder", "dataset_kwargs": {"data_dir": str(data)}}
        else:
            raise DataError(f"E-DATA-02: {data} holds no data of task {task!r}. Put there {LAYOUTS}.")
        name = f"{task}_local"
        config = {"include": str(builtin_yaml(task)), "task": name, "dataset_name": None, **where}
        # JSON is YAML, and quotes whatever has to be.
        (folder / f"{name}.yaml").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        names.append(name)
    return folder, tuple(names)


def builtin_yaml(task: str) -> Path:
    """The file that defines a task of the installed lmms-eval.

    Raises:
        UnknownNameError: no task has this name; groups are none.
    """
    found = util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("lmms-eval", "lmms", "tasks of lmms-eval")
    defines = re.compile(r"^task\s*:\s*[\"']?([\w\-.]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)
    known: dict[str, Path] = {}
    for file in sorted(Path(next(iter(found.submodule_search_locations)), "tasks").rglob("*.yaml")):
        for name in defines.findall(file.read_text(encoding="utf-8", errors="replace")):
            known.setdefault(name, file)
    if task not in known:
        near = [name for name in known if task in name] or list(known)[:20]
        raise UnknownNameError("task of lmms-eval (groups are none)", task, near[:20], code="E-USE-01")
    return known[task]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _throughput(samples: Path) -> Any:
    """lmms-eval's summary of the run that wrote ``samples``, of its rank 0."""
    stamp = samples.name.partition("_samples_")[0]
    results = samples.with_name(f"{stamp}_results.json")
    return json.loads(results.read_text(encoding="utf-8")).get("throughput") if results.is_file() else None


def _show(rows: Sequence[Any]) -> None:
    table = Table(show_edge=False)
    for column in ("task", "preset", "metric", "n", "baseline", "score", "difference (95 %)", "verdict", "same answer"):
        table.add_column(column)
    for row in rows:
        interval = "" if row.ci95 is None else f" ({100 * row.ci95[0]:+.1f} to {100 * row.ci95[1]:+.1f})"
        cells = (f"{100 * row.baseline:.1f}", f"{100 * row.value:.1f}", f"{100 * row.delta:+.1f}{interval}")
        table.add_row(
            row.task, row.candidate, row.metric, str(row.n), *cells, row.verdict, f"{100 * row.agreement:.0f} %"
        )
    out.print(table)
