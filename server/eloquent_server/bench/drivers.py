"""The engines that are compared, each behind `Driver`; every one runs in a process of its own."""

import dataclasses
import http.client
import importlib.util
import json
import logging
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from eloquent_server.backends.base import Finish
from eloquent_server.bench.workload import Driver, Stream
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.turn import LOCAL_TENANT

START_S = 180.0
CONTEXT_TOKENS = 2048
"Of one turn."
NO_SEED = 0


def resident_mib(process: int | None = None) -> float:
    """Return a process's resident memory, this one's if None; off Linux this one's greatest."""
    status = Path(f"/proc/{process or 'self'}/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    resident = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024


class EloquentDriver:
    """Our engine, in this process, without its guesses: a random prompt's answer repeats itself."""

    def __init__(
        self,
        model: Path,
        *,
        precision: str,
        threads: int,
        rows: int,
        prefix_cache: bool = True,
        kv: KvOptions | None = None,
    ) -> None:
        from eloquent_server.engine.engine import Engine
        from eloquent_server.engine.loader import load
        from eloquent_server.engine.tiers import open_tier

        loaded = dataclasses.replace(
            load(model, "bench", device="cpu", precision=precision), end_tokens=frozenset()
        )
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self.answered: list[tuple[list[int], list[int]]] = []
        "The ids of each prompt and of its answer, in the order in which they were asked."
        self._engine = Engine(
            loaded,
            max_running=rows,
            threads=threads,
            prefix_cache=prefix_cache,
            tier=None if kv is None else open_tier(loaded.kv, kv),
        )

    def submit(self, prompt: str, count: int, *, tenant: str = LOCAL_TENANT) -> Stream:
        """See `Driver.submit`."""
        from eloquent.core.events import Failure, TextDelta
        from eloquent_server.engine.turn import EngineEvent, Tokens, TurnRequest

        stream = Stream()
        said: list[int] = []

        def emit(event: EngineEvent) -> None:
            if isinstance(event, Tokens):
                stream.token(len(event.ids))
                said.extend(event.ids)
            elif isinstance(event, TextDelta):
                stream.text += event.text
            elif isinstance(event, Failure):
                stream.end(event.message)
            elif isinstance(event, Finish):
                stream.end()

        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        self.answered.append((ids, said))
        request = TurnRequest(
            prompt=ids, seed=NO_SEED, temperature=0, max_tokens=count, tenant=tenant
        )
        self._engine.submit(request, emit)
        return stream

    def counts(self) -> dict[str, int]:
        """Return the engine's counts."""
        return dataclasses.asdict(self._engine.stats())

    def rss_mib(self) -> float:
        """See `Driver.rss_mib`."""
        return resident_mib()

    def close(self) -> None:
        """See `Driver.close`."""
        self._engine.close()


class TransformersDriver:
    """transformers' continuous batching, in this process."""

    def __init__(self, model: Path, *, threads: int, rows: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        ).eval()
        blocks = rows * CONTEXT_TOKENS // ContinuousBatchingConfig().page_size
        self._manager = loaded.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks),
        )
        self._manager.start()
        self._streams: dict[str, Stream] = {}
        threading.Thread(target=self._collect, daemon=True).start()

    def submit(self, prompt: str, count: int) -> Stream:
        """See `Driver.submit`."""
        stream = Stream()
        name = f"bench-{id(stream)}"
        self._streams[name] = stream
        ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        self._manager.add_request(ids, request_id=name, max_new_tokens=count, streaming=True)
        return stream

    def rss_mib(self) -> float:
        """See `Driver.rss_mib`."""
        return resident_mib()

    def close(self) -> None:
        """See `Driver.close`."""
        self._manager.stop(block=True)

    def _collect(self) -> None:
        while True:
            output = self._manager.get_result(timeout=0.5)
            stream = None if output is None else self._streams.get(output.request_id)
            if output is None or stream is None:
                continue
            stream.token(len(output.generated_tokens) - len(stream.times))
            if output.is_finished():
                stream.text = self._tokenizer.decode(output.generated_tokens)
                stream.end(output.error)


class ServeDriver:
    """`transformers serve` with continuous batching, as a child process, over HTTP."""

    def __init__(self, model: Path, *, threads: int, rows: int) -> None:
        for package in ("fastapi", "uvicorn", "openai"):
            if importlib.util.find_spec(package) is None:
                raise RuntimeError(
                    f"{package} is not installed: pip install 'eloquent-stream[bench]'"
                )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._model = str(model)
        script = (
            "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1)));"
            "from transformers.cli.transformers import main; main()"
        )
        command = [sys.executable, "-c", script, str(threads), "serve", self._model]
        command += ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--cb-num-blocks", str(rows * CONTEXT_TOKENS // 256), "--cb-block-size", "256"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr)  # noqa: S603
        deadline = time.monotonic() + START_S
        while not self._is_up():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.close()
                raise RuntimeError("transformers serve did not start")
            time.sleep(0.5)

    def submit(self, prompt: str, count: int) -> Stream:
        """See `Driver.submit`."""
        stream = Stream()
        threading.Thread(target=self._answer, args=(stream, prompt, count), daemon=True).start()
        return stream

    def rss_mib(self) -> float:
        """See `Driver.rss_mib`."""
        return resident_mib(self._process.pid)

    def close(self) -> None:
        """See `Driver.close`."""
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def _answer(self, stream: Stream, prompt: str, count: int) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "stream": True,
            "temperature": 0,
            "max_tokens": count,
        }
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_S)
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {reply.read(300)!r}")
            for line in reply:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if text := choices[0].get("text"):
                        stream.token(text=text)
            stream.end()
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            stream.end(str(error))


class LlamaDriver:
    """llama.cpp through xllamacpp, in this process."""

    def __init__(self, gguf: Path, *, threads: int, rows: int) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise RuntimeError("xllamacpp is not installed: pip install 'eloquent-stream[bench]'")
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(gguf)
        parameters.n_parallel = rows
        parameters.n_ctx = rows * CONTEXT_TOKENS
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.verbosity = -1
        self._server = xllamacpp.Server(parameters)

    def submit(self, prompt: str, count: int) -> Stream:
        """See `Driver.submit`."""
        stream = Stream()
        threading.Thread(target=self._answer, args=(stream, prompt, count), daemon=True).start()
        return stream

    def rss_mib(self) -> float:
        """See `Driver.rss_mib`."""
        return resident_mib()

    def close(self) -> None:
        """See `Driver.close`."""

    def _answer(self, stream: Stream, prompt: str, count: int) -> None:
        def take(chunk: Any) -> None:
            data = json.loads(chunk) if isinstance(chunk, str | bytes) else chunk
            if "error" in data:
                stream.error = str(data["error"])
                return
            choice = data["choices"][0]
            if choice["finish_reason"] is None:
                stream.token(text=choice["text"])

        body = {
            "prompt": prompt,
            "max_tokens": count,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        self._server.handle_completions(json.dumps(body), take)
        stream.end(stream.error)


def make_driver(
    engine: str, precision: str, model: Path, gguf: Path | None, *, threads: int, rows: int
) -> Driver:
    """Return a loaded engine.

    Raises:
        RuntimeError: what it needs is missing.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if engine == "eloquent":
        return EloquentDriver(model, precision=precision, threads=threads, rows=rows)
    if engine == "transformers-cb":
        return TransformersDriver(model, threads=threads, rows=rows)
    if engine == "transformers-serve":
        return ServeDriver(model, threads=threads, rows=rows)
    if gguf is None:
        raise RuntimeError("it needs a GGUF file: --gguf")
    return LlamaDriver(gguf, threads=threads, rows=rows)
