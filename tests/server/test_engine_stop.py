"""Stop strings end an answer before themselves, however it comes; nothing else is lost."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_model import Sink, scripted, tiny_tokenizer

from eloquent.core.events import ChosenLogprob, Failure, Logprobs, TextDelta
from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.stop import StopMatcher
from eloquent_server.engine.text import AnswerText
from eloquent_server.engine.turn import TurnRequest

BACKEND = tiny_tokenizer().backend_tokenizer
letters = st.text("abc", max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def cut_at_stop(text: str, strings: list[str]) -> str:
    """Return the text before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in strings if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(letters, stops, st.lists(st.integers(0, 12), max_size=5))
@example("aab", ["ab"], [1, 2])
@example("abcab", ["abcc", "b"], [1])
def test_pieces_of_any_size_stop_at_the_same_place(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    matcher, out = StopMatcher(strings), ""
    edges = sorted({0, *cuts, len(text)} & set(range(len(text) + 1)))
    for start, end in itertools.pairwise(edges):
        out += matcher.push(text[start:end])
        assert not any(string in out for string in strings)
        assert cut_at_stop(text, strings).startswith(out)
    assert matcher.stopped == (cut_at_stop(text, strings) != text)
    out += matcher.flush()
    assert out == cut_at_stop(text, strings)


def test_only_what_may_be_a_beginning_is_held_back() -> None:
    matcher = StopMatcher(["</s>", "END"])
    assert matcher.push("a <") == "a "
    assert matcher.push("/") == ""
    assert matcher.push("x EN") == "</x "
    assert matcher.push("d") == "ENd"
    assert matcher.push("E") == ""
    assert matcher.flush() == "E"


def test_without_stop_strings_nothing_waits() -> None:
    assert StopMatcher().push("text") == "text"


def ids(text: str) -> list[int]:
    tokens: list[int] = BACKEND.encode(text, add_special_tokens=False).ids
    return tokens


@given(st.text(st.sampled_from("aé👧<"), max_size=8), st.text("é👧<", min_size=1, max_size=2))
def test_logprobs_go_out_with_their_text(text: str, stop: str) -> None:
    answer, out, reported = AnswerText(BACKEND, [stop]), "", b""
    tokens = ids(text)
    for token, byte in zip(tokens, text.encode(), strict=True):
        out += answer.push(token, ChosenLogprob(bytes([byte]), -1.0))
        reported += b"".join(each.token for each in answer.take_logprobs())
        assert reported == out.encode()
        if answer.stopped:
            break
    out += answer.flush()
    reported += b"".join(each.token for each in answer.take_logprobs())
    assert out == cut_at_stop(text, [stop])
    assert reported == out.encode()


def ask(script: str, **options: object) -> Sink:
    loaded = scripted([65, *ids(script), *ids("never")])
    engine, sink = Engine(loaded), Sink()
    engine.submit(TurnRequest(prompt=[65], seed=0, temperature=0, **options), sink)  # type: ignore[arg-type]
    sink.end()
    engine.close()
    return sink


@pytest.mark.parametrize("stop", [("STOP",), ("STOP", "OP"), ("nothing", "STOP")])
def test_the_engine_ends_the_answer(stop: tuple[str, ...]) -> None:
    sink = ask("Yes. STOP and more", stop=stop)
    assert sink.end() == Finish("stop", 1, len("Yes. STOP"))
    assert sink.text == "Yes. "[: 7 if "OP" not in stop else None]


def test_what_was_held_back_comes_when_the_limit_ends_the_answer() -> None:
    sink = ask("Yes. STOP", stop=("STOP",), max_tokens=len("Yes. STO"))
    assert sink.end() == Finish("length", 1, len("Yes. STO"))
    assert sink.text == "Yes. STO"


def test_what_was_held_back_comes_before_a_failure() -> None:
    loaded = scripted([65, *ids("Yes. STO")])  # The script ends: the next forward fails.
    engine, sink = Engine(loaded), Sink()
    engine.submit(TurnRequest(prompt=[65], seed=0, temperature=0, stop=("STOP",)), sink)
    assert isinstance(sink.end(), Failure)
    engine.close()
    assert sink.text == "Yes. STO"


def test_a_continuation_remembers_what_was_held_back() -> None:
    for cut in range(len("Yes. STOP")):
        done = ids("Yes. STOP")[:cut]
        first = AnswerText(BACKEND, ["STOP"])
        before = "".join(first.push(token) for token in done)
        sink = ask("Yes. STOP and more", stop=("STOP",), generated=done)
        assert before + sink.text == "Yes. "
        assert sink.end() == Finish("stop", 1, len("Yes. STOP"))


@pytest.mark.parametrize("text", ["Yé. STOP", "née. STO no", "👋 and 👋"])
def test_a_continued_answer_reports_the_logprobs_that_are_not_out(text: str) -> None:
    """Whatever is out of tokens, text and logprobs, all comes, once, and in order."""
    whole = ask(text, stop=("STOP",), logprobs=2)
    reports = [each for e in whole.events if isinstance(e, Logprobs) for each in e.tokens]
    for tokens in range(0, len(whole.tokens) + 1, 3):
        for out in range(min(tokens, len(reports)) + 1):
            for chars in (0, len(whole.text)):
                sink = ask(
                    text,
                    stop=("STOP",),
                    logprobs=2,
                    generated=whole.tokens[:tokens],
                    emitted_logprobs=out,
                    emitted_chars=chars,
                )
                case = f"{tokens} tokens, {out} logprobs and {chars} characters are out"
                rest = [each for e in sink.events if isinstance(e, Logprobs) for each in e.tokens]
                assert rest == reports[out:], case
                assert sink.tokens == whole.tokens[tokens:], case
                assert sink.text == whole.text[chars:], case
                assert sink.end() == whole.end(), case


def test_the_engine_reports_logprobs_beside_the_text() -> None:
    sink = ask("Yé. STOP", stop=("STOP",), logprobs=2)
    text, reported = b"", b""
    for event in sink.events:
        if isinstance(event, TextDelta):
            text += event.text.encode()
        elif isinstance(event, Logprobs):
            reported += b"".join(each.token for each in event.tokens)
            assert all(each.top[0].token == each.token for each in event.tokens)
            assert all(len(each.top) == 2 for each in event.tokens)
            assert all(-0.01 < each.logprob <= 0 for each in event.tokens)
            assert reported == text
    assert reported == "Yé. ".encode()
