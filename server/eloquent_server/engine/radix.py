"""The prefix tree: blocks of 16 tokens, each known by a digest of everything before and in it.

A block's key is the digest of its parent's key and its own tokens; a tenant's root is a digest of
the model's fingerprint and the tenant. So equal keys mean equal histories of one tenant on one
model, a key means the same after a restart, and no tenant can name another's block.
"""

import heapq
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

BLOCK_TOKENS = 16
PRIORITY_S = 600.0
"A block of priority p is evicted as if it had been used p times this much later."

_KEY_BYTES = 16


def root_key(fingerprint: bytes, tenant: str) -> bytes:
    """Return the key under which a tenant's first blocks hang."""
    salt = blake2b(tenant.encode(), digest_size=_KEY_BYTES, person=b"eloquent-tenant")
    return blake2b(fingerprint, digest_size=_KEY_BYTES, key=salt.digest()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of the block of `tokens` that follows the block `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_KEY_BYTES).digest()


@dataclass(slots=True, eq=False)
class Node:
    """A block in the tree."""

    key: bytes
    parent: "Node | None"
    tenant: str
    payload: object
    "The block's keys and values."
    used: float
    "When it was last of use, in seconds."
    priority: float = 0.0
    children: int = 0
    alive: bool = True
    queued: bool = False
    "It stands in its tenant's heap of leaves; its rank there may be out of date."

    @property
    def rank(self) -> float:
        """What eviction goes by; the lowest goes first."""
        return self.used + self.priority * PRIORITY_S


@dataclass(slots=True)
class _Tenant:
    nodes: int = 0
    leaves: list[tuple[float, int, Node]] = field(default_factory=list)


class PrefixTree:
    """Blocks by key, and which of them goes first: the leaf that was of use longest ago.

    Knows nothing of what a block holds. A block with children is never evicted; others may be at
    any time, since turns copy blocks into their rows and refer to none.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._nodes

    def count(self, tenant: str) -> int:
        """Return how many blocks a tenant has."""
        found = self._tenants.get(tenant)
        return found.nodes if found else 0

    def find(self, key: bytes, now: float) -> Node | None:
        """Return a block, which thereby is of use now, or None."""
        node = self._nodes.get(key)
        if node:
            node.used = max(node.used, now)
        return node

    def insert(
        self,
        key: bytes,
        parent: bytes | None,
        payload: object,
        *,
        tenant: str,
        now: float,
        priority: float = 0.0,
    ) -> Node:
        """Add a block below `parent`, or below the tenant's root if that is None.

        Raises:
            KeyError: the parent is not in the tree, or the block is already.
        """
        if key in self._nodes:
            raise KeyError(key)
        above = None if parent is None else self._nodes[parent]
        node = Node(key, above, tenant, payload, now, priority)
        self._nodes[key] = node
        self._tenants.setdefault(tenant, _Tenant()).nodes += 1
        if above:
            above.children += 1
        self._queue(node)
        return node

    def evict(self, *, tenant: str | None = None, before: float | None = None) -> Node | None:
        """Remove the leaf of the lowest rank, of one tenant or of all, and return it.

        None if there is none; with `before`, if there is none that was last of use before that.
        """
        names = list(self._tenants) if tenant is None else [tenant]
        tops = [(top, name) for name in names if (top := self._top(name))]
        if not tops:
            return None
        node = min(tops, key=lambda item: item[0][:2])[0][2]
        if before is not None and node.used >= before:
            return None
        self._remove(node)
        return node

    def nodes(self) -> list[Node]:
        """Return all blocks, parents before children."""
        return list(self._nodes.values())

    def _remove(self, node: Node) -> None:
        del self._nodes[node.key]
        node.alive = False
        tenant = self._tenants[node.tenant]
        tenant.nodes -= 1
        if not tenant.nodes:
            del self._tenants[node.tenant]
        if node.parent:
            node.parent.children -= 1
            # Whoever used the child came through the parent.
            node.parent.used = max(node.parent.used, node.used)
            self._queue(node.parent)

    def _queue(self, node: Node) -> None:
        if node.alive and not (node.queued or node.children):
            node.queued = True
            leaves = self._tenants[node.tenant].leaves
            heapq.heappush(leaves, (node.rank, next(self._count), node))

    def _top(self, name: str) -> tuple[float, int, Node] | None:
        """Return the tenant's first leaf, after putting right what changed since it was queued."""
        tenant = self._tenants.get(name)
        while tenant and tenant.leaves:
            rank, _, node = tenant.leaves[0]
            if node.alive and not node.children and rank == node.rank:
                return tenant.leaves[0]
            heapq.heappop(tenant.leaves)
            node.queued = False
            self._queue(node)
        return None
