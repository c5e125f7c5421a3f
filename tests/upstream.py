"""Runs Flask-SQLAlchemy's own test suite with ``CommonDB`` in the place of ``SQLAlchemy``.

Owns: fetching the suite from Flask-SQLAlchemy's source distribution on the package index, and the
list of tests that cannot pass, each with its reason. Used as ``python -m tests.upstream``, in an
environment of its own, because it installs one SQLAlchemy after the other there.

Must not: change a test, or leave one out that is not on the list.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import pytest

SUITE = "flask-sqlalchemy==3.1.1"

#: The newest of each series that is supported; 2.1 needs Python 3.11.
SQLALCHEMYS = ["sqlalchemy>=2.0.30,<2.1"]
if sys.version_info >= (3, 11):
    SQLALCHEMYS.append("sqlalchemy>=2.1.4,<2.2")

#: What cannot pass: SQLAlchemy has refused a ready-made ``__table__`` on a class that it makes a
#: dataclass since 2.0.36, whatever the extension does; these two tests ask for just that. The
#: remaining parameters of the same test pass.
CANNOT_PASS = {
    "tests/test_model_bind.py::test_explicit_table[db2]",
    "tests/test_model_bind.py::test_explicit_table[db4]",
}

#: How many tests the suite has: a run that collects fewer has not run the suite.
TESTS = 452


def main() -> int:
    """Run the suite on each SQLAlchemy; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="upstream-") as directory:
        suite = _unpack(pathlib.Path(directory))
        return max(_run(suite, requirement) for requirement in SQLALCHEMYS)


class Expectations:
    """A pytest plugin: what cannot pass is marked so, and what has passed is counted."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.nodeid in CANNOT_PASS:
                item.add_marker(pytest.mark.xfail(strict=True))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.outcome == "passed"


def run_here(arguments: list[str]) -> int:
    """Run the suite in this process; returns the exit status."""
    import flask_sqlalchemy.extension
    import sqlalchemy

    from flask_commondb import CommonDB

    # Before the suite's conftest is imported: it takes the class by name.
    for module in (flask_sqlalchemy, flask_sqlalchemy.extension):
        vars(module)["SQLAlchemy"] = CommonDB
    expectations = Expectations()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[expectations])
    print(f"SQLAlchemy {sqlalchemy.__version__}: {expectations.passed} of {TESTS} passed;", end=" ")
    print(f"{len(CANNOT_PASS)} cannot: {', '.join(sorted(CANNOT_PASS))}")
    return int(status != 0 or expectations.passed != TESTS - len(CANNOT_PASS))


def _unpack(directory: pathlib.Path) -> pathlib.Path:
    download = ("download", "-q", "--no-deps", "--no-binary=:all:")
    _python("-m", "pip", *download, "-d", str(directory), SUITE)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        members = [member for member in source if member.isreg() and "/tests/" in member.name]
        source.extractall(directory, members)
    (suite,) = directory.glob("*/tests")
    # Its models use a function that Python 3.12 deprecates.
    filters = "error\n    ignore:datetime.datetime.utcnow:DeprecationWarning"
    (suite.parent / "pytest.ini").write_text(f"[pytest]\nfilterwarnings =\n    {filters}\n")
    return suite.parent


def _run(suite: pathlib.Path, requirement: str) -> int:
    _python("-m", "pip", "install", "-q", "--upgrade", requirement)
    here = pathlib.Path(__file__).resolve()
    code = (
        "import runpy, sys;"
        f"module = runpy.run_path({str(here)!r});"
        "sys.exit(module['run_here'](['tests']))"
    )
    # Nothing but pytest itself: pytest-flask, say, holds a context open around each test.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=suite, env=environment).returncode


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
