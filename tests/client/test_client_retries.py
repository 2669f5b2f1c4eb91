"""What is asked again, when, and under which name; in virtual time."""

import asyncio
from random import Random

import pytest
from declining import Declining, Refusal
from rungs import RTT_S, URL, now, serving, virtually
from session_world import FakeMachine
from telling import Telling

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent_client import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    Client,
    ClientClosedError,
    LinkState,
    Message,
    OverloadedError,
    RateLimitError,
)
from eloquent_client.retries import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    JITTER,
    MAX_RETRY_AFTER_S,
    Retries,
)
from eloquent_netem.vloop import VirtualNetwork

HELLO = [{"role": "user", "content": "Hello"}]
SLACK_S = 4 * RTT_S
"For handshakes, and what a request takes."


async def ask(client: Client) -> Message:
    async with client.stream(HELLO) as stream:
        return await stream.get_final_message()


def asked(service: Declining, client: Client) -> Message | APIStatusError:
    """Ask once; return the answer, or the error if it was declined for good."""

    async def main(network: VirtualNetwork) -> Message | APIStatusError:
        async with serving(network, service), client:
            try:
                return await ask(client)
            except APIStatusError as error:
                return error

    return virtually(main)


@pytest.mark.parametrize("code", ["overloaded", "rate_limited", "unavailable"])
def test_what_was_declined_for_now_is_asked_again_under_the_same_name(code: str) -> None:
    service = Declining((code, 0.0), (code, 0.0))
    message = asked(service, Client(URL, key="mine", rng=Random(1)))
    assert isinstance(message, Message)
    assert message.text == "yes"
    assert len(service.requests) == 3
    assert len(set(service.requests)) == 1, "the same id, secret, body and key"
    assert len(service.logs) == 1, "generated once"
    first, second = (
        later - before for before, later in zip(service.asked_s, service.asked_s[1:], strict=False)
    )
    assert BACKOFF_FIRST_S * (1 - JITTER) <= first <= BACKOFF_FIRST_S + SLACK_S
    assert 2 * BACKOFF_FIRST_S * (1 - JITTER) <= second <= 2 * BACKOFF_FIRST_S + SLACK_S


def test_retries_end() -> None:
    service = Declining(*[("overloaded", 0.0)] * 9)
    error = asked(service, Client(URL, rng=Random(1)))
    assert isinstance(error, OverloadedError)
    assert len(service.requests) == 3


def test_no_retries_if_none_are_wanted() -> None:
    service = Declining(("overloaded", 0.0))
    error = asked(service, Client(URL, max_retries=0))
    assert isinstance(error, OverloadedError)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("unauthorized", AuthenticationError),
        ("too_many_turns", RateLimitError),
        ("invalid_request", BadRequestError),
    ],
)
def test_what_would_be_declined_again_is_not_asked_again(
    code: str, kind: type[APIStatusError]
) -> None:
    service = Declining((code, 0.0))
    assert isinstance(asked(service, Client(URL)), kind)
    assert len(service.requests) == 1


def test_a_server_says_how_long_to_wait() -> None:
    service = Declining(("rate_limited", 20.0))
    assert isinstance(asked(service, Client(URL, rng=Random(1))), Message)
    waited_s = service.asked_s[1] - service.asked_s[0]
    assert 20.0 < waited_s <= 20.0 + BACKOFF_FIRST_S + SLACK_S


@pytest.mark.parametrize(("after_s", "timeout_s"), [(MAX_RETRY_AFTER_S + 1, 600.0), (30.0, 25.0)])
def test_a_wait_that_is_too_long_is_the_programs_to_decide(
    after_s: float, timeout_s: float
) -> None:
    service = Declining(("rate_limited", after_s))
    error = asked(service, Client(URL, timeout_s=timeout_s))
    assert isinstance(error, RateLimitError)
    assert error.retry_after_s == after_s
    assert len(service.requests) == 1


def test_what_fails_in_mid_answer_is_not_asked_again() -> None:
    class Breaking(Declining):
        async def _tell(self, log: TokenLog) -> None:
            log.append(TextDelta("one "))
            self._tell_readers(log)
            await asyncio.sleep(1.0)
            for reader in list(self.readers):
                reader.reject("unavailable", "Said by a test.")

    service = Breaking()
    assert isinstance(asked(service, Client(URL)), OverloadedError)
    assert len(service.requests) == 1


def test_a_server_that_starts_late_is_reached() -> None:
    async def main(network: VirtualNetwork) -> tuple[str, float]:
        async with Client(URL, connect_timeout_s=1.0, rng=Random(1)) as client:
            asking = asyncio.ensure_future(ask(client))
            await asyncio.sleep(1.2)
            async with serving(network, Telling(["yes"], 0.0)):
                return (await asking).text, now()

    text, done_s = virtually(main)
    assert text == "yes"
    assert done_s < 4.0


