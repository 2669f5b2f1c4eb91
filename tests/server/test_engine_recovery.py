"""Who goes back into an engine that died: the rules, played through."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent_server.engine.recovery import CLEARED_TOKENS, MAX_DEATHS, Standing, due


def die(turns: list[Standing]) -> None:
    for turn in turns:
        turn.on_death()


def test_after_one_death_all_go_back_and_after_two_one_at_a_time() -> None:
    turns = [Standing() for _ in range(4)]
    assert due(turns) == turns
    assert due(turns) == []
    die(turns)
    assert due(turns) == turns
    die(turns)
    new = Standing()
    assert due([*turns, new]) == [turns[0], new]
    assert turns[0].advance(CLEARED_TOKENS - 1) is False
    assert due(turns) == []
    assert turns[0].advance(1) is True
    assert due(turns) == [turns[1]]


def test_tokens_before_a_death_do_not_clear() -> None:
    turn = Standing(tokens=500)
    for _ in range(MAX_DEATHS):
        assert due([turn]) == [turn]
        turn.advance(CLEARED_TOKENS - 1)
        die([turn])
    assert turn.is_guilty


@settings(deadline=None)
@given(
    count=st.integers(1, 8),
    poison=st.integers(0, 7),
    rounds=st.lists(st.integers(0, 7), max_size=9),
)
def test_only_the_poison_is_found_guilty(count: int, poison: int, rounds: list[int]) -> None:
    """Whoever else runs and gets on, in any order, the turn that kills the engine is the one."""
    turns = [Standing() for _ in range(count)]
    guilty = turns[poison % count]
    for lucky in [*rounds, *range(count * 3)]:
        due(turns)
        if guilty.in_engine:
            die(turns)
        else:
            turns[lucky % count].advance(CLEARED_TOKENS * turns[lucky % count].in_engine)
        assert not any(turn.is_guilty for turn in turns if turn is not guilty)
        if guilty.is_guilty:
            return
    assert guilty.is_guilty
