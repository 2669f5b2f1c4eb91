"""Copies for the other queue: when there is one, what it carries, and where it goes."""

from itertools import pairwise

import pytest

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import UNKNOWN_COPIES, Path
from eloquent.core.schemes import (
    BULK_BYTES,
    COPY_WITHIN_S,
    REST_S,
    SPARSE_AFTER_S,
    EloquentSender,
    QueuedSender,
)
from eloquent.core.sender import NOW
from eloquent.quic.ecn import Ecn, EcnState
from eloquent_netem.link import Link
from eloquent_netem.loss import NoLoss, Outages
from eloquent_netem.packet import Ecn as NetemEcn
from eloquent_netem.packet import Packet
from tests.eloquent.marking_world import (
    Left,
    MarkingWorld,
    Noting,
    Queues,
    by_turns,
    copies_in_c,
)

ROOM = 1150


def pairs(left: list[Left]) -> list[tuple[Left, Left]]:
    """Each copy behind what left before it."""
    return [(before, after) for before, after in pairwise(left) if after.is_copy]


def every(number: int) -> object:
    return lambda count: count % number == 0


def seasoned(policy: Noting, **options: object) -> MarkingWorld:
    """A world past its first bundles, of which each has a copy; what they did is forgotten."""
    world = MarkingWorld(policy, **options)  # type: ignore[arg-type]
    world.talk(UNKNOWN_COPIES + 2)
    world.left.clear()
    for notes in (policy.asked_copies, policy.is_copy, policy.sent, policy.arrivals):
        notes.clear()
    return world


def test_what_the_policy_wants_twice_leaves_twice_at_once_and_by_the_queue_it_says() -> None:
    policy = Noting(copies_in_c, wants_copy=every(5))  # type: ignore[arg-type]
    world = seasoned(policy)
    world.talk(50)
    assert len(world.left) == 60
    assert len(policy.asked_copies) == 50  # for each bundle, and for no copy
    assert len(pairs(world.left)) == len(policy.copies) == 10
    for before, copy in pairs(world.left):
        assert copy.at_s == before.at_s
        assert copy.bundle.number == before.bundle.number + 1
        assert (copy.bundle.offset, copy.bundle.data) == (before.bundle.offset, before.bundle.data)
    assert {packet.codepoint for packet in policy.copies} == {Ecn.NOT_ECT}
    assert len(policy.arrivals) >= 58  # copies are timed, too


def test_the_earlier_of_the_two_renders() -> None:
    policy = Noting(copies_in_c, wants_copy=lambda count: True)
    world = seasoned(policy, down=Queues(l_s=0.3, c_s=0.02))
    world.say(0, "here")
    world.wait(0.03)
    assert world.texts[0].endswith("here")


def test_a_policy_that_does_not_choose_between_queues_gets_no_copies() -> None:
    policy = Noting(wants_times=False)
    world = seasoned(policy)
    world.talk(10)
    world.wait(2.0)
    world.talk(1)
    world.close()
    assert policy.copies == []


def test_the_end_of_an_answer_leaves_twice() -> None:
    policy = Noting(copies_in_c)
    world = seasoned(policy)
    world.talk(10)
    assert pairs(world.left) == []
    end = world.now
    world.close()
    ((before, copy),) = pairs(world.left)
    assert before.at_s == copy.at_s == end
    assert copy.bundle.offset + len(copy.bundle.data) == world.logs[0].length
    assert len(policy.copies) == 1


@pytest.mark.parametrize(("rest_s", "copies"), [(0.5, 0), (1.2, 1), (8.0, 1)])
def test_the_first_token_after_a_rest_leaves_twice(rest_s: float, copies: int) -> None:
    policy = Noting(copies_in_c)
    world = seasoned(policy)
    world.wait(rest_s)
    world.talk(10)
    assert len(pairs(world.left)) == len(policy.copies) == copies
    assert world.left[1].is_copy == (copies == 1)


