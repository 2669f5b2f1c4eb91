"""One answer over one emulated path with the TCP model, measured as the other schemes are."""

from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.stalls import Cell, CellLoss, Run
from eloquent_netem.link import Link
from eloquent_netem.tcp import send_tokens

TCP_SCHEMES = {"tcp": "cubic", "tcp-reno": "reno"}
"Schemes that run over the TCP model, and their congestion control."

TOKEN_BYTES = 12
"A token as it lies in the log; no TLS records and no framing, which is in favour of TCP."


def run_tcp_cell(cell: Cell, scheme: str, seed: int) -> Run:
    """Send one answer in virtual time over the TCP model and measure it.

    Loss, jitter and duplication are those that `run_cell` gives the same cell and seed.

    Raises:
        KeyError: the scheme is none of `TCP_SCHEMES`.
        TcpError: the text did not arrive as it was sent.
        StuckError: it did not arrive at all.
    """
    losses = {name: CellLoss(cell, seed, name) for name in ("up", "down")}
    up, down = (
        Link(
            delay_s=cell.rtt_s / 2,
            seed=seed,
            name=name,
            loss=loss,
            jitter_s=cell.jitter_s,
            reorders=cell.jitter_s > 0,
            duplicates=cell.duplicates,
        )
        for name, loss in losses.items()
    )

    def start_outages(now: float) -> None:
        for loss in losses.values():
            loss.start_outages(now)

    times = send_tokens(
        up=up,
        down=down,
        tokens=cell.tokens,
        interval_s=1 / cell.tokens_per_s,
        token_bytes=TOKEN_BYTES,
        congestion=TCP_SCHEMES[scheme],
        on_start=start_outages,
    )
    measures = measure_stalls(times.generated_s, times.rendered_s, cell.rtt_s / 2)
    return Run(cell, scheme, seed, measures, times.downlink_packets, times.downlink_bytes)
