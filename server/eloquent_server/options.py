"""What `eloquent serve` can be asked to do: each field is an option, and its docstring the help."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from eloquent.errors import ConfigurationError
from eloquent.url import DEFAULT_PORT
from eloquent_server.backends.upstream_request import Continues
from eloquent_server.engine.settings import KvOptions
from eloquent_server.logs import LogFormat, LogLevel


def _group(title: str, place: int) -> Parameter:
    return Parameter(group=Group(title, sort_key=place))


LISTENING = _group("Where it listens", 0)
ASKING = _group("Who may ask, and how much", 1)
MODEL = _group("The model", 2)
CACHE = _group("Its prefix cache", 3)
ENGINES = _group("Other engines in its place", 4)
KEEPING = _group("Where answers are kept", 5)
SENDING = _group("How tokens are sent", 6)
RUNNING = _group("Running it", 7)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """The options of a server."""

    host: Annotated[str, LISTENING] = "127.0.0.1"
    "Address to listen on."
    port: Annotated[int, LISTENING] = DEFAULT_PORT
    "UDP port, and TCP port of the same number for WebSocket; 0 takes a free one."
    http: Annotated[str | None, LISTENING] = None
    """Also answer OpenAI's API over HTTP at this [HOST:]PORT, of this machine alone if there is no
    host. `/health`, `/ready` and `/metrics` are there, too. It is HTTPS where the certificate is
    from files (--cert) and the address is not loopback."""
    http_name: Annotated[tuple[str, ...], LISTENING] = ()
    """Host that something in front of a loopback address, such as a reverse proxy, passes on as its
    own; requests for names that are not this machine's are else refused."""
    websocket: Annotated[bool, LISTENING] = True
    "Answer over WebSocket (TLS over TCP), too, for clients whose network lets no UDP through."
    cert: Annotated[Path | None, LISTENING] = None
    """File of the certificate to show (PEM), with its chain. Without one a certificate is made,
    which the URL pins. It is read again when it changes, and on SIGHUP."""
    cert_key: Annotated[Path | None, LISTENING] = None
    "File of its private key (PEM, no password); the certificate's own if it is left out."
    dev_cert: Annotated[bool, LISTENING] = False
    "Make a certificate, for trials, and do not warn on addresses that others reach."
    keys: Annotated[Path | None, ASKING] = None
    """File of the keys that are let in, which `eloquent keys new` begins; it is read again when it
    changes. Without one, whoever reaches the port can chat."""
    max_turns: Annotated[int | None, ASKING] = None
    "The most answers that are generated at once; more requests are told to come back."
    model: Annotated[str | None, MODEL] = None
    """The embedded model's name, a directory in the Hugging Face layout, a hub name, or `echo`
    (says your words back; needs no torch); the embedded one if it is left out. With --upstream
    the model of requests that name none; the first that the engines have if it is left out."""
    device: Annotated[Literal["auto", "cpu", "cuda"], MODEL] = "auto"
    "Where the model runs; `auto` takes CUDA where present."
    precision: Annotated[Literal["default", "auto", "fp32", "bf16", "int8"], MODEL] = "default"
    """Of the model's weights on the CPU: `fp32`, the default, gives the same greedy answer in
    any company; `bf16` and `int8` are faster, and take less memory; `auto` measures which is
    fastest and says so. On CUDA it is bf16."""
    kv_memory: Annotated[float | None, CACHE] = None
    """GB for the turns that run and for the prefix cache, which spares the model what it has
    already read; a quarter of the machine's memory if it is left out."""
    kv_tenant: Annotated[float | None, CACHE] = None
    "The most that one tenant may have in the prefix cache, in GB."
    kv_ram: Annotated[float, CACHE] = 0.0
    "GB more for what the prefix cache has no room for."
    kv_dir: Annotated[Path | None, CACHE] = None
    """Directory in which that is kept, too, so that prompts are warm after a restart. It holds
    conversations in a form that the model can read; only this user may read it."""
    kv_disk: Annotated[float, CACHE] = 10.0
    "The most that --kv-dir may hold, in GB."
    kv_tier: Annotated[Literal["lossless", "int8"], CACHE] = "lossless"
    """How it is kept there: `lossless`, or in `int8`, a quarter of the size: answers then may
    differ in a word now and then."""
    upstream: Annotated[tuple[str, ...], ENGINES] = ()
    """URL of an engine that answers in this server's place, as OpenAI's clients take it
    (`http://HOST:8000`, `https://HOST/v1`): vLLM, SGLang, llama.cpp, Ollama, a hosted one. Several
    of them share the turns, each conversation staying where its prompt is cached."""
    upstream_key_env: Annotated[str | None, ENGINES] = None
    "Name of the environment variable that has the key for the engines; all of them are sent it."
    upstream_timeout: Annotated[float, ENGINES] = 60.0
    """Seconds without a byte in the middle of an answer after which an engine is given up; its
    first word may take ten minutes."""
    upstream_salt: Annotated[bool, ENGINES] = False
    """Send the engines a `cache_salt` for each tenant, so that none can tell by the time that its
    answers take what others have asked. vLLM and SGLang take it; some hosted ones refuse it."""
    upstream_continues: Annotated[Continues, ENGINES] = "no"
    """How the engines are asked to go on with an answer that was cut off, by a restart of this
    server or since one of several engines failed: `vllm` (and SGLang), `llama` (llama.cpp); `no`:
    it ends with an error."""
    state: Annotated[Path | None, KEEPING] = None
    """Directory for the certificate and the turns, so that readers can resume an answer after a
    restart, and unfinished answers go on. Without it both end with the server."""
    store: Annotated[str | None, KEEPING] = None
    """Redis for the turns, in place of --state: `redis://HOST:PORT/DB`, `rediss://...` with TLS, or
    `unix:///PATH`. Servers that share one continue each other's answers, and read them. Its
    password is read from ELOQUENT_REDIS_PASSWORD."""
    turn_ttl: Annotated[float, KEEPING] = 24.0
    "Hours for which an answer is kept after its end."
    store_limit: Annotated[float, KEEPING] = 4.0
    """The most that all answers together may take, in GB; beyond it turns are declined or end,
    until older ones have expired. With --store it is Redis's `maxmemory`."""
    durable: Annotated[bool, KEEPING] = False
    "Wait for the disk at each commit, so that the turns in --state survive a loss of power."
    scheme: Annotated[str, SENDING] = "eloquent"
    """How tokens are sent: `eloquent`, or one of those it is compared with (`eloquent-queued`,
    `duplicate`, `retransmit`)."""
    padding: Annotated[bool, SENDING] = True
    "Pad packets so that their sizes do not tell the lengths of tokens, which tell the topic."
    ecn: Annotated[str, SENDING] = "off"
    """How packets are marked: `off`, or `l4s`, for the low-latency queue of L4S routers (RFC
    9330), where the path carries the marks; `swiftqueue` foretells both queues of such a
    router, and marks packet by packet; `classic` behaves like `l4s` and marks nothing."""
    swiftqueue_tuning: Annotated[bool, SENDING] = False
    """With `--ecn swiftqueue`: let each connection correct its forecasts by what its packets
    meet, within bounds."""
    swiftqueue_records: Annotated[Path | None, SENDING] = None
    """With `--ecn swiftqueue`: directory for records of what each packet met, to judge or train
    the predictor by. They hold no text, address or time of day, but when packets left and their
    sizes, which tell much of an answer's tokens, above all with --no-padding: treat them like
    the conversations. They are readable for this user alone, and at most 4096 files."""
    swiftqueue_records_split: Annotated[Literal["test", "train", "validation"], SENDING] = "test"
    "What those records are for; a model that is trained on them may not be judged by them."
    config: Annotated[Path | None, RUNNING] = None
    """File of options (TOML): `kv-memory = 4` is `--kv-memory 4`. The command line comes first,
    then the environment (`ELOQUENT_SERVE_KV_MEMORY=4`), then the file."""
    print_config: Annotated[bool, RUNNING] = False
    "Say which options are set, and where, and end; the others have their defaults."
    drain_timeout: Annotated[float, RUNNING] = 30.0
    """Seconds that SIGTERM leaves the answers under way; no new ones begin meanwhile. With --state,
    what is not finished then goes on after the next start. A second SIGTERM, or SIGINT, stops at
    once."""
    exit_with_parent: Annotated[bool, RUNNING] = False
    "Stop when standard input closes."
    log_level: Annotated[LogLevel, RUNNING] = "warning"
    """What is logged to standard error, at least; `info` has a line for each turn, and for each
    connection that a client broke. No log has text of conversations."""
    log_format: Annotated[LogFormat, RUNNING] = "text"
    "`json` for programs: an object on a line, with the turn's id."

    qlog: Annotated[Path | None, RUNNING, Parameter(env_var="ELOQUENT_QLOG")] = None
    """Directory for a log of each connection in qlog's format (`.sqlog`): packets, sizes,
    times, and no text."""

    def __post_init__(self) -> None:
        """Refuse what reads as a number and is none.

        Raises:
            ConfigurationError: an option is `nan` or infinite.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigurationError(
                    f"--{each.name.replace('_', '-')} is {value}: give a number of a certain size."
                )

    @property
    def kv(self) -> KvOptions:
        """Those of the prefix cache, in the engine's terms."""
        return KvOptions(
            memory_bytes=_bytes(self.kv_memory),
            tenant_bytes=_bytes(self.kv_tenant),
            ram_bytes=round(self.kv_ram * GB),
            directory=None if self.kv_dir is None else str(self.kv_dir),
            disk_bytes=round(self.kv_disk * GB),
            encoding="int8" if self.kv_tier == "int8" else "raw",
        )


GB = 1e9


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * GB)
