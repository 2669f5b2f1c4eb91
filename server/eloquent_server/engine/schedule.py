"""Who goes first: tenants by what they have had, turns of one tenant by when their reader runs dry.

Between tenants, the virtual token counters of Sheng et al. ("Fairness in Serving Large Language
Models", OSDI 2024, algorithm 2): each token that is computed for a tenant counts, divided by the
tenant's weight, and who has had least goes first. Within a tenant, the earliest deadline: the
moment from which the reader waits. Newcomers have later ones, so nobody starves.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

DECODE_COST = 2.0
"A decoded token against a prompt's."
QUANTUM_TOKENS = 256
"A turn that decoded so many since it got its row gives it up to one that has waited `PATIENCE_S`."
PATIENCE_S = 1.0
BUFFERED_QUANTUM_TOKENS = 16
AMPLE_BUFFER_S = 3.0
"A reader with so much unread text misses nothing while another turn starts."
SHORT_TOKENS = 64
"Prompts with so little left go before longer ones, in up to half of a step's budget."


class Job(Protocol):
    """What scheduling needs to know of a turn."""

    id: int
    tenant: str
    weight: float
    arrived: float
    dry_at: float
    ran: int

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one."""


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(slots=True)
class _Account:
    spent: float
    "Tokens computed, over the weight."
    turns: int = 0


class FairShare:
    """The tenants' counters."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._floor = 0.0

    def enter(self, tenant: str) -> None:
        """A turn of the tenant is here; who was away starts level with the least served."""
        present = [a.spent for a in self._accounts.values() if a.turns]
        if present:
            self._floor = max(self._floor, min(present))
        account = self._accounts.setdefault(tenant, _Account(self._floor))
        if not account.turns:
            account.spent = max(account.spent, self._floor)
        account.turns += 1

    def leave(self, tenant: str) -> None:
        """A turn of the tenant has ended."""
        self._accounts[tenant].turns -= 1

    def charge(self, job: Job, *, prompt: int = 0, decoded: int = 0) -> None:
        """Count tokens that were computed for a turn."""
        cost = prompt + DECODE_COST * decoded
        self._accounts[job.tenant].spent += cost / job.weight

    def order(self, jobs: Iterable[AnyJob]) -> list[AnyJob]:
        """Return the turns, those that should go first first."""
        return sorted(
            jobs, key=lambda j: (self._accounts[j.tenant].spent, j.dry_at, j.arrived, j.id)
        )

    def last(self, running: Iterable[AnyJob]) -> AnyJob:
        """Return the turn to take the memory from: the one that would go last."""
        return self.order(running)[-1]

    def to_yield(self, running: Iterable[AnyJob], waiting: Job, now: float) -> AnyJob | None:
        """Return the running turn that should give its row to `waiting`, whose turn it is."""
        candidates = [job for job in running if self._may_yield(job, waiting, now)]
        return self.last(candidates) if candidates else None

    def _may_yield(self, job: Job, waiting: Job, now: float) -> bool:
        if job.pending > 1:
            return False
        if waiting.dry_at <= now and job.dry_at - now >= AMPLE_BUFFER_S:
            return job.ran >= BUFFERED_QUANTUM_TOKENS
        behind = self._accounts[waiting.tenant].spent <= self._accounts[job.tenant].spent
        return behind and job.ran >= QUANTUM_TOKENS and now - waiting.dry_at >= PATIENCE_S

    def tidy(self) -> None:
        """Forget tenants without turns whom the others have overtaken, or if nobody is left."""
        present = [a.spent for a in self._accounts.values() if a.turns]
        floor = min(present, default=math.inf)
        for tenant, account in list(self._accounts.items()):
            if not account.turns and account.spent <= floor:
                del self._accounts[tenant]


def split_budget(
    jobs: Sequence[AnyJob], budget: int, align: Callable[[AnyJob, int], int]
) -> list[int]:
    """Divide a step's prompt tokens among turns, in the order of `FairShare.order`.

    `align(job, tokens)` may shorten a share. Returns the shares in the order of `jobs`.
    """
    shares = [0] * len(jobs)
    short_room = budget // 2
    for i, job in enumerate(jobs):
        if job.pending <= min(SHORT_TOKENS, short_room):
            shares[i] = job.pending
            short_room -= job.pending
            budget -= job.pending
    for i, job in enumerate(jobs):
        if not shares[i] and budget > 0:
            shares[i] = align(job, min(job.pending, budget))
            budget -= shares[i]
    return shares
