"""Which tokens a reply was made of, so that its history is found in the prefix cache.

Encoding a reply's text gives other tokens than the model chose in a good part of all replies; the
history then differs from what was computed, from there to its end. Needs no torch.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from threading import Lock
from typing import Any

TENANT_TOKENS = 1 << 20
"What is remembered for one tenant: 4 MB."
MAX_TENANTS = 64
"Who has not been here for longest is forgotten."


class ReplyMemo:
    """Replies by tenant and text; bounded, the oldest go first. For any thread."""

    def __init__(
        self, *, tenant_tokens: int = TENANT_TOKENS, max_tenants: int = MAX_TENANTS
    ) -> None:
        self._tenant_tokens = tenant_tokens
        self._max_tenants = max_tenants
        self._tenants: OrderedDict[str, OrderedDict[bytes, array[int]]] = OrderedDict()
        self._used: dict[str, int] = {}
        self._lock = Lock()

    def learn(self, tenant: str, tokens: Sequence[int], tokenizer: Any) -> None:
        """Keep a reply as the model made it; `tokenizer` is a fast one of transformers.

        Not a reply with control tokens in its middle, which must not get into a prompt.
        """
        special = set(tokenizer.all_special_ids)
        reply = list(tokens[:-1] if tokens and tokens[-1] in special else tokens)
        if special.isdisjoint(reply):
            text = tokenizer.backend_tokenizer.decode(reply, skip_special_tokens=True)
            self.remember(tenant, text.rstrip("\ufffd"), reply)

    def remember(self, tenant: str, text: str, tokens: Sequence[int]) -> None:
        """Keep the tokens of a reply; of two replies of the same text, the later one's."""
        if not text or len(tokens) > self._tenant_tokens:
            return
        with self._lock:
            self._remember(tenant, _digest(text), tokens)

    def recall(self, tenant: str, text: str) -> Sequence[int] | None:
        """Return the tokens of a reply, or None."""
        key = _digest(text)
        with self._lock:
            replies = self._tenants.get(tenant)
            if replies is None:
                return None
            self._tenants.move_to_end(tenant)
            tokens = replies.get(key)
            if tokens is not None:
                replies.move_to_end(key)
            return tokens

    def _remember(self, tenant: str, key: bytes, tokens: Sequence[int]) -> None:
        replies = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        used = self._used.get(tenant, 0) + len(tokens) - len(replies.pop(key, ()))
        replies[key] = array("i", tokens)
        while used > self._tenant_tokens:
            used -= len(replies.popitem(last=False)[1])
        self._used[tenant] = used
        while len(self._tenants) > self._max_tenants:
            gone, _ = self._tenants.popitem(last=False)
            del self._used[gone]


def _digest(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
