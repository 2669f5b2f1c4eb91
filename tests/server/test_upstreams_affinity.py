"""Which of several engines gets a turn: the one that has its prompt cached, and none overrun."""

import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import cast

import httpx2
import pytest

from eloquent_server.backends.upstream import Patience, Upstream
from eloquent_server.backends.upstreams import SLACK_TURNS, choose

SEED = 11
CONVERSATIONS = 400
TURNS = 6
"Of each."
CACHED = 30
"Conversations that an engine has room for."


UNUSED = cast(httpx2.AsyncClient, None)


def engines(count: int = 4) -> list[Upstream]:
    return [Upstream(f"http://engine{n}", UNUSED, Patience()) for n in range(count)]


def heads(count: int) -> list[bytes]:
    return [n.to_bytes(16, "big") for n in range(count)]


def simulate(choice: Callable[[bytes], Upstream]) -> tuple[float, int]:
    """Let conversations go on side by side, a turn a few steps, prompts ever longer.

    Return which part of the prompts was cached, and the most turns that an engine had at once.
    """
    rng = random.Random(SEED)
    starts = enumerate(rng.choices(range(CONVERSATIONS), k=CONVERSATIONS))
    asked = [
        (at + 20 * turn + rng.randrange(10), n, turn) for n, at in starts for turn in range(TURNS)
    ]
    caches: dict[Upstream, OrderedDict[int, int]] = {}
    under_way: list[tuple[int, Upstream]] = []
    hits = total = peak = 0
    for now, n, turn in sorted(asked):
        for end, engine in [each for each in under_way if each[0] <= now]:
            under_way.remove((end, engine))
            engine.in_flight -= 1
        engine = choice(n.to_bytes(16, "big"))
        cache, prompt = caches.setdefault(engine, OrderedDict()), 300 + 400 * turn
        hits, total = hits + cache.pop(n, 0), total + prompt
        cache[n] = prompt
        if len(cache) > CACHED:
            cache.popitem(last=False)
        engine.in_flight += 1
        peak = max(peak, engine.in_flight)
        under_way.append((now + rng.randrange(4, 9), engine))
    return hits / total, peak


def test_affinity_finds_more_cached_than_taking_turns_and_overruns_no_engine() -> None:
    those, turns = engines(), itertools.cycle(engines())
    hits, peak = simulate(lambda head: choose(those, head)[0])
    hits_by_turns, peak_by_turns = simulate(lambda head: next(turns))
    figures = f"seed {SEED}: {hits:.2f}, {peak}; by turns {hits_by_turns:.2f}, {peak_by_turns}"
    assert hits > 2 * hits_by_turns, figures
    assert peak <= peak_by_turns + SLACK_TURNS + 1, figures


def test_each_engine_is_the_first_choice_of_its_part() -> None:
    firsts = Counter(choose(engines(), head)[0].name for head in heads(1000))
    assert len(firsts) == 4
    assert all(200 < count < 300 for count in firsts.values())


def test_a_conversation_has_its_engine_whatever_the_order_they_are_named_in() -> None:
    for head in heads(50):
        there, back = choose(engines(), head), choose(engines()[::-1], head)
        assert [each.name for each in there] == [each.name for each in back]


@pytest.mark.parametrize("more", [SLACK_TURNS, SLACK_TURNS + 1])
def test_the_second_gets_a_turn_where_the_first_is_clearly_busier(more: int) -> None:
    order = choose(engines(), b"head")
    order[0].in_flight, order[1].in_flight, order[2].in_flight = 7 + more, 7, 0
    first, second = (0, 1) if more == SLACK_TURNS else (1, 0)
    assert choose(order, b"head")[:2] == [order[first], order[second]]


def test_the_conversations_of_others_stay_when_an_engine_goes() -> None:
    those = engines()
    before = [choose(those, head) for head in heads(200)]
    those[2].is_up = False
    for head, order in zip(heads(200), before, strict=True):
        left = [each for each in order if each.is_up]
        assert choose(those, head) == [*left, those[2]]


def test_one_that_is_down_takes_no_turns_from_one_that_is_busy() -> None:
    first, second = choose(engines(2), b"head")
    first.in_flight, second.is_up = 100, False
    assert choose([first, second], b"head") == [first, second]
