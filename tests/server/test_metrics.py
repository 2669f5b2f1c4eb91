"""What `/metrics` says is what happened, counted by hand."""

import asyncio
import datetime
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import RequestError
from eloquent.quic.certificate import make_certificate
from eloquent.quic.listen import listen
from eloquent.url import ServerUrl
from eloquent.websocket import server as websocket
from eloquent_client import APIStatusError, Client
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    Backend,
    BackendEvent,
    Continuation,
    ContinuingBackend,
    Finish,
    StoredAnswer,
)
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.gateway import Gateway
from eloquent_server.metered import MeteredBackend
from eloquent_server.meters import Histogram, ModelMeters
from eloquent_server.metrics import Metrics, Sources
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHub

HOST = "127.0.0.1"
DEADLINE_S = 60.0
"Ends a hang; decides nothing."
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
}


def samples_of(metrics: Metrics) -> dict[str, float]:
    """Return what is said, by name and the values of the labels, the model's left out."""
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        ":".join(
            (
                sample.name,
                *(
                    value
                    for label, value in sorted(sample.labels.items())
                    if label not in ("model_name", "engine")
                ),
            )
        ): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@dataclass
class Served:
    """A server on loopback, and what it says of itself."""

    url: ServerUrl
    metrics: Metrics
    hub: TurnHub

    @property
    def samples(self) -> dict[str, float]:
        return samples_of(self.metrics)

    async def until(self, name: str, value: float) -> dict[str, float]:
        """Wait until a metric is so; return all of them then."""
        async with asyncio.timeout(DEADLINE_S):
            while self.samples[name] != value:  # noqa: ASYNC110 (nothing wakes it)
                await asyncio.sleep(0.01)
        return self.samples


@asynccontextmanager
async def serving(backend: ContinuingBackend) -> AsyncIterator[Served]:
    certificate = make_certificate(HOST, datetime.datetime.now(datetime.UTC))
    metered, store = MeteredBackend(backend), TokenStore.open(None)
    gateway = Gateway(metered)
    hub = TurnHub(gateway.handle, store, go_on=gateway.go_on)
    over_udp = await listen(HOST, 0, certificate=certificate, service=hub)
    over_tcp = await websocket.listen(HOST, 0, certificate=certificate, service=hub)
    sources = Sources(
        backend=metered,
        hub=hub,
        store=store,
        quic=over_udp,
        websocket=over_tcp,
        inner=lambda: backend,
    )
    try:
        yield Served(ServerUrl(HOST, over_udp.port, certificate.pin), Metrics(sources), hub)
    finally:
        await hub.close()
        await over_udp.close()
        await over_tcp.close()


