"""What a user gets: the wheel's contents, its metadata, and light imports."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("eloquent", "eloquent_server", "eloquent_client", "eloquent_netem")
HEAVY = ("torch", "transformers", "textual", "numpy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=PROJECT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/__init__.py" in wheel.namelist()
        assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    roots = {"eloquent": PROJECT, "eloquent_server": PROJECT / "server"}
    roots |= {"eloquent_client": PROJECT / "client", "eloquent_netem": PROJECT / "netem"}
    for package, root in roots.items():
        for source in (root / package).rglob("*.py"):
            assert source.relative_to(root).as_posix() in wheel.namelist()


def test_the_wheel_holds_netem_s_library_of_scenarios(wheel: zipfile.ZipFile) -> None:
    folder = PROJECT / "netem"
    scenarios = list((folder / "eloquent_netem" / "scenarios").glob("*.toml"))
    assert scenarios
    for scenario in scenarios:
        assert wheel.read(scenario.relative_to(folder).as_posix()) == scenario.read_bytes()


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_the_wheel_holds_swiftqueue_s_model(wheel: zipfile.ZipFile, suffix: str) -> None:
    name = f"eloquent/swiftqueue/weights/swiftqueue.{suffix}"
    assert wheel.read(name) == (PROJECT / name).read_bytes()


def test_the_metadata_names_licence_command_and_extras(wheel: zipfile.ZipFile) -> None:
    (info,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(info).decode())
    assert metadata["Name"] == "eloquent-stream"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"chat", "engine", "all", "dev"} <= set(metadata.get_all("Provides-Extra") or [])
    entry_points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "eloquent = eloquent.cli:main" in entry_points
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("package", ["eloquent.cli", "eloquent_client", "eloquent_server.commands"])
def test_importing_it_pulls_in_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert found.strip() == "[]"
