"""Responses that are the same for all requests: JSON, and errors in OpenAI's form."""

import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from eloquent.errors import RequestError
from eloquent.openai import error_body, http_status

RETRY_AFTER_S = 1.0
"For those who are told to come back, where nothing better is known."
COME_BACK = (429, 503)


class JsonResponse(Response):
    """An object as JSON."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """See `Response.render`."""
        return msgspec.json.encode(content)


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """Return an error in OpenAI's form."""
    status = http_status(error.code)
    more = dict(headers or {})
    if status in COME_BACK:
        more["Retry-After"] = str(math.ceil(error.retry_after_s or RETRY_AFTER_S))
    if status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JsonResponse(error_body(error.code, error.message), status, more)


async def until_gone(receive: Receive) -> None:
    """Wait until the connection of a request, whose body was read, is over."""
    while (await receive())["type"] != "http.disconnect":
        pass