def test_the_first_token_after_an_outage_leaves_twice() -> None:
    policy = Noting(copies_in_c)
    down = Queues(loss=Outages([(6.5, 8.0)], NoLoss()))
    up = Link(delay_s=0.02, seed=0, name="up", loss=Outages([(6.5, 8.0)], NoLoss()))
    world = seasoned(policy, down=down, up=up)
    world.talk(100)
    first, second = (left for left in world.left if 8.031 < left.at_s < 8.05)
    assert (first.at_s, first.is_copy) == (second.at_s, not second.is_copy)
    assert second.bundle.data == first.bundle.data
    during = [left for left in world.left if 7.75 < left.at_s < 8.0]
    assert len(during) > 5
    assert not any(left.is_copy for left in during)


def test_where_marks_fail_there_are_no_copies() -> None:
    policy = Noting(copies_in_c, wants_copy=lambda count: True)
    world = seasoned(policy, down=Queues(rewrite=lambda ecn: NetemEcn.NOT_ECT))
    assert world.pair.server.quic.ecn_state is EcnState.FAILED
    world.talk(10)
    world.close()
    assert pairs(world.left) == []
    assert policy.asked_copies == []


def test_a_copy_follows_at_once_though_other_turns_are_due() -> None:
    policy = Noting(copies_in_c, wants_copy=lambda count: True)
    world = seasoned(policy, turns=4)
    for log in world.logs.values():
        log.append(TextDelta("all at once"))
    for turn in world.logs:
        world.pair.server.log_grew(turn, world.now)
    world.pair.flush(world.now)
    world.wait(0.01)
    assert [left.is_copy for left in world.left] == [False, True] * 4
    assert [left.bundle.turn for left in world.left] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_burst_of_full_packets_is_copied_packet_by_packet() -> None:
    policy = Noting(copies_in_c, wants_copy=lambda count: count % 2 == 0)
    up = Link(delay_s=0.001, seed=0, name="up")
    world = seasoned(policy, down=Queues(l_s=0.001, c_s=0.001), up=up)
    world.logs[0].append(TextDelta("x" * 20_000))
    world.pair.log_grew(0, world.now)
    world.wait(1.0)
    assert len(world.texts[0]) > 20_000
    copied = pairs(world.left)
    assert len(copied) > 2
    for before, copy in copied:
        assert (copy.bundle.offset, copy.bundle.data) == (before.bundle.offset, before.bundle.data)


def test_copies_for_loss_are_copies_and_there_is_no_third() -> None:
    """Nothing is known of a new path, so each bundle is repeated."""
    policy = Noting(copies_in_c, wants_copy=lambda count: True)
    world = MarkingWorld(policy)
    world.talk(20)
    assert policy.asked_copies == []
    assert [left.is_copy for left in world.left] == [False, True] * 20
    assert {packet.codepoint for packet in policy.copies} == {Ecn.NOT_ECT}
    assert len(policy.copies) == 20


class DropsEvery(Queues):
    """Loses the tenth packet of a codepoint, the twentieth, and so on."""

    def __init__(self, codepoint: NetemEcn) -> None:
        super().__init__()
        self._codepoint = codepoint
        self._count = 0
        self.dropped = 0

    def send(self, now: float, packet: Packet) -> None:
        self._count += packet.ecn is self._codepoint
        if packet.ecn is self._codepoint and self._count % 10 == 0:
            self.dropped += 1
        else:
            super().send(now, packet)


@pytest.mark.parametrize(
    ("codepoint", "is_lossy"), [(NetemEcn.ECT_1, True), (NetemEcn.NOT_ECT, False)]
)
def test_drops_in_the_classic_queue_are_congestion_and_bring_no_copies(
    codepoint: NetemEcn, is_lossy: bool
) -> None:
    policy = Noting(by_turns)
    world = seasoned(policy)
    world.pair._server_end._outbound = down = DropsEvery(codepoint)
    world.pair._client_end._inbound = down
    world.talk(60)
    assert down.dropped >= 3
    assert len(policy.lost) >= 2
    assert world.pair.server.path.is_lossy is is_lossy
    assert (len(policy.copies) > 10) is is_lossy


