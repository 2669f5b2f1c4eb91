"""What the operator is told of losses: each case by hand."""

from eloquent.core.counts import LinkCounts
from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import UNKNOWN_COPIES, Path
from eloquent.core.schemes import SenderFactory, scheme
from eloquent.core.sender import Sender

ROOM = 1200


def sender_of(factory: SenderFactory) -> tuple[Sender, LinkCounts]:
    """Return a sender on a path that is known to be clean, and what it counts."""
    path = Path()
    for _ in range(UNKNOWN_COPIES):
        path.note_copy()
    return factory(0, TokenLog(), path), path.counts


def say(sender: Sender, now: float) -> int:
    """Send a token in a bundle of its own; return the bundle's number."""
    sender.log.append(TextDelta("token"))  # type: ignore[attr-defined]
    sender.log_grew(now)
    bundle = sender.next_bundle(now, ROOM)
    assert bundle is not None
    return bundle.number


def test_a_loss_that_a_later_bundle_makes_good_is_recovered() -> None:
    sender, counts = sender_of(scheme("eloquent"))
    first, second = say(sender, 0.0), say(sender, 0.03)
    sender.on_acked(second)
    sender.on_lost(first)
    assert counts == LinkCounts(bundles=2, lost_bundles=1, recovered_bundles=1)


def test_a_loss_of_what_nothing_else_carries_is_sent_again() -> None:
    sender, counts = sender_of(scheme("eloquent"))
    sender.on_lost(say(sender, 0.0))
    assert counts == LinkCounts(bundles=1, lost_bundles=1, resent_bundles=1)


def test_without_redundancy_nothing_is_recovered() -> None:
    sender, counts = sender_of(scheme("retransmit"))
    first, second = say(sender, 0.0), say(sender, 0.03)
    sender.on_acked(second)
    sender.on_lost(first)
    assert counts == LinkCounts(bundles=2, lost_bundles=1, resent_bundles=1)


def test_a_repeat_that_is_lost_is_lost_and_no_more() -> None:
    sender, counts = sender_of(scheme("eloquent"))
    first = say(sender, 0.0)
    repeat = sender.next_bundle(1.0, ROOM)
    assert repeat is not None
    sender.on_acked(first)
    sender.on_lost(repeat.number)
    assert counts == LinkCounts(bundles=2, lost_bundles=1)


def test_a_loss_that_proves_wrong_is_counted_as_late() -> None:
    sender, counts = sender_of(scheme("eloquent"))
    first, second = say(sender, 0.0), say(sender, 0.03)
    sender.on_acked(second)
    sender.on_lost(first)
    sender.on_acked(first)
    sender.on_acked(first)
    assert (counts.lost_bundles, counts.late_bundles) == (1, 1)
