"""The architecture, as a test: which module may import which.

Reads the imports of the package's source, also those inside functions; what stands under
``if TYPE_CHECKING`` is for readers only and does not count.
"""

from __future__ import annotations

import ast
import inspect
import typing as t
from pathlib import Path

import pytest

import flask_commondb
from flask_commondb import errors

#: Lowest first. A module imports from lower layers only, never from its own.
LAYERS = (
    {"breakers", "errors", "naming", "policies", "positions", "signals"},
    {"commits", "dialects", "forks", "holders", "identities", "keeping", "statements"},
    {"capabilities", "knocking", "liveness", "scopes"},
    {"addresses", "executing", "patience", "reaching", "sources"},
    {"options", "primaries"},
    {"config", "pools", "replicas", "procedures"},
    {"probing", "router"},
    {"overview", "reading"},
    {"routing"},
    {"closing", "transactions"},
    {"streams"},
    {"sessions"},
    {"jobs"},
    {"extension"},
    {"__init__"},
)

#: Stands beside the layers: pytest loads it into programs that never make an app.
BESIDE = {"pytest_plugin"}

#: Names that say nothing of what a module owns.
EMPTY_NAMES = {"utils", "helpers", "core", "base", "common", "types"}

ROOT = Path(flask_commondb.__file__).parent

#: Every module of the package, by its dotted name below it: ``dialects.mysql``, ``__init__``.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layers(module: str) -> None:
    """A module imports only from the layers below its own."""
    own = package_of(module)
    imported = imports_of(module)
    if own in BESIDE:
        assert imported == set()
    else:
        lower = set().union(*LAYERS[: level_of(own)])
        assert {package_of(name) for name in imported} - {own} <= lower
        # Only dialects is a package, with an order of its own: see test_dialects.
        assert own == "dialects" or own not in map(package_of, imported)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("dialects.histories", set()),
        ("dialects.generic", {"dialects.histories"}),
        ("dialects.frugal", {"dialects.generic"}),
        ("dialects.packets", set()),
        ("dialects.pymysql", {"dialects.frugal", "dialects.generic", "dialects.packets"}),
        ("dialects.mysqlclient", {"dialects.frugal", "dialects.generic"}),
        ("dialects.psycopg", {"dialects.generic"}),
        (
            "dialects.mysql",
            {
                "dialects.frugal",
                "dialects.generic",
                "dialects.histories",
                "dialects.mysqlclient",
                "dialects.pymysql",
            },
        ),
        (
            "dialects.postgresql",
            {"dialects.generic", "dialects.histories", "dialects.psycopg"},
        ),
        ("dialects.sqlite", {"dialects.generic"}),
        (
            "dialects.__init__",
            {
                "dialects.generic",
                "dialects.histories",
                "dialects.mysql",
                "dialects.postgresql",
                "dialects.sqlite",
            },
        ),
    ],
)
def test_dialects(module: str, expected: set[str]) -> None:
    """Server families know the generic one and not each other; ``dialects`` gathers them all."""
    assert {name for name in imports_of(module) if package_of(name) == "dialects"} == expected


def test_every_family_is_held_to_it() -> None:
    """Each module in ``dialects`` has a row in the table of :func:`test_dialects`."""
    (mark,) = test_dialects.pytestmark  # type: ignore[attr-defined]
    assert {module for module in MODULES if package_of(module) == "dialects"} == {
        module for module, _ in mark.args[1]
    }


def test_every_module_has_its_layer() -> None:
    """Each module stands in exactly one layer, and each layer names modules that exist."""
    placed = [name for layer in LAYERS for name in sorted(layer)] + sorted(BESIDE)
    assert sorted(placed) == sorted({package_of(module) for module in MODULES})


@pytest.mark.parametrize("module", sorted(MODULES))
def test_names(module: str) -> None:
    """No module has a name under which anything could be put."""
    assert not EMPTY_NAMES & set(module.lstrip("_").split("."))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_docstrings(module: str) -> None:
    """Every module says what it is."""
    assert ast.get_docstring(tree_of(module))


def test_public_names() -> None:
    """``__all__`` is sorted, holds every error of the package, and nothing that is not there."""
    exported = flask_commondb.__all__
    assert exported == sorted(set(exported))
    assert {name for name in exported if not hasattr(flask_commondb, name)} == set()
    own_errors = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert own_errors - set(exported) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import pools", {"pools"}),
        ("from .replicas import Replica", {"replicas"}),
        ("from ..errors import ConfigError", {"errors"}),
        ("from . import CommonDB", {"__init__"}),
        ("from flask_commondb import config", {"config"}),
        ("from flask_commondb.dialects.mysql import MySQL", {"dialects.mysql"}),
        ("import flask_commondb.routing as r", {"routing"}),
        ("import flask_commondb", {"__init__"}),
        ("import flask\nfrom sqlalchemy import event", set()),
        ("def f():\n    from . import pools", {"pools"}),
        ("if t.TYPE_CHECKING:\n    from . import pools", set()),
        ("if TYPE_CHECKING:\n    from . import pools\nelse:\n    from . import config", {"config"}),
        ("try:\n    from . import pools\nexcept ImportError:\n    pass", {"pools"}),
    ],
)
def test_the_reader(source: str, expected: set[str]) -> None:
    """Every way to write an import is seen, and what only a type checker runs is not."""
    module = "dialects.generic" if ".." in source else "extension"
    assert set(imported_modules(ast.parse(source), module)) == expected


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, without itself."""
    return set(imported_modules(tree_of(module), module)) - {module}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported_modules(node: ast.AST, module: str) -> t.Iterator[str]:
    for child in run_children(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                if alias.name.partition(".")[0] == "flask_commondb":
                    yield known_module(alias.name)
        elif isinstance(child, ast.ImportFrom):
            source = absolute_name(child, module)
            if source.partition(".")[0] == "flask_commondb":
                for alias in child.names:
                    yield known_module(f"{source}.{alias.name}")
        else:
            yield from imported_modules(child, module)


def run_children(node: ast.AST) -> t.Iterable[ast.AST]:
    """The parts of a node that run, not only under a type checker."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in (
        getattr(node.test, "attr", None),
        getattr(node.test, "id", None),
    ):
        return node.orelse
    return ast.iter_child_nodes(node)


def absolute_name(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parts = ["flask_commondb", *module.split(".")]
    return ".".join([*parts[: -node.level], *filter(None, [node.module])])


def known_module(name: str) -> str:
    """The module that an imported name is, or stands in, below the package."""
    below = name.partition(".")[2]
    while below:
        if below in MODULES:
            return below
        if f"{below}.__init__" in MODULES:
            return f"{below}.__init__"
        below = below.rpartition(".")[0]
    return "__init__"


def package_of(module: str) -> str:
    """``dialects`` for ``dialects.mysql``: what the layers are made of."""
    return module.partition(".")[0]


def level_of(package: str) -> int:
    (level,) = (index for index, layer in enumerate(LAYERS) if package in layer)
    return level