# The sender by itself.


def sender(path: Path, length: int = 50, *, queued: bool = False) -> EloquentSender:
    log = TokenLog()
    log.append(TextDelta("x" * length))
    made = (QueuedSender if queued else EloquentSender)(0, log, path)
    made.log_grew(1.0)
    return made


def known_path() -> Path:
    path = Path(srtt_s=0.1)
    for _ in range(UNKNOWN_COPIES):
        path.note_copy()
    path.wants_copy = lambda now: True
    return path


def test_a_copy_is_due_at_once_and_made_once() -> None:
    path = known_path()
    made = sender(path)
    first = made.next_bundle(1.0, ROOM)
    assert first is not None
    assert made.is_copy_due
    assert made.next_time() == NOW
    copy = made.next_bundle(1.0, ROOM)
    assert copy is not None
    assert (copy.number, copy.data) == (1, first.data)
    assert not made.is_copy_due
    assert made.next_bundle(1.0, ROOM) is None


def test_a_copy_that_cannot_leave_at_once_does_not_leave() -> None:
    made = sender(known_path())
    assert made.next_bundle(1.0, ROOM) is not None
    assert made.next_bundle(1.0 + COPY_WITHIN_S + 1e-4, ROOM) is None
    assert not made.is_copy_due


def test_a_copy_that_does_not_fit_its_packet_does_not_leave() -> None:
    made = sender(known_path())
    assert made.next_bundle(1.0, ROOM) is not None
    assert made.next_bundle(1.0, 40) is None
    assert not made.is_copy_due


def test_a_queue_forbids_copies_for_loss_and_not_those_for_the_other_queue() -> None:
    path = known_path()
    path.on_loss_elsewhere()
    path.has_queue = True
    path.wants_copy = None
    made = sender(path)
    assert made.next_bundle(1.0, ROOM) is not None
    assert made.next_bundle(1.0, ROOM) is None
    path.wants_copy = lambda now: True
    made = sender(path)
    assert made.next_bundle(1.0, ROOM) is not None
    assert made.next_bundle(1.0, ROOM) is not None


def test_a_window_too_small_for_a_packet_per_token_has_no_room_for_copies() -> None:
    path = known_path()
    path.window_bytes = 300
    path.has_two_queues = True
    made = sender(path)
    assert made.next_bundle(1.0, ROOM) is not None
    assert not made.is_copy_due


def test_there_are_no_copies_in_an_outage() -> None:
    path = known_path()
    path.has_two_queues = True
    made = sender(path)
    path.waiting_since = 0.9
    assert made.next_bundle(1.0 + SPARSE_AFTER_S, ROOM) is not None
    assert path.is_silent
    assert not made.is_copy_due


def test_repeats_of_the_tail_have_no_copies() -> None:
    path = known_path()
    path.wants_copy = lambda now: False
    path.has_two_queues = True
    made = sender(path)
    assert isinstance(made.log, TokenLog)
    made.log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)
    made.log_grew(1.0)
    assert made.next_bundle(1.0, ROOM) is not None
    assert made.is_copy_due
    assert made.next_bundle(1.0, ROOM) is not None
    due = made.next_time()
    assert due is not None
    assert due - 1.0 < REST_S
    assert made.next_bundle(due, ROOM) is not None
    assert not made.is_copy_due


def test_copies_of_queued_bundles_wait_behind_them() -> None:
    path = known_path()
    made = sender(path, BULK_BYTES // 2, queued=True)
    bundles = [made.next_bundle(1.0, 1200) for _ in range(2)]
    assert [bundle.offset for bundle in bundles if bundle is not None] == [0, 0]
