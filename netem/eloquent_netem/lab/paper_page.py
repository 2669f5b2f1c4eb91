"""The results' page: parts with their figures, each marked with how old it is."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eloquent_netem.lab.findings import Sheet, markdown_table
from eloquent_netem.lab.paper_parts import LEAST, PAPERS, Part
from eloquent_netem.lab.report_page import Picture
from eloquent_netem.lab.report_style import style_of
from eloquent_netem.lab.report_tables import (
    NOTHING,
    OURS,
    cell_sheet,
    comparisons,
    excess_cells,
    percent,
    percent_range,
)
from eloquent_netem.lab.rows import Row
from eloquent_netem.lab.statistics import (
    HOW,
    MEASURES,
    RATIO_FLOOR,
    over_seeds,
    ratio,
    reduction,
    samples_of,
)

FIGURES = "figures"
"The folder beside the page."

NOT_YET = "Not measured yet: run `make paper` where it can be."

INTRO = f"""\
# Results

Made by `make paper` (`eloquent lab paper`); do not edit. `eloquent lab paper --check` says whether
the code has changed since.

The same answers, token by token, over the same networks with the same seeds. All schemes but TCP
share one congestion controller (thin) and one pacer; loss is in both directions, independent or in
bursts at the same instants for everybody.

- *Stall ratio*, strict: the share of the answer's time in which the reader waits for a token that,
  had nothing been lost, would be there. *200 ms*: the part of it that lies beyond 200 ms after the
  rendering before.
- *Excess*: either ratio minus that of the `oracle`, the link's own bound for the same tokens, in
  percentage points. Under independent loss the oracle waits for nothing.
- *Ours / this*: our excess over a scheme's, of means, both at least {100 * RATIO_FLOOR:g} points.
- {textwrap.fill(HOW, 98, subsequent_indent="  ")}. Schemes are paired by seed.
- Bytes are those of both directions, with all headers, acknowledgements and handshake repeats; the
  time to the first token includes the handshake. `eloquent` is padded, the others are not, which is
  in their favour.
"""

_MARK = re.compile(r"<!-- part (?P<name>\S+): (?P<fields>.*) -->")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a part was made from."""

    code: str
    "A hash of the code that the figures depend on."
    commit: str
    date: str
    seeds: int

    def line(self, name: str) -> str:
        """Return the page's line for it."""
        return (
            f"<!-- part {name}: code={self.code} commit={self.commit} date={self.date} "
            f"seeds={self.seeds} -->"
        )


def page(parts: Mapping[str, str]) -> str:
    """Return the whole page; `parts` are texts by the parts' names, in their order."""
    return "\n".join([INTRO, *(text.rstrip("\n") + "\n" for text in parts.values())])


def split(text: str) -> dict[str, str]:
    """Return a page's parts by their names."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), *([len(text)] if marks else [])]
    return {mark["name"]: text[mark.start() : end] for mark, end in zip(marks, ends, strict=True)}


def mark_of(part: str) -> Mark | None:
    """Return the mark of a part's text, or None if it has none that can be read."""
    found = _MARK.match(part)
    if found is None:
        return None
    fields = dict(field.split("=", 1) for field in found["fields"].split() if "=" in field)
    try:
        return Mark(
            code=fields["code"],
            commit=fields["commit"],
            date=fields["date"],
            seeds=int(fields["seeds"]),
        )
    except (KeyError, ValueError):
        return None


def empty_part(name: str, title: str) -> str:
    """Return the text of a part that was never made."""
    return f"<!-- part {name}: none -->\n## {title}\n\n{NOT_YET}\n"


def part_text(
    part: Part,
    mark: Mark,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    *,
    meta: Mapping[str, object],
    failures: Sequence[str] = (),
    more: Sequence[Sheet] = (),
) -> str:
    """Return a part's text; `more` are further tables."""
    sources = ", ".join(sorted({row.source for row in rows}))
    parts = [
        mark.line(part.name),
        f"## {part.title}",
        f"{_driver(part, meta)} {len({row.scenario for row in rows})} networks, {mark.seeds} "
        f"seeds each, {rows[0].tokens} tokens at {sources}. Made on {mark.date} at commit "
        f"{mark.commit} (code {mark.code}).",
        _section(_papers(rows)),
        _section(_excesses(rows)),
        *(_section(sheet) for sheet in more),
        *(f"![{picture.title}]({FIGURES}/{part.name}-{picture.name}.png)" for picture in pictures),
        _missed(rows),
        _failed(failures),
        _folded("Every network and scheme", cell_sheet("", rows)),
    ]
    return "\n\n".join(text for text in parts if text) + "\n"


