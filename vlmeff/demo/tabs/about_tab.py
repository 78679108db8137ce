"""The tab **About**: what runs here, under which licence, and where measured figures come from."""

from __future__ import annotations

import importlib.metadata

import gradio as gr

from vlmeff import __version__, zoo
from vlmeff.demo import look
from vlmeff.demo.site import Site, shown

PACKAGES = ("torch", "transformers", "diffusers", "triton", "gradio")
PRIVACY = (
    "Pictures and answers stay on the machine that serves this page. Files that were sent are deleted within two "
    "hours; until then, whoever can reach the page and guesses a file's random name can read it."
)


def build(site: Site, model: gr.Dropdown) -> None:
    """Make the tab; it follows the model."""
    text = gr.HTML(about(site, site.models[0]), elem_id="about")

    @shown
    def describe(name: str) -> str:
        return about(site, name)

    model.change(describe, [model], [text], api_name="about", concurrency_limit=None, show_progress="hidden")


def about(site: Site, name: str) -> str:
    """The whole tab as HTML."""
    record = zoo.find_model(name)
    facts = [("model", name)]
    if record is not None:
        facts += [
            ("revision", record.revision or "not pinned"),
            ("licence", record.license or "-"),
            ("commercial use", record.commercial_use or "-"),
            ("notes", " ".join(record.notes) or "-"),
        ]
    else:
        facts.append(("licence", "not in the model zoo: see the model's own page"))
    versions = [("vlmeff", __version__)]
    for package in PACKAGES:
        try:
            versions.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((package, "not installed"))
    presets = [
        (row.preset, row.summary, row.steps, row.status or "not in the zoo for this model")
        for row in zoo.preset_table(name)
    ]
    figures = _figures(name)
    parts = [
        look.table(["what runs here", ""], facts, text=True),
        look.table(["preset", "in short", "steps", "status"], presets, text=True),
    ]
    if figures:
        caption = "Scores (100 is best), measured with vlmeff eval. The files are in the repository: "
        caption += ", ".join(sorted({source for *_, source in figures}))
        head = ["benchmark and metric", "preset", "baseline", "with the preset"]
        parts.append(look.table(head, [row[:-1] for row in figures], caption=caption))
    parts += [look.table(["package", "version"], versions, text=True), look.note(PRIVACY)]
    return "".join(f'<div class="vl-block">{part}</div>' for part in parts)


def _figures(name: str) -> list[tuple[str, str, str, str, str]]:
    """What the zoo's entries of a model say was measured."""
    record = zoo.find_model(name)
    rows = []
    for entry in zoo.list_entries():
        if record is None or entry.model != record.name:
            continue
        source = entry.evidence.results if entry.evidence is not None else "-"
        for row in entry.expected:
            rows.append((f"{row.benchmark}, {row.metric}", entry.preset, f"{row.baseline:g}", f"{row.value:g}", source))
    return rows
