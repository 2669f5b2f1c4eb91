"""The tool calls in an engine's stream: which piece is of which call.

No I/O.
"""

from dataclasses import dataclass
from typing import Annotated

import msgspec

from eloquent.core.events import Delta, ToolCallDelta

_Fields = dict[str, msgspec.Raw]


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    arguments: str | None = None


_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    index: _Index | None = None
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Named(msgspec.Struct):
    name: str | None = None


class _AnyCall(msgspec.Struct):
    """A call of any form, as far as it tells which one it is."""

    index: _Index | None = None
    id: str | None = None
    function: _Named | None = None
    custom: _Named | None = None


_fields_decoder = msgspec.json.Decoder(_Fields)
_calls_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_call_decoder = msgspec.json.Decoder(_Call)
_any_call_decoder = msgspec.json.Decoder(_AnyCall)


@dataclass(slots=True)
class _Begun:
    """A call of which there is a piece."""

    index: int
    id: str = ""
    name: str = ""


class Calls:
    """The calls of one answer, each with an index of its own, and its id and name once.

    Some engines, such as Ollama and Gemini, have given several calls the same index, or none;
    others repeat ids and names.
    """

    def __init__(self) -> None:
        self._at: dict[int, _Begun] = {}
        "The newest, by the engine's index."
        self._used: set[int] = set()
        self._next = 0
        "Above all that are used."

    def take(self, delta: _Fields) -> list[Delta]:
        """Take the pieces of calls out of a delta; those of another form stay there."""
        try:
            calls = _calls_decoder.decode(delta.get("tool_calls", b"[]"))
        except msgspec.ValidationError:
            return []
        events: list[Delta] = []
        left: list[msgspec.Raw] = []
        for place, raw in enumerate(calls):
            try:
                call = _call_decoder.decode(raw)
            except msgspec.ValidationError:
                left.append(self._indexed(place, raw))
                continue
            if call.type not in (None, "", "function"):
                left.append(self._indexed(place, raw))
                continue
            function = call.function or _Function()
            given = place if call.index is None else call.index
            index, id_, name = self._piece(given, call.id or "", function.name or "")
            arguments = function.arguments or ""
            if id_ or name or arguments:
                events.append(ToolCallDelta(index, id_, name, arguments))
        delta["tool_calls"] = msgspec.Raw(msgspec.json.encode(left))
        return events

    def _indexed(self, place: int, raw: msgspec.Raw) -> msgspec.Raw:
        """Return a piece of another form with its index, as far as it is a call at all."""
        try:
            call = _any_call_decoder.decode(raw)
        except msgspec.ValidationError:
            return raw
        named = call.function or call.custom or _Named()
        given = place if call.index is None else call.index
        index, *_ = self._piece(given, call.id or "", named.name or "")
        if index == call.index:
            return raw
        fields = _fields_decoder.decode(raw)
        return msgspec.Raw(msgspec.json.encode({**fields, "index": index}))

    def _piece(self, given: int, id_: str, name: str) -> tuple[int, str, str]:
        """Return a piece's index, id and name; these are empty if they were said before.

        One with another id, and a name, begins another call.
        """
        begun = self._at.get(given)
        if begun is None or (id_ and name and begun.id and id_ != begun.id):
            index = given if given not in self._used else self._next
            self._used.add(index)
            self._next = max(self._next, index + 1)
            begun = self._at[given] = _Begun(index)
        new_id = "" if id_ == begun.id else id_
        new_name = "" if name == begun.name else name
        begun.id, begun.name = id_ or begun.id, name or begun.name
        return begun.index, new_id, new_name
