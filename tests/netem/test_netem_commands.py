"""`eloquent netem`: what it prints, and that its errors are one sentence and exit code 1."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eloquent_netem.commands import netem
from eloquent_netem.scenario import library_names

ELOQUENT = Path(sys.executable).parent / "eloquent"

DIGESTS_OF_SEED_3 = {
    "clean": "053ddea6814a6d11eb5a9d512cd36e7741c664b420f6b4f36bcff26cbe8b3a13",
    "lossy-5": "e9c2893edb3758e25815f9150b02409f544d7dc63ccf7e417bd836062e9841a1",
    "outage-3s": "27158a63de15cd4209f409a75c891c5991b5fde5fb8d2ae6ecea472d6fbb4e81",
    "bursts-150ms": "f3a4607c550a8d3d46c68b37d108d67879cc63fecb262932a041d27f95119eed",
    "handover": "501b9d13f4dd8d79fe1ce3258bc52c8914a739986f2936f4c27277b770417225",
}
"Published: who quotes one of them must be able to find it again."


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    netem(arguments, result_action="return_value")
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        netem(arguments, result_action="return_value")
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def in_a_process(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ELOQUENT), "netem", *arguments],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


def test_list_has_a_line_for_each_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == list(library_names())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", library_names())
def test_show_has_the_figures(capsys: pytest.CaptureFixture[str], name: str) -> None:
    shown = run(capsys, "show", name)
    for heading in ("round trip", "up (client to server)", "down (server to client)", "queue:"):
        assert heading in shown


def test_show_says_every_figure_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "road.down").write_text("1\n2\n")
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        description = "all there is"
        length_s = 33
        seed = 44
        outages = [{ kind = "spans", spans_s = [[1.5, 2.5]], effect = "drop" }]
        [up]
        delay_ms = 17
        jitter_ms = 6
        duplicate = 0.07
        loss = { kind = "independent", probability = 0.013 }
        rate = { kind = "trace", file = "road.down" }
        queue = { kind = "codel", target_ms = 9, interval_ms = 90, ecn = true }
        [[up.outages]]
        kind = "handovers"
        every_s = 12
        lasting_ms = 123
        effect = "hold"
        [down]
        delay_ms = 18
        loss = { kind = "drop-list", indices = [8, 64] }
        rate = { kind = "cellular", mean_mbit_s = 3.5, stall_share = 0.11, stall_ms = 321 }
        queue = { kind = "dualpi2", scheduler = "time-shifted", packets = 777 }
        [[cross]]
        kind = "bursts"
        direction = "down"
        count = 2
        mbit_s = 14
        start_s = 5
        [[cross]]
        kind = "cubic"
        direction = "up"
        rtt_ms = 55
        ecn = true
        """
    )
    shown = run(capsys, "show", str(file))
    for figure in (
        *("mine: all there is", "33 s, round trip 35 ms", "seed 44"),
        *("both ways: 1.5 to 2.5 s: what is sent is lost", "delay 17 ms, and 0 to 6 ms of jitter"),
        *("0.013 of all packets", "0.07 of all packets arrive twice", "the recording road.down"),
        *("CoDel, marks above 9 ms for 90 ms", "every 12 s in the mean for 123 ms: what is sent w"),
        *("the packets 8, 64", "3.5 Mbit/s in the mean, stalled 0.11 of the time for 321 ms"),
        *(
            "DualPI2 with the time-shifted scheduler, at most 777",
            "2 x bursts down from 5 s on, 14",
        ),
        "cubic up from 0 s on, round trip 55 ms without queues, ECN",
    ):
        assert figure in shown


def test_check_says_that_a_file_is_right_or_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("length_s = 12\n")
    assert run(capsys, "check", str(file)) == f"{file}: a scenario of 12 s, without an error.\n"
    file.write_text("lenght_s = 12\n")
    assert failure(capsys, "check", str(file)).startswith(
        f"eloquent netem: {file}: lenght_s: there is no such key here; did you mean 'length_s'?"
    )


@pytest.mark.parametrize("command", ["show", "digest", "check"])
def test_an_unknown_scenario_is_one_sentence(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = failure(capsys, command, "trian.toml" if command == "check" else "trian")
    assert text.startswith("eloquent netem: ")
    assert "trian" in text
    assert len(text.splitlines()) == 1


def test_loss_per_packet_is_warned_of_in_plain_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "length_s = 1\n[up]\nloss = { kind = 'packet-bursts', loss = 0.1, burst_packets = 4 }\n"
    )
    netem(["digest", str(file)], result_action="return_value")
    assert capsys.readouterr().err.startswith(f"eloquent netem: {file}: up.loss: packet-bursts")
    # In a process of its own too, where Python would print its warnings.
    result = in_a_process("digest", str(file))
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["clean", "wifi-far", "handover"])
def test_a_digest_is_the_same_in_every_process(name: str) -> None:
    digests = {
        in_a_process("digest", name, "--seed", "3", hash_seed=hash_seed).stdout
        for hash_seed in ("0", "1", "4242")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


@pytest.mark.parametrize("name", DIGESTS_OF_SEED_3)
def test_a_published_digest_stays(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(capsys, "digest", name, "--seed", "3").strip() == DIGESTS_OF_SEED_3[name]


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [str(ELOQUENT), "netem", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode == 128 + signal.SIGPIPE


def test_the_installed_command_ends_with_1_and_no_traceback() -> None:
    result = in_a_process("show", "trian")
    assert result.returncode == 1
    assert result.stderr.startswith("eloquent netem: There is no scenario 'trian'")
    assert "Traceback" not in result.stderr