def test_attempts_to_connect_end() -> None:
    async def main(network: VirtualNetwork) -> float:
        async with Client(URL, rng=Random(1)) as client:
            with pytest.raises(APIConnectionError, match="Nothing listens"):
                await ask(client)
            return now()

    done_s = virtually(main)
    least_s = 3 * BACKOFF_FIRST_S * (1 - JITTER)
    assert least_s < done_s < 3 * BACKOFF_FIRST_S + 6 * SLACK_S


def test_retries_are_within_the_time_of_the_turn() -> None:
    async def main(network: VirtualNetwork) -> float:
        async with Client(URL, timeout_s=0.7, rng=Random(1)) as client:
            with pytest.raises(APIConnectionError):
                await ask(client)
            return now()

    assert virtually(main) <= 0.7


def test_connecting_counts_for_the_time_of_the_turn() -> None:
    async def main(network: VirtualNetwork) -> float:
        client = Client(URL, timeout_s=2.0, connect_timeout_s=60.0)
        async with client:
            with pytest.raises(APITimeoutError, match="within 2 s"):
                await ask(client)
            return now()

    assert virtually(main, lambda now, packet: True) == pytest.approx(2.0)


def test_a_closed_client_asks_nothing_again() -> None:
    async def main(network: VirtualNetwork) -> Exception:
        client = Client(URL, rng=Random(1))
        asking = asyncio.ensure_future(ask(client))
        await asyncio.sleep(SLACK_S)  # it waits to try again
        await client.close()
        with pytest.raises(ClientClosedError) as error:
            await asking
        return error.value

    assert "make another" in str(virtually(main))


async def without_network(client: Client, machine: FakeMachine, network: VirtualNetwork) -> None:
    """Use the client, then take its server and its network away."""
    async with serving(network, Declining()):
        await ask(client)
    while client.link.is_up:  # noqa: ASYNC110  (the news of the end is on its way)
        await asyncio.sleep(0.1)
    machine.change(None)


def test_no_retry_is_spent_while_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine()
    monkeypatch.setattr("eloquent.session.routes.this_machine", lambda: machine)
    states: list[LinkState] = []

    async def main(network: VirtualNetwork) -> tuple[str, float]:
        async with Client(URL, on_link_state=states.append) as client:
            await without_network(client, machine, network)
            asking = asyncio.ensure_future(ask(client))
            await asyncio.sleep(300.0)
            assert not asking.done()
            assert client.link.state is states[-1] is LinkState.OFFLINE
            async with serving(network, Declining()):
                machine.change("wlan")
                back_s = now()
                return (await asking).text, now() - back_s

    text, wait_s = virtually(main)
    assert text == "yes"
    assert wait_s < SLACK_S


def test_without_retries_a_missing_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine()
    monkeypatch.setattr("eloquent.session.routes.this_machine", lambda: machine)

    async def main(network: VirtualNetwork) -> float:
        async with Client(URL, max_retries=0) as client:
            await without_network(client, machine, network)
            asked_s = now()
            with pytest.raises(APIConnectionError):
                await ask(client)
            return now() - asked_s

    assert virtually(main) < 1.0


def test_waiting_for_a_network_ends_with_the_time_of_the_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = FakeMachine()
    monkeypatch.setattr("eloquent.session.routes.this_machine", lambda: machine)

    async def main(network: VirtualNetwork) -> APITimeoutError:
        async with Client(URL, timeout_s=60.0) as client:
            await without_network(client, machine, network)
            with pytest.raises(APITimeoutError) as error:
                await ask(client)
            await asyncio.sleep(5.0)
            assert client.link.state is LinkState.IDLE, "nobody waits any more"
            return error.value

    assert virtually(main).link_state is LinkState.OFFLINE


def test_waits_grow_to_their_bound_and_come_from_the_seed() -> None:
    def waits(seed: int) -> list[float]:
        retries = Retries(8, Random(seed))
        found = [retries.wait_s(APIConnectionError("of the test")) for _ in range(9)]
        assert found.pop() is None
        return [wait_s for wait_s in found if wait_s is not None]

    assert waits(1) == waits(1)
    assert waits(1) != waits(2)
    for number, wait_s in enumerate(waits(3)):
        most_s = min(BACKOFF_FIRST_S * 2**number, BACKOFF_MAX_S)
        assert most_s * (1 - JITTER) <= wait_s <= most_s


@pytest.mark.parametrize("refusal", [("unknown_turn", 0.0), ("internal_error", 0.0)])
def test_other_errors_have_no_wait(refusal: Refusal) -> None:
    error = APIStatusError(refusal[0], "of the test", refusal[1])
    assert Retries(2, Random(1)).wait_s(error) is None


def test_fewer_retries_than_none_are_none() -> None:
    assert Retries(-1, Random(1)).wait_s(APIConnectionError("of the test")) is None