def _driver(part: Part, meta: Mapping[str, object]) -> str:
    if part.driver != "tun":
        return (
            "Virtual time: both real QUIC ends over emulated links; `tcp` is a model of Linux's "
            "TCP with CUBIC, held to the kernel by `eloquent netem fidelity`, without TLS."
        )
    driver = meta.get("driver")
    told = driver if isinstance(driver, Mapping) else {}
    fidelity = meta.get("fidelity")
    late = fidelity.get("worst_lateness_p99_us") if isinstance(fidelity, Mapping) else None
    lateness = "" if late is None else f" (at worst {late:.0f} us were accepted)"
    return (
        "Real sockets in network namespaces, through a router that emulates the network: our QUIC, "
        f"and TCP, which is {told.get('tcp', '?')} (Linux {told.get('kernel', '?')}). A run in "
        f"which the machine was late is made again{lateness}."
    )


def _section(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""
    return f"### {sheet.title}\n\n{markdown_table(sheet.header, sheet.rows)}"


def _folded(title: str, sheet: Sheet) -> str:
    table = markdown_table(sheet.header, sheet.rows)
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def _papers(rows: Sequence[Row]) -> Sheet:
    """Compare plain stall ratios, as the paper does."""
    lines = []
    for against, published in PAPERS.items():
        for measure, (plain, _) in MEASURES.items():
            found = reduction(samples_of(rows, plain), OURS, against)
            if found is not None:
                lines.append(
                    (
                        style_of(against).label,
                        measure,
                        percent(found.ours, found.seeds),
                        percent(found.theirs, found.seeds),
                        percent_range(found.share, found.seeds),
                        f"{100 * published:.1f} %",
                    )
                )
    return Sheet(
        "The paper's comparison: plain stall ratios",
        ("against", "measure", "ours", "theirs", "less by", "the paper's, on its networks"),
        tuple(lines),
    )


def _excesses(rows: Sequence[Row]) -> Sheet:
    """Compare the excess over the oracle, summed over all networks."""
    lines = []
    for found in comparisons(rows):
        excess = found.excess
        least = LEAST.get(excess.against)
        is_met = NOTHING if least is None else "yes" if excess.share.figure >= least else "NO"
        lines.append(
            (
                *excess_cells(found),
                NOTHING if least is None else f"{100 * least:.0f} %",
                is_met,
                percent_range(found.plain.share, found.plain.seeds),
            )
        )
    return Sheet(
        "Excess over the oracle, all networks",
        (
            "against",
            "measure",
            "ours, points",
            "theirs, points",
            "less by",
            "at least",
            "met",
            "plain stall ratio: less by",
        ),
        tuple(lines),
    )


def missed_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the networks on which alone the bound of the sums is missed.

    Where our excess is below the floor of ratios there is nothing left to win.
    """
    lines: list[tuple[str, ...]] = []
    seeds = len({row.seed for row in rows})
    for measure, (plain, excess) in MEASURES.items():
        excesses, plains = samples_of(rows, excess), samples_of(rows, plain)
        for scenario in dict.fromkeys(row.scenario for row in rows):
            ours = over_seeds(excesses, scenario, OURS)
            for scheme, least in LEAST.items():
                theirs = over_seeds(excesses, scenario, scheme)
                if ours is None or theirs is None or ours.figure <= RATIO_FLOOR:
                    continue
                found = ratio(ours.figure, theirs.figure)
                if found > 1 - least:
                    lines.append(
                        (
                            scenario,
                            style_of(scheme).label,
                            measure,
                            percent(ours, seeds, unit=""),
                            percent(theirs, seeds, unit=""),
                            f"{found:.2f}",
                            f"{1 - least:.2f}",
                            percent(over_seeds(plains, scenario, OURS), seeds),
                            percent(over_seeds(plains, scenario, scheme), seeds),
                        )
                    )
    return lines


def _missed(rows: Sequence[Row]) -> str:
    lines = missed_cells(rows)
    bounded = {(row.scenario, row.scheme) for row in rows if row.scheme in LEAST}
    total = len(bounded) * len(MEASURES)
    title = "### Networks that miss"
    if not lines:
        return f"{title}\n\nNone: on each network alone, too, the bounds of the sums are met."
    table = markdown_table(
        (
            "network",
            "against",
            "measure",
            "excess: ours",
            "theirs",
            "ours / theirs",
            "at most",
            "stall ratio: ours",
            "theirs",
        ),
        lines,
    )
    return (
        f"{title}\n\nThe bounds are of sums; {len(lines)} of {total} comparisons on one network "
        f"alone miss them. An excess of ours up to {100 * RATIO_FLOOR:g} "
        f"points counts as none.\n\n{table}"
    )


def _failed(failures: Sequence[str]) -> str:
    if not failures:
        return ""
    lines = "\n".join(f"- {failure}" for failure in failures)
    return f"### Runs without figures\n\n{lines}"
