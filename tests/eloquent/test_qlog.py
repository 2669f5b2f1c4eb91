"""qlog: what two real QUIC ends write can be read, names our frames, and holds no text."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.logger import QuicLoggerTrace

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender
from eloquent.core.turns import TurnProgress, TurnRequested
from eloquent.core.wire import Bundle, Report, encode_bundle, encode_report
from eloquent.errors import ConfigurationError
from eloquent.quic.connection import Connected, ConnectionEvent
from eloquent.quic.qlog import MAX_WAITING, RECORD_START, QlogDirectory, describe_frame
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link
from eloquent_netem.sim import simulate

QUESTION = "Whither zebras?"
ANSWER = ("Zebras ", "wander ", "nightly ", "through ", "Ouagadougou ", "quietly ")
START_S = 1.0
DEADLINE_S = 60.0
"Ends a hang; decides nothing."


def read(path: Path) -> list[dict[str, Any]]:
    """Read a JSON text sequence (RFC 7464)."""
    data = path.read_bytes()
    assert data.startswith(RECORD_START)
    assert data.endswith(b"\n")
    return [json.loads(record) for record in data.split(RECORD_START)[1:]]


class LoggedPair:
    """Both ends of a connection with a qlog, and one turn on it."""

    def __init__(self, directory: Path) -> None:
        self._log = TokenLog()
        self._turn = -1
        self._token_at: float | None = None
        self._texts = list(ANSWER)
        self.is_done = False
        up, down = (Link(delay_s=0.02, seed=0, name=name) for name in ("up", "down"))
        self.pair = QuicPair(
            up=up,
            down=down,
            make_sender=EloquentSender,
            on_client_event=self._on_client_event,
            on_server_event=self._on_server_event,
        )
        for end in (self.pair.client, self.pair.server):
            start_logging(end.quic, QlogDirectory(directory))

    def run(self) -> None:
        self.pair.connect(START_S)
        now = simulate(
            (self, *self.pair.actors), until=lambda: self.is_done, start_s=START_S, limit_s=60
        )
        self.pair.client.close("the client is done")
        self.pair.flush(now)
        simulate(
            self.pair.actors,
            until=lambda: self.pair.client.is_ended and self.pair.server.is_ended,
            start_s=now,
            limit_s=now + 60,
        )

    def next_time(self) -> float | None:
        return self._token_at

    def act(self, now: float) -> None:
        if self._texts:
            self._log.append(TextDelta(self._texts.pop(0)))
            self._token_at = now + 0.03
        else:
            self._token_at = None
            self._log.close("stop", model="m", prompt_tokens=1, completion_tokens=6)
        self.pair.server.log_grew(self._turn, now)
        self.pair.flush(now)

    def _on_client_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, Connected):
            self.pair.request(json.dumps({"messages": [{"content": QUESTION}]}).encode(), now)
        elif isinstance(event, TurnProgress):
            self.is_done |= not all(isinstance(item, TextDelta) for item in event.events)

    def _on_server_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            self._turn = event.turn
            self.pair.accept(event.turn, self._log)
            self._token_at = now


def start_logging(quic: Any, logger: QlogDirectory) -> None:
    """Give a connection that is made already the log that its configuration would have."""
    quic._configuration.quic_logger = logger
    quic._quic_logger = logger.start_trace(
        is_client=quic.configuration.is_client, odcid=quic.original_destination_connection_id
    )


def frames(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [
        frame
        for record in records[1:]
        if record["name"] == f"transport:{event}"
        for frame in record["data"]["frames"]
    ]


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    LoggedPair(tmp_path).run()
    return {path.stem.split("_")[1]: path for path in tmp_path.iterdir()}


def test_each_end_writes_a_file_named_after_the_connection(logs: dict[str, Path]) -> None:
    assert sorted(logs) == ["client", "server"]
    assert len({path.stem.split("_")[0] for path in logs.values()}) == 1
    for role, path in logs.items():
        header = read(path)[0]
        assert (header["qlog_format"], header["qlog_version"]) == ("JSON-SEQ", "0.3")
        assert header["trace"]["vantage_point"] == {"name": "eloquent", "type": role}
        assert header["trace"]["common_fields"]["ODCID"] == path.stem.split("_")[0]


def test_times_and_names_are_qlogs(logs: dict[str, Path]) -> None:
    for path in logs.values():
        events = read(path)[1:]
        assert all(set(event) == {"time", "name", "data"} for event in events)
        assert [event["time"] for event in events] == sorted(event["time"] for event in events)
        assert {"transport:packet_sent", "transport:packet_received"} <= {
            event["name"] for event in events
        }


@pytest.mark.parametrize(
    ("sender", "reader", "kind"), [("server", "client", "bundle"), ("client", "server", "report")]
)
def test_our_frames_are_named_where_they_are_sent_and_where_they_come(
    logs: dict[str, Path], sender: str, reader: str, kind: str
) -> None:
    sent, came = (
        [
            frame["eloquent"]
            for frame in frames(read(logs[role]), event)
            if frame.get("eloquent", {}).get("frame_type") == kind
        ]
        for role, event in ((sender, "packet_sent"), (reader, "packet_received"))
    )
    assert sent == came, "nothing was lost on the way"
    assert len(sent) >= 1
    if kind == "bundle":
        assert [frame["number"] for frame in sent] == list(range(len(sent)))
        assert all(frame["length"] > 0 and frame["turn"] == 0 for frame in sent)


def test_every_datagram_frame_is_named(logs: dict[str, Path]) -> None:
    for path in logs.values():
        for event in ("packet_sent", "packet_received"):
            datagrams = [f for f in frames(read(path), event) if f["frame_type"] == "datagram"]
            assert datagrams
            assert all("eloquent" in frame for frame in datagrams)


def test_padding_is_named(logs: dict[str, Path]) -> None:
    kinds = [frame["frame_type"] for frame in frames(read(logs["server"]), "packet_sent")]
    assert kinds.count("padding") >= len(ANSWER) - 1


def test_no_text_and_no_token_that_lets_others_speak_gets_into_the_file(
    logs: dict[str, Path],
) -> None:
    for path in logs.values():
        content = path.read_bytes()
        for word in (QUESTION, *ANSWER):
            assert word.strip().encode() not in content
            assert word.strip().encode().hex().encode() not in content
        for frame in frames(read(path), "packet_sent") + frames(read(path), "packet_received"):
            assert not {"reset_token", "token"} & set(frame)
        assert b"stateless_reset_token" not in content


def test_the_file_is_for_its_owner_alone(logs: dict[str, Path]) -> None:
    assert all(path.stat().st_mode & 0o077 == 0 for path in logs.values())


def start(tmp_path: Path) -> tuple[QlogDirectory, QuicLoggerTrace, Path]:
    directory = QlogDirectory(tmp_path / "new" / "folder")
    trace = directory.start_trace(is_client=True, odcid=b"\x01\x02")
    return directory, trace, tmp_path / "new" / "folder" / "0102_client.sqlog"


def log_packet(trace: QuicLoggerTrace, number: int) -> list[dict[str, Any]]:
    frames_of_it: list[dict[str, Any]] = []
    trace.log_event(
        category="transport", event="packet_received", data={"n": number, "frames": frames_of_it}
    )
    return frames_of_it


def test_a_long_connection_is_written_as_it_goes(tmp_path: Path) -> None:
    _, trace, path = start(tmp_path)
    for number in range(1000):
        log_packet(trace, number)
        assert len(trace._waiting) <= 1, "events are kept in memory"  # type: ignore[attr-defined]
    assert len(read(path)) == 1000, "the header and all packets but the last, which may grow"


def test_frames_that_are_filled_in_after_the_packet_was_logged_are_there(tmp_path: Path) -> None:
    directory, trace, path = start(tmp_path)
    log_packet(trace, 0).append({"frame_type": "ping"})
    trace.log_event(category="recovery", event="metrics_updated", data={})
    directory.end_trace(trace)
    assert read(path)[1]["data"]["frames"] == [{"frame_type": "ping"}]
    assert [event["name"] for event in read(path)[1:]] == [
        "transport:packet_received",
        "recovery:metrics_updated",
    ]


def test_many_events_without_a_packet_are_bounded(tmp_path: Path) -> None:
    _, trace, _ = start(tmp_path)
    for _ in range(10 * MAX_WAITING):
        trace.log_event(category="recovery", event="metrics_updated", data={})
        assert len(trace._waiting) <= MAX_WAITING  # type: ignore[attr-defined]


def test_a_connection_that_is_dropped_finishes_its_file(tmp_path: Path) -> None:
    directory, trace, path = start(tmp_path)
    file = trace._file  # type: ignore[attr-defined]
    log_packet(trace, 0)
    del trace
    gc.collect()
    assert len(read(path)) == 2
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file)
    del directory


def test_events_after_the_end_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, trace, path = start(tmp_path)
    directory.end_trace(trace)
    for number in range(3):
        log_packet(trace, number)
    assert len(read(path)) == 1
    assert not caplog.records, "something was written to a file that is closed"


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file"):
        QlogDirectory(tmp_path / "file" / "folder")


def test_a_directory_that_is_gone_later_costs_the_log_and_not_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = QlogDirectory(tmp_path / "logs")
    (tmp_path / "logs").rmdir()
    trace = logs.start_trace(is_client=False, odcid=b"12345678")
    trace.log_event(category="transport", event="packet_sent", data={})
    logs.end_trace(trace)
    assert "cannot be made: No such file or directory" in caplog.text


def test_frames_are_described_without_their_text() -> None:
    bundle = describe_frame(encode_bundle(Bundle(3, 4, 5, b"secret")))
    assert bundle == {
        "eloquent": {"frame_type": "bundle", "turn": 3, "number": 4, "offset": 5, "length": 6}
    }
    report = describe_frame(encode_report(Report(3, 4, 5)))["eloquent"]
    assert (report["frame_type"], report["contiguous"], report["newest"]) == ("report", 4, 5)
    assert describe_frame(b"\xff") == {"eloquent": {"frame_type": "malformed"}}


@pytest.mark.parametrize("option", ["--padding", "--no-padding"])
def test_serve_writes_a_log_and_pads_as_it_is_told(tmp_path: Path, option: str) -> None:
    command = [sys.executable, "-m", "eloquent"]
    with subprocess.Popen(
        [*command, "serve", "--model=echo", "--port=0", "--exit-with-parent", option],
        env=os.environ | {"ELOQUENT_QLOG": str(tmp_path / "serve")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("LISTENING ").strip()
        asked = [*command, "ask", "Whither?", "--url", url]
        subprocess.run(asked, check=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_S)
        server.communicate("", timeout=DEADLINE_S)
    (file,) = (tmp_path / "serve").iterdir()
    assert file.name.endswith("_server.sqlog")
    bundles = [
        [frame["frame_type"] for frame in record["data"]["frames"]]
        for record in read(file)[1:]
        if record["name"] == "transport:packet_sent"
        and any("eloquent" in frame for frame in record["data"]["frames"])
    ]
    assert bundles
    assert any("padding" in kinds for kinds in bundles) == (option == "--padding")
    assert b"Whither" not in file.read_bytes()
