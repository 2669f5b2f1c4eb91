"""The prefix cache: between the turns' rows, the tree of shared blocks and the second tier."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from eloquent_server.engine.attention import KvLayout
from eloquent_server.engine.radix import BLOCK_TOKENS, PrefixTree, block_key, root_key
from eloquent_server.engine.turn import Turn

REUSED_PRIORITY = 1.0
"Of blocks that were of use again, so that prompts which never are do not drive them out."
MIN_RESTORED_BLOCKS = 4
"Fewer are computed as fast as they are read from the second tier."


class Tier(Protocol):
    """Where blocks go that the tree has no room for; see `tiers`."""

    @property
    def durable(self) -> bool:
        """Whether blocks survive the process."""

    def holds(self, key: bytes) -> bool:
        """Return whether a block is likely to be there."""

    def store(self, key: bytes, block: torch.Tensor) -> None:
        """Keep a block, if it can be had; returns at once. The block must not change any more."""

    def fetch(self, keys: Sequence[bytes], done: Callable[[list[torch.Tensor]], None]) -> None:
        """Call `done`, in another thread, with the blocks up to the first that cannot be had."""

    def close(self) -> None:
        """Keep what was offered, answer what was asked, and end."""


@dataclass(slots=True)
class PrefixStats:
    """Counted since the start, in tokens unless said otherwise."""

    prompt_tokens: int = 0
    "Of prompts whose prefill began."
    cached_tokens: int = 0
    "Of these, taken from the cache."
    restored_tokens: int = 0
    "Read from the second tier."
    published_blocks: int = 0
    evicted_blocks: int = 0


class PrefixCache:
    """Shares computed blocks between turns of one tenant, within a budget of bytes.

    The budget covers the tree and the running turns' rows; rows come first, and the tree gives way.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        budget_bytes: int,
        tenant_bytes: int | None = None,
        fingerprint: bytes = b"",
        tier: Tier | None = None,
        enabled: bool = True,
    ) -> None:
        """Start empty; `tenant_bytes` bounds what one tenant has in the tree.

        `enabled` false: nothing is shared, only the budget is kept.
        """
        self.stats = PrefixStats()
        self.tree = PrefixTree()
        self._layout = layout
        self._token_bytes = layout.shape.token_bytes
        self._block_bytes = BLOCK_TOKENS * self._token_bytes
        self.budget_bytes = budget_bytes
        self._tenant_blocks = None if tenant_bytes is None else tenant_bytes // self._block_bytes
        self._fingerprint = fingerprint
        self._tier = tier
        self._enabled = enabled
        self._row_tokens = 0
        # Blocks that turns are about to compute, and how many turns.
        self._coming: Counter[bytes] = Counter()
        self._claims: dict[int, list[bytes]] = {}

    @property
    def used_bytes(self) -> int:
        """What the tree and the running turns take."""
        return self._bytes_with(self._row_tokens)

    def set_row_tokens(self, tokens: int) -> None:
        """Say how many tokens the running turns have, or are about to have, in their rows."""
        self._row_tokens = tokens

    def make_row_room(self, tokens: int) -> bool:
        """Evict until the rows can take `tokens` more; False if that cannot be."""
        if self._row_tokens + tokens > self._layout.capacity_tokens:
            return False
        while self._bytes_with(self._row_tokens + tokens) > self.budget_bytes:
            if not self._evict():
                return False
        return True

    def take(self, turn: Turn, now: float) -> None:
        """Copy into the turn's row what the tree has next, as far as it goes without a gap."""
        if not self._enabled or turn.cached % BLOCK_TOKENS or turn.row is None:
            return
        last = (len(turn.tokens) - 1) // BLOCK_TOKENS  # One token at least is computed.
        blocks: list[torch.Tensor] = []
        for i in range(turn.cached // BLOCK_TOKENS, last):
            node = self.tree.find(self._key(turn, i), now)
            if not node:
                break
            assert isinstance(node.payload, torch.Tensor)
            node.priority = REUSED_PRIORITY
            blocks.append(node.payload)
        if blocks:
            self._layout.write(turn.row, turn.cached, blocks)
            self._advance(turn, len(blocks))

    def restore(self, turn: Turn, done: Callable[[int, list[torch.Tensor]], None]) -> bool:
        """Ask the second tier for what it has next; `done(start, blocks)` comes in its thread.

        False if it has too little to be worth it.
        """
        if not self._enabled or self._tier is None or turn.cached % BLOCK_TOKENS:
            return False
        start = turn.cached
        keys: list[bytes] = []
        for i in range(start // BLOCK_TOKENS, (len(turn.tokens) - 1) // BLOCK_TOKENS):
            key = self._key(turn, i)
            if key in self.tree or not self._tier.holds(key):
                break
            keys.append(key)
        if len(keys) < MIN_RESTORED_BLOCKS:
            return False
        self._tier.fetch(keys, lambda blocks: done(start, blocks))
        return True

    def restored(self, turn: Turn, start: int, blocks: Sequence[torch.Tensor], now: float) -> None:
        """Put blocks that the second tier delivered into the turn's row, and share them."""
        if turn.row is None or turn.cached != start or not blocks:
            return
        self._layout.write(turn.row, start, blocks)
        self._advance(turn, len(blocks))
        self.stats.restored_tokens += len(blocks) * BLOCK_TOKENS
        first = start // BLOCK_TOKENS
        for i, block in enumerate(blocks, first):
            key = self._key(turn, i)
            if not self.tree.find(key, now) and not self._share_block(turn, i, key, now, block):
                return
            if turn.published == i:
                turn.published = i + 1

    def must_wait(self, turn: Turn) -> bool:
        """Return whether another turn is about to compute the block that this one needs next."""
        i = turn.cached // BLOCK_TOKENS
        if not self._enabled or turn.cached % BLOCK_TOKENS or turn.id in self._claims:
            return False
        return i < (len(turn.tokens) - 1) // BLOCK_TOKENS and self._key(turn, i) in self._coming

    def claim(self, turn: Turn) -> None:
        """Say that the turn is about to compute the rest of its full blocks."""
        if self._enabled and turn.id not in self._claims:
            blocks = range(turn.cached // BLOCK_TOKENS, len(turn.tokens) // BLOCK_TOKENS)
            keys = [self._key(turn, i) for i in blocks]
            self._claims[turn.id] = keys
            self._coming.update(keys)

    def disclaim(self, turn: Turn) -> None:
        """The turn has computed what it claimed, or will not."""
        for key in self._claims.pop(turn.id, ()):
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

    def publish(self, turn: Turn, now: float, *, again: bool = False) -> None:
        """Share the full blocks of the turn's row, as far as there is room.

        What was evicted since it was published is shared anew only with `again`.
        """
        if not self._enabled or turn.row is None:
            return
        full = turn.cached // BLOCK_TOKENS
        first = 0 if again else min(turn.published, full)
        for i in range(first, full):
            key = self._key(turn, i)
            if not self.tree.find(key, now) and not self._share_block(turn, i, key, now):
                return
            turn.published = max(turn.published, i + 1)

    def persist(self, turn: Turn) -> None:
        """Offer the turn's published blocks to the second tier, so that they survive a restart."""
        if self._tier is None or not self._tier.durable:
            return
        for key in turn.keys[: turn.published]:
            node = self.tree.find(key, 0.0)
            if not node:
                return
            self._store(node.key, node.payload)

    def leave(self, turn: Turn, now: float) -> None:
        """Share what the turn's row holds up to `cached`, and free the row."""
        assert turn.row is not None
        self.disclaim(turn)
        self.publish(turn, now, again=True)
        self.persist(turn)
        self._layout.free(turn.row, clear=turn.poisoned)

    def close(self) -> None:
        """Offer all blocks to the second tier, if that outlives us, and close it."""
        if self._tier is None:
            return
        if self._tier.durable:
            for node in self.tree.nodes():
                self._store(node.key, node.payload)
        self._tier.close()

    def _bytes_with(self, row_tokens: int) -> int:
        rows = max(row_tokens * self._token_bytes, self._layout.fixed_bytes)
        return len(self.tree) * self._block_bytes + rows

    def _share_block(
        self, turn: Turn, i: int, key: bytes, now: float, block: torch.Tensor | None = None
    ) -> bool:
        """Put a block into the tree, a copy of the row's unless it is given; False: no room."""
        parent = turn.keys[i - 1] if i else None
        # Found, so of use now: making room below cannot evict it.
        if parent is not None and not self.tree.find(parent, now):
            return False
        over = self._tenant_blocks is not None and (
            self.tree.count(turn.tenant) >= self._tenant_blocks
        )
        # What was of use in this very step stays, or a turn would evict its own first blocks.
        if over and not self._evict(tenant=turn.tenant, before=now):
            return False
        while self.used_bytes + self._block_bytes > self.budget_bytes:
            if not self._evict(before=now):
                return False
        if block is None:
            assert turn.row is not None
            start = i * BLOCK_TOKENS
            block = self._layout.read(turn.row, start, start + BLOCK_TOKENS)
        self.tree.insert(key, parent, block, tenant=turn.tenant, now=now)
        self.stats.published_blocks += 1
        return True

    def _evict(self, *, tenant: str | None = None, before: float | None = None) -> bool:
        node = self.tree.evict(tenant=tenant, before=before)
        if not node:
            return False
        self.stats.evicted_blocks += 1
        self._store(node.key, node.payload)
        return True

    def _store(self, key: bytes, payload: object) -> None:
        if self._tier is not None and not self._tier.holds(key):
            assert isinstance(payload, torch.Tensor)
            self._tier.store(key, payload)

    def _advance(self, turn: Turn, blocks: int) -> None:
        turn.cached += blocks * BLOCK_TOKENS
        # Taken back after a preemption is not cached by somebody before.
        fresh = min(turn.cached, turn.prompt_tokens) - turn.reached
        if fresh > 0:
            turn.cached_prompt += fresh
            self.stats.cached_tokens += fresh
        turn.reached = max(turn.reached, turn.cached)

    def _key(self, turn: Turn, i: int) -> bytes:
        keys = turn.keys
        while len(keys) <= i:
            start = len(keys) * BLOCK_TOKENS
            parent = keys[-1] if keys else root_key(self._fingerprint, turn.tenant)
            keys.append(block_key(parent, turn.tokens[start : start + BLOCK_TOKENS]))
        return keys[i]
