"""Engines' errors, in whichever form, and what the client is told of them."""

import pytest

from eloquent_server.backends.upstream_errors import MAX_MESSAGE_CHARS, EngineError, UpstreamError


def told(status: int, body: str, retry_after: str = "") -> UpstreamError:
    return EngineError.read(status, body.encode(), retry_after).as_upstream_error()


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, '{"error":{"message":"bad x","type":"invalid_request_error"}}', "invalid_request"),
        (422, '{"detail":[{"loc":["body"],"msg":"bad x"}]}', "invalid_request"),
        (400, '{"object":"error","message":"bad x","code":400}', "invalid_request"),
        (400, '[{"error":{"code":400,"message":"bad x"}}]', "invalid_request"),
        (400, '{"error":"bad x"}', "invalid_request"),
        (
            400,
            '{"error":{"message":"This model\'s maximum context length is 10, bad x"}}',
            "prompt_too_long",
        ),
        (
            400,
            '{"error":{"message":"bad x","code":"context_length_exceeded"}}',
            "prompt_too_long",
        ),
        (
            400,
            '{"error":{"message":"bad x","type":"exceed_context_size_error","code":400}}',
            "prompt_too_long",
        ),
        (
            404,
            '{"error":{"message":"The model `bad x` does not exist.","type":"NotFoundError"}}',
            "unknown_model",
        ),
        (400, '{"error":{"message":"bad x","code":"model_not_found"}}', "unknown_model"),
        (413, '{"error":{"message":"bad x"}}', "request_too_large"),
        (429, '{"error":{"message":"bad x"}}', "rate_limited"),
        (500, '{"error":{"message":"bad x"}}', "upstream_error"),
        (503, '{"error":{"message":"bad x","type":"unavailable_error"}}', "upstream_error"),
        (504, '{"error":{"message":"bad x"}}', "upstream_timeout"),
    ],
)
def test_what_the_engine_says_reaches_the_client(status: int, body: str, code: str) -> None:
    error = told(status, body)
    assert error.code == code
    assert "bad x" in error.message


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 307])
def test_the_operators_faults_are_not_the_clients(status: int) -> None:
    error = told(status, '{"error":{"message":"Incorrect API key provided: sk-abc"}}')
    assert error.code == "upstream_error"
    assert "sk-abc" not in error.message + error.detail
    assert str(status) in error.message


@pytest.mark.parametrize(
    ("status", "elsewhere"),
    [(400, False), (413, False), (401, True), (429, True), (500, True), (503, True), (504, True)],
)
def test_another_engine_is_asked_where_it_may_do_better(status: int, elsewhere: bool) -> None:
    assert told(status, "{}").may_go_elsewhere is elsewhere


@pytest.mark.parametrize(
    "body", ["", "<html>Bad gateway</html>", "[]", "7", '{"error":null}', "\x00"]
)
def test_bodies_of_unknown_form_say_nothing(body: str) -> None:
    error = told(502, body)
    assert error.code == "upstream_error"
    assert "it gave no reason" in error.message


def test_long_messages_are_cut() -> None:
    error = told(400, '{"error":{"message":"' + "x" * 5000 + '"}}')
    assert len(error.message) < MAX_MESSAGE_CHARS + 100


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0),
        ("7", 7),
        ("1.5", 1.5),
        ("-3", 0),
        ("inf", 0),
        ("nan", 0),
        ("1e9", 3600),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0),
    ],
)
def test_retry_after(header: str, seconds: float) -> None:
    assert told(429, "{}", header).retry_after_s == seconds
    assert told(503, "{}", header).retry_after_s == seconds
