"""``vlmeff doctor``: what is installed here, what works, and which back ends would run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vlmeff.doctor import Diagnosis

out = Console()


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Show versions, devices and the back end that each operation would take; exit 1 if something is broken."""
    from vlmeff.doctor import diagnose

    found = diagnose()
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    about = Table(show_header=False, show_edge=False)
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    about.add_row("vlmeff", found.vlmeff)
    about.add_row("python", f"{found.python}, {found.system}")
    for package in found.packages:
        text = package.version or "not installed"
        if package.name == "torch" and package.version:
            text += f", built for CUDA {found.torch_cuda}" if found.torch_cuda else ", built without CUDA"
        if package.name == "torchvision" and found.torchvision_matches is not None:
            text += ", fits torch" if found.torchvision_matches else ", does not fit torch"
        about.add_row(package.name, text if package.fits else f"{text} (wanted: {package.wanted})")
    for extra in found.extras:
        about.add_row(escape(f"vlmeff[{extra.name}]"), f"lacks {', '.join(extra.lacks)}" if extra.lacks else "complete")
    for number, device in enumerate(found.devices):
        about.add_row(f"cuda:{number}", f"{device.name}, capability {device.capability}, {device.memory_gib:g} GiB")
    if not found.devices:
        about.add_row("devices", "cpu")
    about.add_row("driver", found.driver or "none")
    about.add_row("nvcc", found.nvcc or "none")
    about.add_row("CUDA library", found.cuda_library or "not built (python -m vlmeff_kernels.build)")
    for name, value in found.environment.items():
        about.add_row(name, escape(value) if value is not None else "not set")
    out.print(about)

    ops = Table(title=f"operations, a typical call on {found.ops_on}", title_justify="left", show_edge=False)
    for column in ("op", "back ends", "runs on", "why"):
        ops.add_column(column, overflow="fold", no_wrap=column == "op")
    for choice in found.ops:
        # Where all were passed over for one reason, that is the reason already given.
        others = {name: why for name, why in choice.passed_over.items() if why != choice.why}
        why = "; ".join([choice.why, *(f"{name}: {reason}" for name, reason in others.items())])
        back_ends = ", ".join((*choice.back_ends, "reference"))
        ops.add_row(choice.op, back_ends, choice.chosen or "[red]raises[/]", escape(why))
    if found.ops:
        out.print(ops)
    if found.accepted:
        table = Table(title="accepted by measurement", title_justify="left", show_edge=False)
        for column in ("op", "backend", "capability", "bucket"):
            table.add_column(column, overflow="fold")
        for row in found.accepted:
            table.add_row(*(escape(row.get(column, "")) for column in ("op", "backend", "capability", "bucket")))
        out.print(table)
    for note in found.notes:
        out.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for problem in found.problems:
        out.print(f"[bold red]problem:[/] {escape(problem.what)}", highlight=False, soft_wrap=True)
        out.print(f"  remedy: {problem.remedy}", highlight=False, markup=False, soft_wrap=True)
