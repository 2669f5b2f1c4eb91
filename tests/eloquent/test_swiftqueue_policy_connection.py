"""SwiftQueue's policy on two real QUIC ends, in virtual time."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eloquent.core.wire import Bundle, Frame
from eloquent.errors import ConfigurationError
from eloquent.quic.ecn import Ecn, EcnState
from eloquent.quic.marking import marking
from eloquent.swiftqueue.forecaster import Forecaster
from eloquent.swiftqueue.inference import Predictor
from eloquent.swiftqueue.policy import State, SwiftQueueMarking
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.serving import SwiftQueue, make
from eloquent_netem.lab.swiftqueue_flow import run_flow
from eloquent_netem.packet import Ecn as NetemEcn
from tests.eloquent.marking_world import MarkingWorld, Queues
from tests.eloquent.swiftqueue_line import BURST, CALM, Foretold, Outlooks
from tests.eloquent.test_swiftqueue_inference import FULL, random_model, write
from tests.swiftqueue_light import light


def foretells_c(now: float) -> Foretold:
    return Foretold(BURST, CALM)


def world_of(policy: SwiftQueueMarking, **options: object) -> MarkingWorld:
    return MarkingWorld(policy, **options)  # type: ignore[arg-type]


def finish(world: MarkingWorld, *talks: int) -> None:
    """End the answer; it must be what the talks of so many tokens said."""
    world.close()
    said = (f"{index} " for count in talks for index in range(count))
    assert world.texts[0] == "".join(said)
    assert world.broken == []


def marks(world: MarkingWorld, since_s: float) -> list[NetemEcn]:
    assert isinstance(world.down, Queues)
    return [packet.ecn for entered_s, packet in world.down.entered if entered_s >= since_s]


def test_bundles_go_into_the_queue_that_is_foretold_to_be_better() -> None:
    policy = SwiftQueueMarking(Outlooks(foretells_c))
    world = world_of(policy, down=Queues(l_s=0.05, c_s=0.02))
    world.talk(30)
    since_s = world.now
    world.talk(100)
    bundles = marks(world, since_s)
    assert bundles.count(NetemEcn.NOT_ECT) > 0.9 * len(bundles)
    assert policy.state is State.STEERING
    assert policy.counters.fallbacks == {}
    finish(world, 30, 100)


def test_what_is_copied_at_the_start_shows_both_queues() -> None:
    outlooks = Outlooks(lambda now: Foretold(CALM, CALM))
    world = world_of(SwiftQueueMarking(outlooks))
    world.talk(20)
    seen = [one.queue for one in outlooks.opened[0].seen]
    assert seen.count(Queue.C) >= 5
    assert seen.count(Queue.L) >= 15


def test_bleached_marks_leave_a_connection_without_marks_times_or_copies() -> None:
    policy = SwiftQueueMarking(Outlooks(foretells_c))
    world = world_of(policy, down=Queues(rewrite=lambda ecn: NetemEcn.NOT_ECT))
    world.talk(60)
    since_s, seen = world.now, policy.counters.copies
    world.talk(100)
    assert world.pair.server.quic.ecn_state is EcnState.FAILED
    assert policy.state is State.UNMARKED
    assert set(marks(world, since_s)) == {NetemEcn.NOT_ECT}
    assert policy.counters.copies == seen
    finish(world, 60, 100)


def test_a_client_whose_clock_is_set_is_distrusted_and_has_its_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = SwiftQueueMarking(Outlooks(foretells_c))
    world = world_of(policy)
    world.talk(60)
    assert policy.counters.fallbacks == {}
    world.pair.client._receivers[0]._clock_s -= 3600
    with caplog.at_level(logging.INFO, logger="eloquent.swiftqueue.policy"):
        world.talk(30)
    assert policy.counters.fallbacks == {"feedback": 1}
    assert len(caplog.records) == 1
    world.wait(0.5)
    since_s = world.now
    world.talk(30)
    assert NetemEcn.NOT_ECT not in marks(world, since_s)
    finish(world, 60, 30, 30)


def test_an_old_client_that_tells_no_times_is_sent_all_in_l() -> None:
    policy = SwiftQueueMarking(Outlooks(foretells_c))
    world = world_of(policy)
    take = world.pair.client._on_frame

    def untimed(frame: Frame, now: float) -> None:
        assert isinstance(frame, Bundle)
        take(replace(frame, is_timed=False), now)

    world.pair.client._on_frame = untimed  # type: ignore[method-assign]
    world.talk(40)
    since_s = world.now
    world.talk(100)
    packets = marks(world, since_s)
    assert packets.count(NetemEcn.NOT_ECT) <= 0.2 * len(packets)  # Copies are what goes into C.
    finish(world, 40, 100)


# The whole of it, with a model of random weights: nonsense, to which nothing may break.


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_foretells_nonsense_breaks_nothing(seed: int) -> None:
    model = random_model(FULL, np.random.default_rng(seed))
    swiftqueue = SwiftQueue(Forecaster(Predictor(model)))
    run = run_flow(light(), swiftqueue, seed=seed)  # It raises if the text does not arrive whole.
    assert run.reported_share > 0.8


def test_the_policies_of_an_endpoint_share_a_forecaster_and_are_their_own() -> None:
    swiftqueue = SwiftQueue(Forecaster(Predictor(random_model(FULL, np.random.default_rng(1)))))
    first, second = swiftqueue.policy(), swiftqueue.policy()
    assert first is not second
    swiftqueue.settle(1.0)
    first.close()
    assert second.next_codepoint(1.0, 250, is_copy=False) is Ecn.ECT_1


# Serving.


def test_weights_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.safetensors .* cannot be read"):
        make(tmp_path / "gone.safetensors")


def test_weights_of_a_path_are_served(tmp_path: Path) -> None:
    path = write(tmp_path, random_model(FULL, np.random.default_rng(1)))
    assert isinstance(make(path).policy(), SwiftQueueMarking)


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eloquent.swiftqueue.forecaster", None)
    with pytest.raises(ConfigurationError, match="SwiftQueue needs numpy and safetensors"):
        marking("swiftqueue")
