"""The subcommands `eloquent serve` and `eloquent models`."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from eloquent.url import DEFAULT_PORT
from eloquent_server import models as model_store

models = App(name="models", help="List the models on this machine; fetch the embedded one.")


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    model: str = model_store.EMBEDDED_MODEL,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["default", "auto", "fp32", "bf16", "int8"] = "default",
    kv_memory: float | None = None,
    kv_tenant: float | None = None,
    kv_ram: float = 0.0,
    kv_dir: Path | None = None,
    kv_disk: float = 10.0,
    kv_tier: Literal["lossless", "int8"] = "lossless",
    scheme: str = "eloquent",
    padding: bool = True,
    ecn: str = "off",
    swiftqueue_tuning: bool = False,
    swiftqueue_records: Path | None = None,
    swiftqueue_records_split: Literal["test", "train", "validation"] = "test",
    state: Path | None = None,
    durable: bool = False,
    qlog: Annotated[Path | None, Parameter(env_var="ELOQUENT_QLOG")] = None,
    websocket: bool = True,
    exit_with_parent: bool = False,
    verbose: bool = False,
) -> None:
    """Answer chats over Eloquent with a local model.

    When it is ready it prints one line, `LISTENING URL`; give that URL to `eloquent chat --url`
    or `eloquent ask --url`. The URL pins the certificate, which is made anew at each start unless
    there is a --state directory.

    Parameters
    ----------
    host
        Address to listen on.
    port
        UDP port, and TCP port of the same number for WebSocket; 0 takes a free one.
    model
        The embedded model's name, a directory in the Hugging Face layout, a hub name, or `echo`
        (says your words back; needs no torch).
    device
        Where the model runs; `auto` takes CUDA where present.
    precision
        Of the model's weights on the CPU: `fp32`, the default, gives the same greedy answer in any
        company; `bf16` and `int8` are faster, and take less memory; `auto` measures which is
        fastest and says so. On CUDA it is bf16.
    kv_memory
        GB for the turns that run and for the prefix cache, which spares the model what it has
        already read; a quarter of the machine's memory if it is left out.
    kv_tenant
        The most that one tenant may have in the prefix cache, in GB.
    kv_ram
        GB more for what the prefix cache has no room for.
    kv_dir
        Directory in which that is kept, too, so that prompts are warm after a restart. It holds
        conversations in a form that the model can read; only this user may read it.
    kv_disk
        The most that --kv-dir may hold, in GB.
    kv_tier
        How it is kept there: `lossless`, or in `int8`, a quarter of the size: answers then may
        differ in a word now and then.
    scheme
        How tokens are sent: `eloquent`, or one of those it is compared with (`eloquent-queued`,
        `duplicate`, `retransmit`).
    padding
        Pad packets so that their sizes do not tell the lengths of tokens, which tell the topic.
    ecn
        How packets are marked: `off`, or `l4s`, for the low-latency queue of L4S routers (RFC
        9330), where the path carries the marks; `swiftqueue` foretells both queues of such a
        router, and marks packet by packet; `classic` behaves like `l4s` and marks nothing.
    swiftqueue_tuning
        With `--ecn swiftqueue`: let each connection correct its forecasts by what its packets meet,
        within bounds.
    swiftqueue_records
        With `--ecn swiftqueue`: directory for records of what each packet met, to judge or train
        the predictor by. They hold no text, address or time of day, but when packets left and their
        sizes, which tell much of an answer's tokens, above all with --no-padding: treat them like
        the conversations. They are readable for this user alone, and at most 4096 files.
    swiftqueue_records_split
        What those records are for; a model that is trained on them may not be judged by them.
    state
        Directory for the certificate and the turns, so that readers can resume an answer after a
        restart, and unfinished answers go on. Without it both end with the server.
    durable
        Wait for the disk at each commit, so that the turns in --state survive a loss of power.
    qlog
        Directory for a log of each connection in qlog's format (`.sqlog`): packets, sizes, times,
        and no text.
    websocket
        Answer over WebSocket (TLS over TCP), too, for clients whose network lets no UDP through.
    exit_with_parent
        Stop when standard input closes.
    verbose
        Log every turn, and every connection that a client broke, to standard error.
    """
    from eloquent_server.engine.settings import KvOptions
    from eloquent_server.serve import ServerOptions, run_server

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # aioquic logs every handshake, and as a warning whatever a peer does wrong; we say the latter.
    logging.getLogger("quic").setLevel(logging.ERROR)
    asyncio.run(
        run_server(
            ServerOptions(
                host=host,
                port=port,
                model=model,
                device=device,
                precision=precision,
                kv=KvOptions(
                    memory_bytes=None if kv_memory is None else round(kv_memory * 1e9),
                    tenant_bytes=None if kv_tenant is None else round(kv_tenant * 1e9),
                    ram_bytes=round(kv_ram * 1e9),
                    directory=None if kv_dir is None else str(kv_dir),
                    disk_bytes=round(kv_disk * 1e9),
                    encoding="int8" if kv_tier == "int8" else "raw",
                ),
                scheme=scheme,
                padding=padding,
                ecn=ecn,
                swiftqueue_tuning=swiftqueue_tuning,
                swiftqueue_records=swiftqueue_records,
                swiftqueue_records_split=swiftqueue_records_split,
                state=state,
                durable=durable,
                qlog=qlog,
                websocket=websocket,
                exit_with_parent=exit_with_parent,
            )
        )
    )


@models.default
def list_models() -> None:
    """List the models on this machine."""
    for info in model_store.list_models():
        state = f"{info.bytes / 1e6:.0f} MB" if info.present else "not fetched"
        print(f"{info.name}\t{state}\t{info.path}")  # noqa: T201


@models.command
def fetch() -> None:
    """Fetch the embedded model and convert it, once."""
    source = model_store.fetch(progress=model_store.progress_printer(sys.stderr))
    print(source.path)  # noqa: T201