def asking(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_a_run_is_told_as_it_was() -> None:
    async with serving(EchoBackend(500)) as served, Client(served.url) as client:
        before = served.samples
        assert before["vllm:generation_tokens_total"] == before["vllm:num_requests_running"] == 0
        assert served.samples["eloquent:connections:datagrams"] == 0
        async with client.stream(asking("one two three")) as stream:
            await stream.get_final_message()
        async with client.stream(asking("one two three four"), max_tokens=2) as stream:
            await stream.get_final_message()
        with pytest.raises(APIStatusError, match="no-such"):
            async with client.stream(asking("one"), model="no-such") as declined:
                await declined.get_final_message()
        async with client.stream(asking("and so on " * 5000)) as stream:
            await anext(stream.text_stream)
            now = await served.until("eloquent:readers", 1)
            assert now["vllm:num_requests_running"] == now["eloquent:turns:generating"] == 1
            async with Client(served.url) as other:
                async with other.resume(stream.token, is_owner=False) as again:
                    await anext(again.text_stream)
                    await served.until("eloquent:readers", 2)
                await served.until("eloquent:readers", 1)
        after = await served.until("vllm:request_success_total:abort", 1)
        assert after["vllm:request_success_total:stop"] == 1
        assert after["vllm:request_success_total:length"] == 1
        assert after["eloquent:generations_total"] == 3
        assert after["eloquent:generations_continued_total"] == 0
        assert after["vllm:prompt_tokens_total"] == 3 + 4
        assert after["vllm:time_to_first_token_seconds_count"] == 3
        assert after["vllm:e2e_request_latency_seconds_count"] == 2
        said = after["vllm:generation_tokens_total"]
        assert said > 3 + 2
        assert after["vllm:inter_token_latency_seconds_count"] == said - 3
        assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
        assert after["eloquent:resumes_total"] == 1
        assert after["eloquent:refusals_total:unknown_model:quic"] == 1
        assert after["eloquent:handshakes_total:begun:quic"] == 2
        assert after["eloquent:connections:datagrams"] >= 1
        assert after["eloquent:rtt_seconds:0.5"] > 0
        assert after["eloquent:loss_ratio:0.99"] >= 0
        assert after["eloquent:bundles_total:sent"] >= 3
        assert after["eloquent:udp_bytes_total:server"] > 45_000, "what was asked"
        assert after["eloquent:store_turns"] == 3
        assert after["eloquent:store_flush_seconds_count"] > 0
        assert after["process_resident_memory_bytes"] > 0


async def test_what_means_the_same_has_vllms_names_and_labels() -> None:
    async with serving(EchoBackend()) as served:
        families = list(text_string_to_metric_families(served.metrics.render()[0].decode()))
    assert {family.name for family in families} >= VLLM
    for family in families:
        for sample in family.samples:
            assert sample.name.startswith(("vllm:", "eloquent:", "process_"))
            if sample.name.startswith("vllm:"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("echo", "0")


async def test_refusals_are_told_before_there_is_one() -> None:
    """What appears with its first one has no rate before the second."""
    async with serving(EchoBackend()) as served:
        samples = served.samples
    for reason in ("no_key", "wrong_key", "expired_key", "turns", "requests", "bytes", "all_turns"):
        assert samples[f"eloquent:requests_refused_total:{reason}"] == 0


class Scripted:
    """Says and does what it is told; its clock goes on as it is told, too."""

    def __init__(self, *script: BackendEvent | float | Exception) -> None:
        self._script = script
        self.now = 100.0

    @property
    def models(self) -> Sequence[str]:
        return ("first", "second")

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        for step in self._script:
            if isinstance(step, float):
                self.now += step
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        return self.generate(body, asker)

    async def close(self) -> None:
        pass

    async def stats(self) -> Mapping[str, int]:
        return {"kv_bytes": 30, "kv_capacity_bytes": 120, "preemptions": 7}


async def measured(
    scripted: Scripted, *, body: dict[str, str] | None = None, take: int = 1000, new: bool = True
) -> ModelMeters:
    """Have an answer generated, of which so many events are taken; return what was measured."""
    backend = MeteredBackend(scripted, clock=lambda: scripted.now)
    is_backend: Backend = backend
    answer = (
        is_backend.generate(json.dumps(body or {}).encode())
        if new
        else backend.resume(b"{}", StoredAnswer((), ()))
    )
    assert isinstance(answer, AsyncGenerator)
    try:
        async for _ in answer:
            take -= 1
            if not take:
                break
    finally:
        await answer.aclose()
    (meters,) = backend.by_model.values()
    return meters


WORD = TextDelta("word")


async def test_times_are_those_from_one_event_to_the_next() -> None:
    finish = Finish("stop", prompt_tokens=20, completion_tokens=5, cached_tokens=16)
    meters = await measured(Scripted(2.0, WORD, 0.25, WORD, 0.5, WORD, 3.0, finish))
    assert (meters.ttft.sum, sum(meters.ttft.counts)) == (2.0, 1)
    assert (meters.gap.sum, sum(meters.gap.counts)) == (0.75, 2)
    assert (meters.latency.sum, sum(meters.latency.counts)) == (5.75, 1)
    assert (meters.prompt_tokens, meters.cached_tokens) == (20, 16)
    assert meters.generation_tokens == 5, "three events, five tokens"
    assert meters.finished == {"stop": 1}


async def test_an_answer_that_is_gone_on_with_is_no_second_one() -> None:
    finish = Finish("stop", prompt_tokens=20, completion_tokens=50)
    meters = await measured(Scripted(2.0, WORD, 1.0, finish), new=False)
    assert (meters.generations, meters.continued) == (0, 1)
    assert sum(meters.ttft.counts) == sum(meters.latency.counts) == 0
    assert meters.generation_tokens == 50, "those of the process before count as well"


@pytest.mark.parametrize(
    ("script", "take", "finished"),
    [
        ((WORD, WORD), 1, {"abort": 1}),
        ((WORD, Finish("cancelled", 1, 1)), 1000, {"abort": 1}),
        ((WORD, Failure("engine_error", "It died.")), 1000, {"error": 1}),
        ((WORD, Finish("a reason of the engine's", 1, 1)), 1000, {"other": 1}),
        ((RequestError("prompt_too_long", "It is."),), 1000, {}),
        ((WORD, ZeroDivisionError()), 1000, {"error": 1}),
        ((ZeroDivisionError(),), 1000, {"error": 1}),
    ],
    ids=["let go", "cancelled", "failed", "unknown", "declined", "fault", "fault at once"],
)
async def test_however_a_turn_ends_none_is_left_running(
    script: tuple[BackendEvent | float | Exception, ...], take: int, finished: dict[str, int]
) -> None:
    scripted = Scripted(*script)
    backend = MeteredBackend(scripted, clock=lambda: scripted.now)
    answer = backend.generate(b"{}")
    assert isinstance(answer, AsyncGenerator)
    try:
        async for _ in answer:
            take -= 1
            if not take:
                break
        await answer.aclose()
    except (RequestError, ZeroDivisionError):
        pass
    (meters,) = backend.by_model.values()
    assert (meters.waiting, meters.running) == (0, 0)
    assert meters.finished == finished
    assert meters.generations == sum(finished.values())


@pytest.mark.parametrize("is_new", [True, False])
async def test_counts_only_grow_though_a_turn_is_declined(is_new: bool) -> None:
    """Prometheus takes a count that has fallen for one that began anew, and adds all of it."""
    asked, declines = asyncio.Event(), asyncio.Event()

    class Declining(Scripted):
        async def generate(
            self, body: bytes, asker: Asker = ANYBODY
        ) -> AsyncGenerator[BackendEvent]:
            yield Continuation(b"the model's name")
            asked.set()
            await declines.wait()
            raise RequestError("upstream_error", "It is down.")

    backend = MeteredBackend(Declining())
    stored = StoredAnswer((), ())
    answer = backend.generate(b"{}") if is_new else backend.resume(b"{}", stored)
    counts = []

    async def ask() -> None:
        async for _ in answer:
            pass

    asking = asyncio.ensure_future(ask())
    await asked.wait()
    (meters,) = backend.by_model.values()
    assert meters.waiting == 1
    counts.append((meters.generations, meters.continued))
    declines.set()
    with pytest.raises(RequestError):
        await asking
    counts.append((meters.generations, meters.continued))
    assert counts == [(0, 0), (0, 0)]
    assert (meters.waiting, meters.finished) == (0, {})


async def test_who_waits_for_the_model_to_load_is_counted_as_its_turn() -> None:
    loaded: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
    async with serving(LoadingBackend(loaded)) as served, Client(served.url) as client:
        async with client.stream(asking("one two three")) as stream:
            waiting = asyncio.ensure_future(stream.get_final_message())
            await served.until("vllm:num_requests_waiting", 1)
            loaded.set_result(EchoBackend())
            await waiting
        async with client.stream(asking("one")) as stream:
            await stream.get_final_message()
        await served.until("vllm:request_success_total:stop", 2)
        families = list(text_string_to_metric_families(served.metrics.render()[0].decode()))
    labelled = [each for family in families for each in family.samples if "engine" in each.labels]
    assert {each.labels["model_name"] for each in labelled} == {"echo"}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "second"}', "second"),
        (b'{"model": "of a name that somebody made up"}', "first"),
        (b'{"model": 7}', "first"),
        (b"{}", "first"),
        (b"no JSON", "first"),
        (b'{"model": "\xff"}', "first"),
        pytest.param(b'{"a":' + b"[" * 100_000, "first", id="deep"),
    ],
)
async def test_a_label_is_one_of_the_backends_models(body: bytes, name: str) -> None:
    backend = MeteredBackend(Scripted(WORD))
    async for _ in backend.generate(body):
        pass
    assert list(backend.by_model) == [name]


def test_a_histogram_counts_by_upper_bounds() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 7.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert histogram.sum == 15.0


async def test_the_engine_is_asked_at_each_scrape() -> None:
    async with serving(Scripted()) as served:
        assert "vllm:kv_cache_usage_perc" not in served.samples
        await served.metrics.scrape()
        assert served.samples["vllm:kv_cache_usage_perc"] == 0.25
        assert served.samples["vllm:num_preemptions_total"] == 7


def test_without_the_package_there_is_a_sentence() -> None:
    code = (
        "import sys\n"
        "sys.modules['prometheus_client'] = None\n"
        "from eloquent.errors import ConfigurationError\n"
        "try:\n"
        "    import eloquent_server.metrics\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert "prometheus-client, which is not installed: pip install" in done.stdout
