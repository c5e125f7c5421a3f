"""What is installed is what is in the tree."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flask_commondb"


@pytest.fixture
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("flask-commondb")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI") == "true":
            pytest.fail("The wheel is not installed; tox installs it.")
        pytest.skip("The wheel is not installed; tox installs it.")


def test_the_wheel_is_complete(distribution: importlib.metadata.Distribution) -> None:
    """The wheel has every module of the tree, as it stands there, and ``py.typed``."""
    installed = {
        str(file): file.read_text()
        for file in distribution.files or []
        if file.parts[0] == PACKAGE.name and "__pycache__" not in file.parts
    }
    in_tree = {
        str(path.relative_to(PACKAGE.parent)): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == in_tree
    assert f"{PACKAGE.name}/py.typed" in installed


def test_what_the_package_says(distribution: importlib.metadata.Distribution) -> None:
    """The metadata names the plugin, the extras and the versions that are supported."""
    plugins = distribution.entry_points.select(group="pytest11")
    assert {plugin.value for plugin in plugins} == {"flask_commondb.pytest_plugin"}
    assert set(distribution.metadata.get_all("Provides-Extra") or []) == {
        "celery",
        "migrate",
        "mysql",
        "mysqlclient",
        "otel",
        "postgresql",
        "prometheus",
        "test",
    }
    assert distribution.metadata["Requires-Python"] == ">=3.10"
