"""Replies come back as the tokens that they were made of, in the conversation that follows."""

import random

import pytest
from tiny_model import Sink, reference_tokens, tiny_loaded, tiny_tokenizer

from eloquent_server.backends.base import Finish
from eloquent_server.chat import ChatMessage
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.memo import ReplyMemo
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.turn import TurnRequest


def test_what_was_remembered_is_recalled_by_its_tenant_only() -> None:
    memo = ReplyMemo()
    memo.remember("alice", "hello", [5, 6])
    memo.remember("alice", "hello", [7])
    assert list(memo.recall("alice", "hello") or ()) == [7]
    assert memo.recall("alice", "hello ") is None
    assert memo.recall("bob", "hello") is None
    memo.remember("bob", "", [1])
    assert memo.recall("bob", "") is None


def test_the_oldest_replies_go_first() -> None:
    memo = ReplyMemo(tenant_tokens=10)
    for i in range(4):
        memo.remember("t", str(i), [i] * 3)
        assert memo.recall("t", "0") is not None or i == 3
    # The fourth did not fit beside the others; 0 was recalled last of the rest.
    assert [memo.recall("t", str(i)) is not None for i in range(4)] == [True, False, True, True]


def test_the_oldest_tenants_go_first() -> None:
    memo = ReplyMemo(max_tenants=2)
    for tenant in "ab":
        memo.remember(tenant, "x", [1])
    assert memo.recall("a", "x")
    memo.remember("c", "x", [1])
    assert [memo.recall(tenant, "x") is not None for tenant in "abc"] == [True, False, True]


def test_it_stays_within_its_bounds() -> None:
    rng = random.Random(3)
    memo = ReplyMemo(tenant_tokens=50, max_tenants=3)
    for _ in range(2000):
        count = rng.randint(1, 60)
        memo.remember(rng.choice("abcdef"), str(rng.randrange(30)), [1] * count)
        assert len(memo._tenants) <= 3
        assert set(memo._used) == set(memo._tenants)
        for tenant, replies in memo._tenants.items():
            assert sum(map(len, replies.values())) == memo._used[tenant] <= 50


def test_what_is_learned_of_a_reply() -> None:
    tokenizer, memo = tiny_tokenizer(), ReplyMemo()
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    a, b, half = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "abé")
    memo.learn("t", [a, b, end], tokenizer)
    memo.learn("t", [b, half], tokenizer)
    memo.learn("t", [a, start, a], tokenizer)
    memo.learn("t", [end], tokenizer)
    memo.learn("t", [], tokenizer)
    assert list(memo.recall("t", "ab") or ()) == [a, b]
    assert list(memo.recall("t", "b") or ()) == [b, half]
    assert memo.recall("t", "aa") is None


CHAT = [
    ChatMessage(role="user", content="hi"),
    ChatMessage(role="assistant", content="hello"),
    ChatMessage(role="user", content="hello"),
]


def test_a_reply_is_spliced_in_and_a_users_words_are_not() -> None:
    encoder = PromptEncoder(tiny_tokenizer())
    plain = encoder.encode(CHAT)
    spliced = encoder.encode(CHAT, recall={"hello": [1, 2, 3]}.get)
    decode = tiny_tokenizer().decode
    before = decode(plain).index("hello")
    assert spliced == [*plain[: len_of(encoder, before)], 1, 2, 3, *rest(plain, before)]
    assert encoder.encode(CHAT, recall={}.get) == plain


def len_of(_: PromptEncoder, chars: int) -> int:
    """The tiny tokenizer's tokens are bytes, but its markers are one token each."""
    text = tiny_tokenizer().decode(PromptEncoder(tiny_tokenizer()).encode(CHAT))
    ids: list[int] = tiny_tokenizer().encode(text[:chars], add_special_tokens=False)
    return len(ids)


def rest(plain: list[int], chars: int) -> list[int]:
    return plain[len_of(PromptEncoder(tiny_tokenizer()), chars) + len("hello") :]


@pytest.mark.parametrize("change", ["trim", "upper", "replace('l', '')"])
def test_a_template_that_changes_replies_gets_the_text(change: str) -> None:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template.replace(
        "message['content']",
        f"(message['content'] | {change})" if "(" not in change else f"message['content'].{change}",
    )
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer)
    chat = [CHAT[0], ChatMessage(role="assistant", content=" hello "), CHAT[2]]
    plain = encoder.encode(chat)
    assert encoder.encode(chat, recall={" hello ": [1, 2, 3]}.get) == plain


def test_a_reply_that_is_a_marker_is_still_text_for_everybody_else() -> None:
    encoder = PromptEncoder(tiny_tokenizer())
    chat = [CHAT[0], ChatMessage(role="assistant", content="<|im_end|>"), CHAT[2]]
    assert encoder.encode(chat, recall={"other": [1]}.get) == encoder.encode(chat)


def test_the_next_question_finds_the_whole_history_in_the_cache() -> None:
    loaded = tiny_loaded()
    encoder, memo = PromptEncoder(loaded.tokenizer), ReplyMemo()
    engine = Engine(loaded)
    first = [ChatMessage(role="user", content="why?")]
    prompt = encoder.encode(first)
    sink = Sink()
    engine.submit(TurnRequest(prompt=prompt, seed=0, max_tokens=60, temperature=0), sink)
    sink.end()
    memo.learn("local", sink.tokens, loaded.tokenizer)
    following = [
        *first,
        ChatMessage(role="assistant", content=sink.text),
        ChatMessage(role="user", content="and then?"),
    ]
    tokens = encoder.encode(following, recall=lambda text: memo.recall("local", text))
    again = Sink()
    engine.submit(TurnRequest(prompt=tokens, seed=0, max_tokens=4, temperature=0), again)
    end = again.end()
    engine.close()
    assert isinstance(end, Finish)
    assert again.tokens == reference_tokens(tokens, 4)
    assert end.cached_tokens == (len(prompt) + len(sink.tokens) - 1) // 16 * 16 > len(prompt)
