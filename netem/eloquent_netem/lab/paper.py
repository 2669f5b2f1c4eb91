"""`eloquent lab paper`: the comparison with the paper and with TCP, and the page of its results."""

import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.paper_page import (
    FIGURES,
    Mark,
    empty_part,
    mark_of,
    page,
    part_text,
    split,
)
from eloquent_netem.lab.paper_parts import DRIVERS, TITLES, Part, code_of_part, make_parts
from eloquent_netem.lab.report import Study, figures
from eloquent_netem.lab.report_page import Picture
from eloquent_netem.lab.rows import Row
from eloquent_netem.lab.stalls import Found, Plan, compare, find_driver
from eloquent_netem.lab.tun_agree import agreement_sheets

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

PICTURE_COLOURS = 128
"The page's figures are files in the repository: a palette makes them a third as large."


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run."""

    seeds: Mapping[str, int]
    "How many, by driver, from 0 on."
    output: Path
    cache: Path | None
    workers: int | None = None
    "None: as many as a driver bears."


def runnable_parts(traces: Path, wanted: Sequence[str] = ()) -> Sequence[Part]:
    """Return the parts that are wanted, or all, and can be made here; say of the others why not.

    Raises:
        ConfigurationError: there is no such part.
    """
    unknown = [name for name in wanted if name not in TITLES]
    if unknown:
        raise ConfigurationError(
            f"The page has no part {unknown[0]!r}: --part takes {', '.join(TITLES)}."
        )
    names = wanted or tuple(TITLES)
    has_tun = any(DRIVERS[name] == "tun" for name in names) and _can_tun()
    parts = [part for part in make_parts(traces, has_tun=has_tun) if part.name in names]
    if "traces" in names and not any(part.name == "traces" for part in parts):
        _say(f"No recordings in {traces}: that part of the page stays as it was.")
    return parts


def paper(parts: Sequence[Part], options: Options) -> int:
    """Run the parts and write them to the page; return the exit code.

    What is not among the parts, or not done when Ctrl-C comes, stays as it was on the page.

    Raises:
        ConfigurationError: the page cannot be read, or is something else.
    """
    before = _read(options.output)
    texts = split(before)
    if before.strip() and not texts:
        raise ConfigurationError(
            f"{options.output} is no page of results and would be lost: name another with --output."
        )
    failures: list[str] = []
    rows: list[Row] = []
    for part in parts:
        found = _run(part, options)
        if not found.is_complete:
            _say("Ended before its time: what is done is kept for the next run.")
            return EXIT_INTERRUPTED
        failures += found.failures
        rows += found.rows
        if not found.rows:
            _say(f"No run of the part {part.name} succeeded: it stays as it was.")
            continue
        pictures = figures(_pictured(part, found))
        texts[part.name] = part_text(
            part,
            _mark(part, options),
            found.rows,
            pictures,
            meta=found.meta,
            failures=found.failures,
            more=_agreement(part, rows) if part.driver == "tun" else (),
        )
        _write(options.output, texts, part, pictures)
        _say(f"{options.output}: {part.name} is written.")
    for failure in failures:
        _say(f"FAILED: {failure}")
    return EXIT_FAILED if failures else 0


def check(output: Path) -> list[str]:
    """Return a line for each part of the page that is missing or out of date.

    Raises:
        ConfigurationError: the page cannot be read.
    """
    texts = split(_read(output))
    lines = []
    for name, title in TITLES.items():
        mark, code = mark_of(texts.get(name, "")), code_of_part(name)
        if mark is None:
            lines.append(f"{name} ({title}): was never made.")
        elif mark.code != code:
            lines.append(
                f"{name} ({title}): made on {mark.date} at commit {mark.commit} from code "
                f"{mark.code}; the code now is {code}."
            )
    return lines


def _agreement(part: Part, rows: Sequence[Row]) -> Sequence[Sheet]:
    """Return how the part's networks compare with the same in virtual time."""
    names = {place.name for place in part.places}
    return agreement_sheets([row for row in rows if row.scenario in names])


def _can_tun() -> bool:
    """Return whether runs over TUN can be made here; say why not."""
    try:
        find_driver("tun").check()
    except (ConfigurationError, NetemError) as error:
        _say(f"No runs over TUN: {error} That part of the page stays as it was.")
        return False
    return True


def _run(part: Part, options: Options) -> Found:
    return compare(
        Plan(
            pairs=[(place, part.source) for place in part.places],
            driver=find_driver(part.driver),
            schemes=part.schemes,
            seeds=range(options.seeds[part.driver]),
            workers=options.workers,
            cache=options.cache,
        )
    )


def _pictured(part: Part, found: Found) -> Study:
    arrivals = {
        key: run for name in part.pictured for key, run in found.arrivals.items() if key[0] == name
    }
    return Study(found.rows, arrivals, found.meta)


def _mark(part: Part, options: Options) -> Mark:
    return Mark(
        code=code_of_part(part.name),
        commit=commit_of(Path(__file__).parent),
        date=datetime.now(UTC).date().isoformat(),
        seeds=options.seeds[part.driver],
    )


def commit_of(folder: Path) -> str:
    """Return the commit of a folder's working tree, `-dirty` if more than docs has changed."""
    try:
        commit = _git(folder, "describe", "--always", "--abbrev=8")
        changed = _git(folder, "diff", "--name-only", "HEAD", "--", ":(top)", ":(top,exclude)docs")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", *words],  # noqa: S607
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _read(output: Path) -> str:
    """Return the page's text, which is empty if there is no page yet."""
    try:
        return output.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The page {output} cannot be read ({error}): name another with --output."
        ) from error


def _write(output: Path, texts: Mapping[str, str], part: Part, pictures: Sequence[Picture]) -> None:
    """Write the page, and this part's figures in the place of its old ones."""
    folder = output.parent / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{part.name}-*.png"):
        old.unlink()
    for picture in pictures:
        (folder / f"{part.name}-{picture.name}.png").write_bytes(_small(picture.captioned_png()))
    ordered = {name: texts.get(name) or empty_part(name, title) for name, title in TITLES.items()}
    output.write_text(page(ordered), encoding="utf-8")


def _small(png: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(PICTURE_COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
