"""The report's page: one HTML file that needs nothing else, in light and dark, on any screen."""

import base64
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.report_style import DARK, DPI, LIGHT, Theme, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
"The file's name."

CAPTION_CHARS_PER_INCH = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, drawn when it is asked for."""

    name: str
    "Of its file, without an ending."
    title: str
    caption: str
    "Measure, seeds, driver, intervals: what one must know to read it."
    draw: "Callable[..., Figure]"
    "Takes the keyword `theme`."

    def png(self, theme: Theme) -> bytes:
        """Return it for a page, which has the caption beside it."""
        with themed(theme):
            return _png(self.draw(theme=theme))

    def captioned_png(self) -> bytes:
        """Return it for a file: who sees that alone must know what it shows."""
        with themed(LIGHT):
            figure = self.draw(theme=LIGHT)
            text = textwrap.fill(
                self.caption, round(CAPTION_CHARS_PER_INCH * figure.get_figwidth())
            )
            figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=LIGHT.muted)
            return _png(figure)


@dataclass(frozen=True, slots=True)
class Card:
    """A headline figure."""

    figure: str
    what: str
    how: str
    "Its interval and what it compares."


def html_page(
    *,
    title: str,
    summary: str,
    cards: Sequence[Card],
    pictures: Sequence[Picture],
    sheets: Sequence[Sheet],
    meta: Mapping[str, object],
) -> str:
    """Return the page; `summary` is a paragraph, `meta` says how it was made."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="summary">{escape(summary)}</p>',
        f'<div class="cards">{"".join(map(_card, cards))}</div>' if cards else "",
        *map(_picture, pictures),
        *map(_table, sheets),
        '<section><h2>How it was made</h2><dl class="meta">',
        *(f"<dt>{escape(key)}</dt><dd>{escape(_told(value))}</dd>" for key, value in meta.items()),
        "</dl></section>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{_SORT}</script>\n</body>\n</html>\n"
    )


def _card(card: Card) -> str:
    return (
        f'<div class="card"><div class="figure">{escape(card.figure)}</div>'
        f'<div class="what">{escape(card.what)}</div>'
        f'<div class="how">{escape(card.how)}</div></div>'
    )


def _picture(picture: Picture) -> str:
    return (
        f'<figure id="{escape(picture.name)}"><h2>{escape(picture.title)}</h2>'
        '<div class="wide"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_data_url(picture.png(DARK))}">'
        f'<img src="{_data_url(picture.png(LIGHT))}" alt="{escape(picture.title)}. '
        f'{escape(picture.caption)}"></picture></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(sheet: Sheet) -> str:
    head = "".join(
        f'<th><button type="button">{escape(name)}</button></th>' for name in sheet.header
    )
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in sheet.rows
    )
    return (
        f'<section><h2>{escape(sheet.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_told, value))
    return str(value)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


_CSS = """
:root { --paper: #ffffff; --ink: #1c1e21; --muted: #5d636b; --line: #e3e6ea; --card: #f5f7f9;
  --accent: #0063a6; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8eaed; --muted: #a0a7b0;
  --line: #30353c; --card: #1f2329; --accent: #5ab4ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
.summary { max-width: 46rem; margin: 0 0 1.6rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); }
.card { background: var(--card); border-radius: .6rem; padding: 1rem 1.1rem; }
.card .figure { font-size: 1.9rem; font-weight: 650; color: var(--accent); line-height: 1.15;
  font-variant-numeric: tabular-nums; }
.card .how, figcaption, .meta { color: var(--muted); font-size: .875rem; }
figure, section { margin: 2.6rem 0 0; }
figcaption { margin-top: .5rem; max-width: 46rem; }
.wide { overflow-x: auto; }
img { display: block; width: 100%; min-width: 36rem; max-width: 62rem; height: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th button { all: unset; cursor: pointer; color: var(--muted); font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover td { background: var(--card); }
.meta { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
.meta dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .meta { grid-template-columns: 1fr; } .meta dd { margin-bottom: .4rem; }
  td:first-child { max-width: 9rem; white-space: normal; } }
"""

_SORT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = row => row.cells[column].textContent.trim();
    const number = row => parseFloat(text(row).replace("\\u2212", "-"));
    const body = table.tBodies[0];
    const order = (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
      const by = isNaN(x) ? text(a).localeCompare(text(b), "en", {numeric: true}) : x - y;
      return up ? by : -by;
    };
    body.append(...[...body.rows].sort(order));
  }));
}
"""
