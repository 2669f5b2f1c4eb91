"""The report: a page that needs nothing else, with the figures that its rows allow."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lab_rows import arrivals, row

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.commands import lab
from eloquent_netem.lab.report import Study, _stairs, _window, figures, write_report
from eloquent_netem.lab.report_page import PAGE
from eloquent_netem.lab.report_style import STYLES, in_order, style_of
from eloquent_netem.lab.report_tables import cell_sheet, comparison_sheet
from eloquent_netem.lab.rows import ORACLE, Row
from eloquent_netem.lab.simulated import SimDriver
from eloquent_netem.lab.tun_driver import KINDS

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a page has, and what it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.open: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.urls += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")
        ]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def grid(seeds: int = 3) -> list[Row]:
    """Two losses at two round trips; ours has a tenth of the excess of `retransmit`."""
    return [
        row(
            f"{rtt_ms:g} ms, {loss:.0%}",
            scheme,
            seed,
            rtt_ms=rtt_ms,
            loss=loss,
            stall_ratio=factor * loss + seed / 1000,
            stall_ratio_200ms=factor * loss / 10,
            excess_strict=factor * loss,
            excess_200ms=factor * loss / 10,
        )
        for rtt_ms in (50.0, 100.0)
        for loss in (0.05, 0.1)
        for scheme, factor in (("eloquent", 0.1), ("retransmit", 1.0), ("oracle", 0.0))
        for seed in range(seeds)
    ]


def stalling(tokens: int = 300) -> dict[tuple[str, str, int], object]:
    late = [0.0] * 200 + [2.0 - index / 30 for index in range(60)] + [0.0] * (tokens - 260)
    return {
        ("100 ms, 10%", "eloquent", 0): arrivals([0.0] * tokens),
        ("100 ms, 10%", "retransmit", 0): arrivals(late),
    }


def test_the_page_needs_no_other_file_and_no_network(tmp_path: Path) -> None:
    path = write_report(Study(grid(), stalling(), {"command": "eloquent lab"}), tmp_path)  # type: ignore[arg-type]

    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.name == PAGE
    assert page.open == []
    assert page.urls
    for url in page.urls:
        head, _, content = url.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content).startswith(PNG)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "prefers-color-scheme: dark" in text
    assert "eloquent lab" in text


def test_there_is_a_file_for_each_figure(tmp_path: Path) -> None:
    study = Study(grid(), stalling())  # type: ignore[arg-type]
    write_report(study, tmp_path)
    names = {picture.name for picture in figures(study)}
    assert names == {"stalls-strict", "stalls-200ms", "delays", "staircase", "cost"}
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_captions_name_measure_seeds_driver_and_intervals() -> None:
    for picture in figures(Study(grid())):
        assert re.search("strict|200 ms", picture.caption)
        assert "3 seeds" in picture.caption
        assert "driver sim" in picture.caption
        assert "95 % intervals" in picture.caption


def test_places_that_differ_by_more_than_loss_and_round_trip_get_a_row_of_dots() -> None:
    rows = [
        row(place, scheme, 0, rtt_ms=50.0, loss=0.02)
        for place in ("taxi", "train")
        for scheme in ("eloquent", "tcp")
    ]
    names = [picture.name for picture in figures(Study(rows))]
    assert names == ["places-strict", "places-200ms", "cost"]


def test_a_comparison_has_the_known_reduction() -> None:
    sheet = comparison_sheet("x", grid())
    assert [line[:2] for line in sheet.rows] == [("retransmit", "strict"), ("retransmit", "200 ms")]
    strict = sheet.rows[0]
    # Mean loss 7.5 %: theirs has that excess, ours a tenth of it, on every seed.
    assert strict[2:5] == ("0.75 ± 0.00", "7.50 ± 0.00", "90.0 % (90.0 to 90.0)")
    assert strict[-2:] == ("4", "3")


def test_a_cell_shows_the_ratio_of_ours_to_its_own() -> None:
    sheet = cell_sheet("x", grid())
    ours, theirs, oracle = sheet.rows[:3]
    assert ours[:2] == ("50 ms, 5%", "Eloquent")
    assert (ours[5], theirs[5], oracle[5]) == ("—", "0.10", "—")
    # In the 200 ms measure ours is 0.05 points, below the floor of 0.1: not a tenth but a fifth.
    assert theirs[7] == "0.20"


def test_other_drivers_are_told_apart() -> None:
    both = [*grid(), row("50 ms, 5%", "eloquent", 0, driver="tun", rtt_ms=50.0)]
    assert "driver sim and tun" in figures(Study(both))[0].caption


def test_names_from_outside_are_no_markup(tmp_path: Path) -> None:
    rows = [row("<script>alert(1)</script>", scheme, 0) for scheme in ("eloquent", "<b>")]
    text = write_report(Study(rows, meta={"<i>": "</dd>"}), tmp_path).read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


@pytest.mark.parametrize("rows", [[], [row("a", "eloquent", 0, loss=0.0)]])
def test_little_or_nothing_still_makes_a_page(tmp_path: Path, rows: list[Row]) -> None:
    assert Page(write_report(Study(rows), tmp_path).read_text(encoding="utf-8")).open == []


def test_the_oracle_alone_has_delays_and_no_staircase(tmp_path: Path) -> None:
    study = Study([row("a", ORACLE, 0)], {("a", ORACLE, 0): arrivals([0.0] * 10)})
    assert Page(write_report(study, tmp_path).read_text(encoding="utf-8")).open == []
    names = [picture.name for picture in figures(study)]
    assert names == ["delays", "places-strict", "places-200ms"]


def test_a_network_whose_packets_are_never_lost_is_no_point_of_a_curve_but_a_row_of_dots(
    tmp_path: Path,
) -> None:
    schemes = ("eloquent", "retransmit")
    outage = [row("outage", scheme, 0, rtt_ms=50.0, loss=0.0) for scheme in schemes]
    study = Study([*grid(), *outage])
    names = [picture.name for picture in figures(study)]
    assert names == ["stalls-strict", "places-strict", "stalls-200ms", "places-200ms", "cost"]
    assert "outage" in write_report(study, tmp_path).read_text(encoding="utf-8")


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    for seeds in (1, 2):
        text = write_report(Study(grid(seeds)), tmp_path).read_text(encoding="utf-8")
        assert ("±" in text) is (seeds > 1)
        assert ("90.0 to 90.0 %" in text) is (seeds > 1)
        assert ("95 % intervals of the means" in text) is (seeds > 1)
        assert f"{seeds} seed{'s' if seeds > 1 else ''}" in text


def test_the_staircase_shows_the_longest_wait() -> None:
    stairs = [_stairs(scheme, run) for (_, scheme, _), run in stalling().items()]  # type: ignore[arg-type]
    begin, end = _window(stairs)
    assert begin <= 200 / 30 < end
    assert stairs[0].stall_ratio == 0
    assert stairs[1].stall_ratio == pytest.approx(2 / 10, abs=0.02)


def test_every_scheme_has_a_marker_and_colours_of_its_own() -> None:
    assert {*SimDriver().schemes, *KINDS, ORACLE} == STYLES.keys()
    # `tcp` is the model of what `tcp-sse` is for real: one colour, two markers.
    shown = [style for name, style in STYLES.items() if name != "tcp"]
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    assert (
        len({style.light for style in shown}) == len({style.dark for style in shown}) == len(shown)
    )
    assert style_of("new").label == "new"
    assert in_order(["new", "oracle", "eloquent"]) == ["eloquent", "oracle", "new"]


def test_without_matplotlib_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("eloquent_netem.lab.report_style.find_spec", lambda name: None)
    for command in (["stalls", "--report", str(tmp_path)], ["paper", "-o", str(tmp_path / "x.md")]):
        with pytest.raises(ConfigurationError, match=r"eloquent-stream\[lab\]"):
            lab(command, exit_on_error=False)
    assert list(tmp_path.iterdir()) == []
