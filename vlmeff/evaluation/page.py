"""``regressions.html``: the documents that the baseline gets right and a preset gets wrong, for a person to read.

One file without external resources. Questions, references and answers are untrusted text: everything is escaped, and
a content security policy allows nothing but this page's own style, script and embedded pictures.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from vlmeff.errors import VlmeffError
from vlmeff.evaluation.results_schema import Results, Run
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.statistics import Pairs
from vlmeff.evaluation.tables import ABOUT_CONTROLS, CONTROLS_HEAD, controls_row

Picture = Callable[[str], Image.Image | None]
Pictures = Picture | Mapping[str, Picture]

SHOWN = 24  # cards of one preset on one benchmark
THUMBNAIL, SMALL = 320, 128  # longest side of a thumbnail; pictures up to SMALL stay as they are
LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Card:
    """One document that got worse. ``picture`` is a data: URL, or None with the reason in ``no_picture``."""

    baseline: SampleRow
    candidate: SampleRow
    drop: float
    picture: str | None
    no_picture: str


@dataclass(frozen=True)
class Section:
    """The worst regressions of one preset on one benchmark; ``total`` is how many there are."""

    benchmark: str
    label: str
    scale: float
    total: int
    documents: int
    cards: Sequence[Card]


def collect(run: Run, pairs: Pairs, score: str, pictures: Pictures | None) -> Section:
    """The documents whose ``score`` fell most from baseline to ``run``; among equals, categories take turns."""
    drops = []
    for b, c in zip(pairs.baseline, pairs.candidate, strict=True):
        before, after = b.scores.get(score), c.scores.get(score)
        if b.error is not None or before is None:
            continue
        drop = float(before) - (0.0 if c.error is not None or after is None else float(after))
        if drop > 0:
            drops.append((drop, b, c))
    drops.sort(key=lambda entry: -entry[0])  # stable: the order of the data among equals
    turns: Counter[tuple[float, str]] = Counter()
    ranked = []
    for place, (drop, b, c) in enumerate(drops):
        category = (drop, str(b.category or b.split))
        ranked.append(((-drop, turns[category], place), drop, b, c))
        turns[category] += 1
    ranked.sort(key=lambda entry: entry[0])
    cards = []
    for _, drop, b, c in ranked[:SHOWN]:
        picture, reason = _picture(run.benchmark, b, pictures)
        cards.append(Card(b, c, drop, picture, reason))
    return Section(run.benchmark, run.label, run.scale, len(drops), len(pairs.baseline), cards)


def thumbnail(image: Image.Image) -> str:
    """A small copy of ``image`` as data: URL: PNG of pictures up to 128 px (pixels count there), else JPEG."""
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    copy = image.convert("RGB")  # a copy without metadata: EXIF may name a place or a person
    copy.info = {}
    small = max(copy.size) <= SMALL
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    if small:
        copy.save(out, "PNG", optimize=True)
    else:
        copy.save(out, "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"


def html_page(results: Results, sections: Sequence[Section]) -> str:
    """The whole page."""
    model = str(results.model.get("id", "model"))
    benchmarks = list(dict.fromkeys(s.benchmark for s in sections))
    labels = list(dict.fromkeys(s.label for s in sections))
    total = sum(s.total for s in sections)
    body = "\n".join(_section(s, n) for n, s in enumerate(sections))
    about = (
        "Documents that the model answers rightly as it is, and wrongly (or less rightly) with a preset. "
        "Losses only: what a preset gets right in exchange is counted in the tables of results.md."
    )
    empty = "" if total else '<p class="empty">No document got worse with a preset.</p>'
    filters = (
        f'<form class="filters" hidden>{_select("benchmark", "Benchmark", benchmarks)}{_select("run", "Run", labels)}'
        '<output aria-live="polite"></output></form>'
        if total
        else ""
    )
    partial = " · partial run" if results.partial else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'sha256-{_digest(STYLE)}'; script-src 'sha256-{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Regressions of {_escape(model)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Regressions of {_escape(model)}</h1>
<p>{about}</p>
<p class="facts">vlmeff {_escape(results.vlmeff)} · {_escape(results.created)}{partial}</p>
{filters}
</header>
<main>
{_controls(results)}{empty}{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _controls(results: Results) -> str:
    """Every preset against its controls: whether it beats random at equal budget."""
    if not results.against_controls:
        return ""
    scales = {run.benchmark: run.scale for run in results.runs}
    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in ("benchmark", *CONTROLS_HEAD))
    rows = []
    for c in results.against_controls:
        cells = (c.benchmark, *controls_row(c, scales[c.benchmark]))
        rows.append(f'<tr class="{c.verdict}">' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f"""<h2 id="controls">Presets against their controls</h2>
