"""Reading tables of TOML into frozen dataclasses, with errors that name file, key and reason.

The schema is the dataclasses themselves: `key` ties a field to a reader, which checks a value and
turns it into what the field holds. A table whose form depends on its `kind` is read by `one_of`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any

from eloquent_netem.errors import NetemError

KIND = "kind"
READER = "reader"

TOML_INTEGERS = 2**63
"TOML's whole numbers lie between minus this and below this."


class ScenarioError(NetemError):
    """A scenario is unknown or its file is wrong; the text names file, key and reason."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a scenario file a value stands."""

    file: str
    key: str = ""
    "With dots, such as down.loss.burst_ms; empty for the file as a whole."

    def at(self, name: str | int) -> "Place":
        """Return the place of a key, or of an index of a list, within this one."""
        if isinstance(name, int):
            return Place(self.file, f"{self.key}[{name}]")
        return Place(self.file, f"{self.key}.{name}" if self.key else name)

    def error(self, reason: str) -> ScenarioError:
        """Return the error to raise; the reason is a sentence without its full stop."""
        return ScenarioError(f"{self.file}: {self.key + ': ' if self.key else ''}{reason}.")


Reader = Callable[[object, Place], Any]


@dataclass(frozen=True, slots=True)
class OneOf:
    """Reads a table whose key `kind` says which of several forms it has."""

    kinds: Mapping[str, type]

    def __call__(self, value: object, place: Place) -> Any:
        """Read the table."""
        table = _table(value, place)
        if KIND not in table:
            raise place.at(KIND).error(f"this key is missing; it is one of {_listed(self.kinds)}")
        kind = choice(*self.kinds)(table[KIND], place.at(KIND))
        rest = {name: item for name, item in table.items() if name != KIND}
        return read_table(self.kinds[kind], rest, place, also=(KIND,))


@dataclass(frozen=True, slots=True)
class TableOf:
    """Reads a table of one form."""

    form: type

    def __call__(self, value: object, place: Place) -> Any:
        """Read the table."""
        return read_table(self.form, _table(value, place), place)


@dataclass(frozen=True, slots=True)
class ListOf:
    """Reads a list whose items are all of one form; it becomes a tuple."""

    item: Reader

    def __call__(self, value: object, place: Place) -> Any:
        """Read the list."""
        if not isinstance(value, list):
            raise place.error(f"must be a list, not {_named(value)}")
        return tuple(self.item(entry, place.at(index)) for index, entry in enumerate(value))


def key(reader: Reader) -> dict[str, Reader]:
    """Return the metadata that makes a dataclass field a key of the file."""
    return {READER: reader}


def schema(form: type) -> dict[str, Reader]:
    """Return the keys of a form, and the reader of each."""
    return {item.name: item.metadata[READER] for item in fields(form) if READER in item.metadata}


def read_table(
    form: type,
    table: Mapping[str, object],
    place: Place,
    /,
    *,
    also: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """Return an instance of a form, made from a table and from the fields that are no keys.

    Raises:
        ScenarioError: a key is unknown or missing, or a value is impossible.
    """
    readers = schema(form)
    for name in table:
        if name not in readers:
            raise place.at(name).error(_unknown_key(name, (*also, *readers)))
    for item in fields(form):
        if item.name in readers and item.name not in table and item.default is MISSING:
            raise place.at(item.name).error("this key is missing")
    values = {name: readers[name](value, place.at(name)) for name, value in table.items()}
    instance = form(**values, **more)
    check = getattr(instance, "check", None)
    if check is not None:
        check(place)
    return instance


def number(
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Reader:
    """Return a reader of a finite number within bounds; it becomes a float."""

    def read(value: object, place: Place) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise place.error(f"must be a number, not {_named(value)}")
        if isinstance(value, int):
            whole()(value, place)
        if not math.isfinite(value):
            raise place.error(f"must be a finite number, not {value}")
        _within(value, place, least=least, above=above, below=below, most=most)
        return float(value)

    return read


def whole(*, least: int | None = None, most: int | None = None) -> Reader:
    """Return a reader of a whole number within bounds."""

    def read(value: object, place: Place) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise place.error(f"must be a whole number, not {_named(value)}")
        if not -TOML_INTEGERS <= value < TOML_INTEGERS:
            raise place.error("must be a number of 64 bits")
        _within(value, place, least=least, most=most)
        return value

    return read


def truth(value: object, place: Place) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise place.error(f"must be true or false, not {_named(value)}")
    return value


def text(value: object, place: Place) -> str:
    """Read a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise place.error(f"must be a text in quotation marks, not {_named(value)}")
    return value


def choice(*names: str) -> Reader:
    """Return a reader of one of several names."""

    def read(value: object, place: Place) -> str:
        name = text(value, place)
        if name not in names:
            raise place.error(f"there is no {name!r}{suggestion(name, names)}")
        return name

    return read


def spans(value: object, place: Place) -> tuple[tuple[float, float], ...]:
    """Read a list of pairs [from, to] of seconds, in order and apart."""
    pairs = ListOf(ListOf(number(least=0)))(value, place)
    if not pairs:
        raise place.error("names no span; write [[from, to]] in seconds")
    end = 0.0
    for index, pair in enumerate(pairs):
        if len(pair) != 2:
            raise place.at(index).error("must be [from, to] in seconds")
        if not pair[0] < pair[1]:
            raise place.at(index).error("must end after it starts")
        if pair[0] < end:
            raise place.at(index).error("starts before the span in front of it ends")
        end = pair[1]
    return tuple(pairs)


def steps(item: Reader) -> Reader:
    """Return a reader of a list of pairs [from, item], from when in seconds: rising from 0."""

    def read(value: object, place: Place) -> tuple[tuple[float, Any], ...]:
        entries = ListOf(ListOf(lambda part, _: part))(value, place)
        if not entries:
            raise place.error("names no step; write [[0, value], [seconds, value]]")
        pairs: list[tuple[float, Any]] = []
        for index, entry in enumerate(entries):
            here = place.at(index)
            if len(entry) != 2:
                raise here.error("must be [from, value], from when in seconds")
            from_s = number(least=0)(entry[0], here)
            if index == 0 and from_s != 0:
                raise here.error("must be from 0 on")
            if pairs and from_s <= pairs[-1][0]:
                raise here.error("must start after the step in front of it")
            pairs.append((from_s, item(entry[1], here)))
        return tuple(pairs)

    return read


def suggestion(name: str, names: Mapping[str, object] | tuple[str, ...]) -> str:
    """Return the end of a sentence about an unknown name: what may be meant, and what there is."""
    close = get_close_matches(name, list(names), n=1)
    if close:
        return f"; did you mean {close[0]!r}? There is {_listed(names)}"
    return f"; there is {_listed(names)}"


def _unknown_key(name: str, names: tuple[str, ...]) -> str:
    return f"there is no such key here{suggestion(name, names)}"


def _table(value: object, place: Place) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise place.error(f"must be a table, not {_named(value)}")
    return value


def _within(
    value: float,
    place: Place,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    if least is not None and value < least:
        raise place.error(f"must be at least {least:g}, not {value:g}")
    if above is not None and value <= above:
        raise place.error(f"must be above {above:g}, not {value:g}")
    if below is not None and value >= below:
        raise place.error(f"must be below {below:g}, not {value:g}")
    if most is not None and value > most:
        raise place.error(f"must be at most {most:g}, not {value:g}")


def _named(value: object) -> str:
    """Return a value as one recognises it from the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else str(value)


def _listed(names: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(names)
