"""The page of results: parts made one by one, marked with their code, kept where not made."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lab_rows import row

from eloquent.errors import ConfigurationError
from eloquent_netem.lab import cases
from eloquent_netem.lab.commands import lab
from eloquent_netem.lab.paper import Options, check, commit_of, paper, runnable_parts
from eloquent_netem.lab.paper_page import (
    NOT_YET,
    Mark,
    empty_part,
    mark_of,
    missed_cells,
    page,
    part_text,
    split,
)
from eloquent_netem.lab.paper_parts import (
    LEAST,
    TITLES,
    TUN_SCHEMES,
    Part,
    code_of_part,
    grid,
    make_parts,
    recordings,
)
from eloquent_netem.lab.places import RECORDINGS, synthetic
from eloquent_netem.lab.rows import ORACLE, Row
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.lab.tun_driver import TunDriver

NOWHERE = Path("/nonexistent")
MARK = Mark(code="c0de", commit="abc1234-dirty", date="2026-01-31", seeds=3)
TINY = Part(
    name="sim",
    schemes=("eloquent", "retransmit", ORACLE),
    places=(synthetic(rtt_ms=50, loss=0.1), synthetic(rtt_ms=50, loss=0.2)),
    source=ConstantRate(30.0, tokens=60),
    pictured=(synthetic(rtt_ms=50, loss=0.1).name,),
)


def rows(ours: float, theirs: float, against: str = "duplicate") -> list[Row]:
    return [
        row(
            "50 ms, 1 % loss",
            scheme,
            seed,
            stall_ratio=excess + 0.01,
            stall_ratio_200ms=excess + 0.01,
            excess_strict=excess,
            excess_200ms=excess,
        )
        for scheme, excess in (("eloquent", ours), (against, theirs))
        for seed in range(3)
    ]


def options(folder: Path, **fields: object) -> Options:
    made = Options(
        seeds={"sim": 2, "tun": 1},
        output=folder / "results.md",
        cache=folder / "runs.jsonl",
        workers=1,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def test_a_page_comes_apart_into_what_it_was_made_of() -> None:
    parts = {"sim": f"{MARK.line('sim')}\n\n## A\n\ntext\n", "tun": empty_part("tun", "B")}
    assert split(page(parts)) == {"sim": f"{parts['sim']}\n", "tun": parts["tun"]}
    assert split("# An older page\n\nof another make") == {}
    assert page(split(page(parts))).split() == page(parts).split()


def test_a_mark_is_read_as_it_was_written() -> None:
    assert mark_of(f"{MARK.line('sim')}\nand more") == MARK
    assert mark_of(empty_part("tun", "B")) is None
    assert mark_of("<!-- part sim: code=1 seeds=many -->") is None
    assert mark_of("") is None


def test_the_papers_figures_stand_beside_ours() -> None:
    text = part_text(TINY, MARK, rows(0.03, 0.09), [], meta={})
    # Plain stall ratios: 4 % against 10 %. Excess: 3 against 9 points.
    assert "| duplicate | strict | 4.00 ± 0.00 % | 10.00 ± 0.00 % | 60.0 % " in text
    assert "| 31.6 % |" in text
    assert (
        "| duplicate | strict | 3.00 ± 0.00 | 9.00 ± 0.00 | 66.7 % (66.7 to 66.7) | 60 % | yes |"
        in text
    )
    assert "abc1234-dirty" in text


def test_a_missed_bound_is_not_hidden() -> None:
    text = part_text(TINY, MARK, rows(0.06, 0.09), [], meta={})
    assert "| 33.3 % (33.3 to 33.3) | 60 % | NO |" in text
    assert (
        "| 50 ms, 1 % loss | duplicate | strict | 6.00 ± 0.00 | 9.00 ± 0.00 | 0.67 | 0.40 |" in text
    )


def test_failed_runs_are_on_the_page() -> None:
    text = part_text(TINY, MARK, rows(0.01, 0.09), [], meta={}, failures=["seed 7: it broke"])
    assert "- seed 7: it broke" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "misses"),
    [
        (0.0359, 0.09, False),
        (0.0361, 0.09, True),
        (0.0009, 0.0, False),  # below the floor there is nothing left to win
        (0.0011, 0.0, True),
        (-0.01, 0.05, False),
    ],
)
def test_a_network_misses_where_our_excess_is_above_its_share_of_theirs(
    ours: float, theirs: float, misses: bool
) -> None:
    assert bool(missed_cells(rows(ours, theirs))) is misses


def test_the_page_is_made_part_by_part_and_runs_are_not_made_again(tmp_path: Path) -> None:
    settings = options(tmp_path)
    before = f"{MARK.line('tun')}\n\n## Against the kernel's TCP\n\nmeasured in January\n"
    settings.output.write_text(page({"tun": before}), encoding="utf-8")

    assert paper([TINY], settings) == 0

    text = settings.output.read_text(encoding="utf-8")
    parts = split(text)
    assert list(parts) == ["sim", "traces", "tun", "recorded"]
    assert NOT_YET in parts["traces"]
    assert "measured in January" in parts["tun"]
    assert mark_of(parts["tun"]) == MARK
    mark = mark_of(parts["sim"])
    assert mark is not None
    assert (mark.code, mark.seeds) == (code_of_part("sim"), 2)
    assert "2 networks, 2 seeds each" in parts["sim"]
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert {file.split("-")[0] for file in linked} == {"figures/sim"}
    assert sorted(linked) == sorted(
        f"figures/{path.name}" for path in (tmp_path / "figures").iterdir()
    )
    known = (tmp_path / "runs.jsonl").read_bytes()
    assert known.count(b'"key"') == 12

    assert paper([TINY], settings) == 0
    assert (tmp_path / "runs.jsonl").read_bytes() == known
    assert settings.output.read_text(encoding="utf-8") == text


def test_figures_that_a_part_has_no_longer_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("sim-old.png", "tun-cost.png"):
        (folder / name).write_bytes(b"")
    assert paper([TINY], options(tmp_path)) == 0
    names = {path.name for path in folder.iterdir()}
    assert "sim-old.png" not in names
    assert "tun-cost.png" in names


def test_what_is_out_of_date_is_named_with_its_date_and_commit(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    assert [line.split()[0] for line in check(output)] == ["sim", "traces", "tun", "recorded"]
    codes = {name: code_of_part(name) for name in TITLES}
    fresh = {name: replace(MARK, code=code).line(name) for name, code in codes.items()}
    output.write_text(page(fresh), encoding="utf-8")
    assert check(output) == []
    output.write_text(page(fresh | {"tun": MARK.line("tun")}), encoding="utf-8")
    (line,) = check(output)
    assert "2026-01-31" in line
    assert "abc1234-dirty" in line
    assert codes["tun"] in line


def test_a_file_that_is_no_page_of_results_is_not_overwritten(tmp_path: Path) -> None:
    settings = options(tmp_path)
    settings.output.write_text("# My notes\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is no page of results"):
        paper([TINY], settings)
    assert settings.output.read_text(encoding="utf-8") == "# My notes\n"
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff")])
def test_a_page_that_cannot_be_read_is_told(tmp_path: Path, make: Callable[[Path], object]) -> None:
    output = tmp_path / "page"
    make(output)
    for call in (
        lambda: check(output),
        lambda: paper([], options(tmp_path, output=output)),
    ):
        with pytest.raises(ConfigurationError, match="name another with --output"):
            call()


@pytest.mark.parametrize("option", ["--output", "--cache"])
def test_where_nothing_can_be_written_nothing_is_run(tmp_path: Path, option: str) -> None:
    files = {"--output": tmp_path / "page.md", "--cache": tmp_path / "cache", option: tmp_path}
    words = [str(word) for pair in files.items() for word in pair]
    with pytest.raises(ConfigurationError, match=f"Cannot write {tmp_path}"):
        lab(["paper", "--part", "sim", *words], exit_on_error=False)


def test_tcp_over_the_router_is_named_by_its_congestion_control() -> None:
    tun = replace(TINY, name="tun")
    text = part_text(tun, MARK, rows(0.01, 0.09), [], meta={"driver": TunDriver().meta()})
    assert "TCP, which is the kernel's, cubic, over TLS 1.3 (Linux " in text


@pytest.mark.parametrize(
    ("file", "is_older"),
    [
        ("link.py", True),
        ("lab/measures.py", True),
        ("lab/statistics.py", True),
        ("lab/paper_parts.py", True),
        ("lab/places.py", True),
        ("lab/report_style.py", False),
        ("lab/demo.py", False),
    ],
)
def test_a_part_is_as_old_as_the_code_of_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, is_older: bool
) -> None:
    package = tmp_path / "eloquent_netem"
    shutil.copytree(cases.FOLDER.parent, package)
    monkeypatch.setattr(cases, "FOLDER", package / "lab")
    before = code_of_part("sim")
    with (package / file).open("a") as code:
        code.write("# changed\n")
    assert (code_of_part("sim") != before) is is_older


def test_the_command_says_whether_the_page_is_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        lab(["paper", "--check", "-o", str(tmp_path / "none.md")], exit_on_error=False)
    assert stopped.value.code == 1
    assert "make paper" in capsys.readouterr().out


def test_the_comparison_is_that_of_the_papers() -> None:
    places = grid()
    assert len({place.name for place in places}) == 18
    assert {place.rtt_s for place in places} == {0.05, 0.1, 0.3}
    assert {place.loss for place in places} == {0.01, 0.05, 0.1}
    assert {place.burst_ms for place in places} == {None, 150.0}
    for part in make_parts(NOWHERE):
        assert set(part.pictured) <= {place.name for place in places}
        assert set(part.schemes) - {"eloquent", ORACLE} <= set(LEAST)
    assert {"tcp-sse", "tcp-websocket", "duplicate", "retransmit"} <= set(TUN_SCHEMES)


def test_recordings_are_taken_where_they_are(tmp_path: Path) -> None:
    assert recordings(tmp_path) == ()
    assert [part.name for part in make_parts(tmp_path, has_tun=False)] == ["sim"]
    (tmp_path / f"{RECORDINGS[1]}.down").write_text("1\n2\n")
    (place,) = recordings(tmp_path)
    assert place.name.startswith(RECORDINGS[1])
    assert [part.name for part in make_parts(tmp_path)] == ["sim", "traces", "tun", "recorded"]
    assert [part.name for part in make_parts(tmp_path, has_tun=False)] == ["sim", "traces"]


def test_only_the_parts_that_are_asked_for_are_made(tmp_path: Path) -> None:
    (tmp_path / f"{RECORDINGS[1]}.down").write_text("1\n2\n")
    assert [part.name for part in runnable_parts(tmp_path, ["traces"])] == ["traces"]
    assert [part.name for part in runnable_parts(tmp_path, ["traces", "sim"])] == ["sim", "traces"]
    with pytest.raises(ConfigurationError, match="no part 'tuns': --part takes sim, traces, tun"):
        runnable_parts(tmp_path, ["sim", "tuns"])


def test_the_page_itself_does_not_make_a_commit_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    assert commit_of(tmp_path / "nothing") == "unknown"
    (tmp_path / "docs").mkdir()
    page, code = tmp_path / "docs" / "results.md", tmp_path / "code.py"
    for file in (page, code):
        file.write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "Begin")
    commit = commit_of(tmp_path)
    assert len(commit) == 8
    page.write_text("b")
    assert commit_of(tmp_path) == commit
    code.write_text("b")
    assert commit_of(tmp_path) == f"{commit}-dirty"