<p class="facts">{_escape(ABOUT_CONTROLS)}</p>
<div class="table" role="region" aria-labelledby="controls" tabindex="0"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table></div>
"""


def _picture(benchmark: str, row: SampleRow, pictures: Pictures | None) -> tuple[str | None, str]:
    source = pictures.get(benchmark) if isinstance(pictures, Mapping) else pictures
    if row.n_images == 0:
        return None, "no picture in this question"
    if source is None:
        return None, "picture not at hand when this page was made"
    try:
        image = source(row.doc_id)
        return (thumbnail(image), "") if image is not None else (None, "picture not found")
    except (VlmeffError, OSError, LookupError, ValueError, Image.DecompressionBombError) as error:
        # A data set that moved since the run must not cost the report.
        return None, f"picture not readable ({type(error).__name__})"


def _section(section: Section, number: int) -> str:
    share = f"{section.total or 'none'} of {section.documents} documents got worse"
    shown = f", the worst {len(section.cards)} shown" if section.total > len(section.cards) else ""
    cards = "\n".join(_card(card, section) for card in section.cards)
    return f"""<section data-benchmark="{_escape(section.benchmark)}" data-run="{_escape(section.label)}" \
aria-labelledby="s{number}">
<h2 id="s{number}">{_text(section.benchmark)} <span class="run">{_text(section.label)}</span></h2>
<p class="facts">{share}{shown}</p>
<div class="cards">
{cards}
</div>
</section>"""


def _card(card: Card, section: Section) -> str:
    b, c = card.baseline, card.candidate
    if card.picture is None:
        picture = f'<div class="picture none">{_text(card.no_picture)}</div>'
    else:
        alt = _escape(f"Picture of document {b.doc_id}")
        picture = f'<div class="picture"><img alt="{alt}" loading="lazy" src="{card.picture}"></div>'
    more = f'<p class="facts">1 of {b.n_images} pictures</p>' if b.n_images > 1 and card.picture else ""
    question = _text(b.question) if b.question else '<span class="unknown">the question was not stored</span>'
    references = Counter(str(r) for r in b.references or ())
    told = "".join(
        f"<li>{_text(r)}{f' <span class=facts>{n} times</span>' if n > 1 else ''}</li>"
        for r, n in references.most_common(10)
    )
    category = b.category or b.split
    where = f"{_text(b.doc_id)}{f' · {_text(category)}' if category else ''}"
    loss = "" if card.drop == 1 else f" · score -{card.drop * 100:.0f}"
    return f"""<article>
{picture}
<div class="words">
<h3>{question}</h3>{more}
<dl>
<dt>References</dt><dd>{f"<ul>{told}</ul>" if told else '<span class="unknown">not stored</span>'}</dd>
<dt>Baseline <span class="mark right" aria-label="right">✓</span></dt><dd>{_answer(b)}</dd>
<dt>{_text(section.label)} <span class="mark wrong" aria-label="worse">✗</span></dt><dd>{_answer(c)}</dd>
<dt>Visual tokens</dt><dd>{_tokens(c)}</dd>
</dl>
<p class="facts">{where}{loss}</p>
</div>
</article>"""


def _answer(row: SampleRow) -> str:
    if row.error is not None:
        return f'<span class="unknown">failed: {_text(row.error)}</span>'
    if not row.prediction.strip():
        return '<span class="unknown">(empty answer)</span>'
    read = ""
    if row.unparsed:
        read = ' <span class="facts">not understood</span>'
    elif row.parsed is not None and row.parsed.strip().lower() != row.prediction.strip().removesuffix(".").lower():
        read = f' <span class="facts">read as {_text(row.parsed)}</span>'
    return f'<span class="answer">{_text(row.prediction.strip())}</span>{read}'


def _tokens(row: SampleRow) -> str:
    kept = f"{row.visual_tokens_kept} kept of {row.visual_tokens_in}"
    mean = row.visual_tokens_layer_mean
    return kept if mean is None else f"{kept}, {mean:.4g} on average over the layers"


def _select(name: str, title: str, options: Sequence[str]) -> str:
    def choices() -> Iterator[str]:
        yield '<option value="">all</option>'
        for option in options:
            yield f'<option value="{_escape(option)}">{_escape(option)}</option>'

    return f'<label>{title} <select name="{name}">{"".join(choices())}</select></label>'


def _escape(value: object) -> str:
    # A browser turns NUL into a replacement mark anyway; other control characters are no valid HTML.
    clean = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(clean, quote=True)


def _text(value: object) -> str:
    """Escaped text that keeps marks of writing direction to itself."""
    whole = str(value)
    cut = whole if len(whole) <= LONGEST_TEXT else whole[:LONGEST_TEXT] + " …"
    return f"<bdi>{_escape(cut)}</bdi>"


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


STYLE = """
:root { --ink: #1c1f23; --soft: #5d666f; --paper: #f6f7f8; --card: #fff; --line: #d9dde1;
  --good: #17693a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ae; --paper: #15181b; --card: #1f2327; --line: #363c42;
    --good: #6fd394; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 0; }
h3 { font-size: 1rem; margin: 0 0 .5rem; white-space: pre-line; max-height: 12rem; overflow: auto; }
header p { margin: .25rem 0; max-width: 46rem; }
.run { font-weight: 400; padding: .1rem .5rem; border: 1px solid var(--line); border-radius: 1rem; font-size: .9rem; }
.facts, .unknown { color: var(--soft); font-size: .875rem; }
.facts { margin: .25rem 0; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; position: sticky; top: 0; z-index: 1;
  background: var(--paper); padding: .5rem 0; }
.filters[hidden], section[hidden] { display: none; }
.filters label { max-width: 100%; }
select { font: inherit; max-width: 16rem; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .375rem; padding: .375rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 400; }
tr.better td:nth-child(5) { color: var(--good); } tr.worse td:nth-child(5) { color: var(--bad); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr));
  margin-top: .5rem; }
