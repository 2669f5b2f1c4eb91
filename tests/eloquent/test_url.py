"""A server's URL: what is accepted, what is refused, and how it is written back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.errors import ConfigurationError
from eloquent.url import DEFAULT_PORT, ServerUrl, parse_url

PIN = "0123456789abcdef" * 4

hosts = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{2,5})?\Z") | st.ip_addresses(
    v=6
).map(str)
urls = st.builds(
    ServerUrl,
    hosts,
    st.integers(1, 65535),
    st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex),
)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("eloquent://chat.example", ServerUrl("chat.example", DEFAULT_PORT)),
        ("eloquent://chat.example/", ServerUrl("chat.example", DEFAULT_PORT)),
        ("eloquent://chat.example:", ServerUrl("chat.example", DEFAULT_PORT)),
        ("eloquent://127.0.0.1:5000", ServerUrl("127.0.0.1", 5000)),
        ("eloquent://[::1]:5000", ServerUrl("::1", 5000)),
        ("eloquent://[2001:db8::1]", ServerUrl("2001:db8::1", DEFAULT_PORT)),
        ("ELOQUENT://Chat.Example:1", ServerUrl("chat.example", 1)),
        (f"eloquent://h#sha256={PIN}", ServerUrl("h", DEFAULT_PORT, PIN)),
        (f"eloquent://h:7#sha256={PIN.upper()}", ServerUrl("h", 7, PIN)),
    ],
)
def test_what_a_url_means(text: str, url: ServerUrl) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chat.example",
        "chat.example:4433",
        "https://chat.example",
        "eloquent:chat.example",
        "eloquent://",
        "eloquent://:4433",
        "eloquent://h:port",
        "eloquent://h:65536",
        "eloquent://h:-1",
        "eloquent://h/path",
        "eloquent://h?query",
        "eloquent://user@h",
        "eloquent://user:secret@h",
        "eloquent://:secret@h",
        "eloquent://[::1",
        "eloquent://h#pin",
        f"eloquent://h#sha256={PIN[:-1]}",
        f"eloquent://h#sha256={PIN}0",
        f"eloquent://h#sha256={PIN[:-1]}g",
        f"eloquent://h#md5={PIN}",
    ],
)
def test_what_is_no_url_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"eloquent://HOST\[:PORT\]\[#sha256=PIN\]"):
        parse_url(text)


@given(urls)
def test_round_trip(url: ServerUrl) -> None:
    assert parse_url(str(url)) == url


@given(st.text() | st.text().map("eloquent://".__add__))
def test_any_text_gives_a_url_or_a_configuration_error(text: str) -> None:
    try:
        url = parse_url(text)
    except ConfigurationError:
        return
    assert url.host
    assert 0 <= url.port <= 65535
