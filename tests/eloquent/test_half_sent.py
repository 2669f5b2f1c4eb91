"""Requests that are begun and not finished: they are told so, and hold nothing for ever."""

import asyncio

from session_world import World, in_world, now, read, tokens

from eloquent.core.receiver import Receiver
from eloquent.core.wire import Request, encode_request
from eloquent.errors import RequestError
from eloquent.quic.connect import QuicLink
from eloquent.quic.server import REQUEST_DEADLINE_S

ALL = "".join(tokens(100))


def test_a_request_that_is_never_finished_is_declined_by_name() -> None:
    async def play(world: World) -> tuple[str, float, int]:
        failed: list[tuple[float, Exception]] = []
        whole = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        link = world.session.link
        assert isinstance(link, QuicLink)
        world.session.on_turn_failed = lambda _link, _turn, error: failed.append((now(), error))  # type: ignore[method-assign]
        raw = encode_request(Request(bytes(16), b"{}" * 100, bytes(16)))
        turn = link._connection.quic.get_next_available_stream_id() // 4
        link._connection._receivers[turn] = Receiver(turn)
        link._connection._replies[turn] = bytearray()
        link._connection.quic.send_stream_data(4 * turn, raw[:-1], end_stream=False)
        begun_s = now()
        link.pump()
        text = await whole
        await asyncio.sleep(15.0)
        ((failed_s, error),) = failed
        assert isinstance(error, RequestError)
        assert error.code == "request_timeout"
        (peer,) = world.listener._peers  # type: ignore[union-attr]
        return text, failed_s - begun_s, len(peer.connection._requests)

    text, waited_s, held = in_world(play)
    assert text == ALL
    assert REQUEST_DEADLINE_S <= waited_s < REQUEST_DEADLINE_S + 0.2
    assert held == 0