article { display: flex; gap: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; min-width: 0; }
.picture { flex: 0 0 10rem; }
.picture img { display: block; width: 100%; max-height: 16rem; object-fit: contain; object-position: top;
  image-rendering: auto; background: var(--paper); }
.picture.none { display: grid; place-items: center; text-align: center; min-height: 6rem; padding: .5rem;
  border: 1px dashed var(--line); color: var(--soft); font-size: .875rem; align-self: start; }
.words { flex: 1; min-width: 0; }
dl { display: grid; grid-template-columns: minmax(5.5rem, auto) 1fr; gap: .25rem .75rem; margin: 0; }
dt { color: var(--soft); font-size: .875rem; padding-top: .1rem; max-width: 10rem; }
dd { margin: 0; min-width: 0; max-height: 12rem; overflow: auto; }
.answer { white-space: pre-line; font-weight: 600; }
.mark { font-weight: 700; } .right { color: var(--good); } .wrong { color: var(--bad); }
ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 0 .75rem; }
@media (max-width: 36rem) {
  article { flex-direction: column; }
  .picture { flex-basis: auto; width: 100%; } .picture.none { min-height: 3rem; }
  .picture img { max-height: 14rem; width: auto; max-width: 100%; min-width: 8rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .375rem; } dt { max-width: none; }
}
"""

SCRIPT = """
const form = document.querySelector("form.filters");
if (form) {
  const sections = [...document.querySelectorAll("main section")];
  const show = () => {
    let cards = 0;
    for (const section of sections) {
      const fits = ["benchmark", "run"].every(key => !form.elements[key].value ||
        form.elements[key].value === section.dataset[key]);
      section.hidden = !fits;
      cards += fits ? section.querySelectorAll("article").length : 0;
    }
    form.querySelector("output").textContent = cards + (cards === 1 ? " document" : " documents");
  };
  form.addEventListener("change", show);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  show();
}
"""
