"""Imports point one way, read from the source: errors < numerics < families < models < calibration < what uses them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress

ROOT = Path(compress.__file__).parent
# A module imports from layers below its own, and its own part of its own layer; parts of one layer, side by side,
# do not know each other.
LAYERS = [
    ("errors", "version", "process", "progress"),
    ("io",),
    ("numerics", "own_model", "presets"),
    ("families",),
    ("models",),
    ("calibration",),
    ("architectures",),
    ("stages", "datasets", "checkpoints"),
    ("evaluation",),
    ("recipe", "inspection"),
    ("planning",),
    ("pipeline",),
    ("tuning",),
    ("cli",),
    ("__main__",),
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# One file a family, a stage, a command: each can be added and taken away without the others.
PLUGINS = ("families", "stages", "cli")
SHARED = {
    "cli": {"compressing", "console", "options", "recipes", "tables"},
}
CARRIED = ("own_model/configuration_compress.py", "own_model/modeling_compress.py")


def module_name(file: Path) -> str:
    parts = ("compress", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too; `from package import name` is the module where it is one."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield below if base.startswith("compress") and is_module(below) else base


FILES = sorted(ROOT.rglob("*.py"))
EDGES = [(module_name(file), imported) for file in FILES for imported in imports(file)]
OWN = [(importer, imported) for importer, imported in EDGES if imported.split(".")[0] == "compress"]


def part_of(module: str) -> str | None:
    """The part of the package a module is in; None for the package itself."""
    return next(iter(module.split(".")[1:]), None)


def test_every_part_has_a_layer():
    parts = {part_of(module_name(file)) for file in FILES} - {None}
    assert parts <= LEVEL.keys()
    assert len(OWN) > 50


def test_imports_point_down():
    wrong = []
    for importer, imported in OWN:
        here, there = part_of(importer), part_of(imported)
        if here is None or here == there:
            continue
        # `from compress import families` names a part and is resolved to it; the package itself knows no part.
        assert there is not None, f"{importer} imports the package itself"
        if LEVEL[there] >= LEVEL[here]:
            wrong.append(f"{importer} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("part", PLUGINS)
def test_plugins_do_not_know_each_other(part):
    """Files of a folder may share its package and what begins with an underscore. A plugin may be a folder itself."""
    wrong = []
    for importer, imported in OWN:
        names = importer.split("."), imported.split(".")
        if any(len(name) < 3 or name[1] != part for name in names) or names[0][:3] == names[1][:3]:
            continue
        there = names[1][2]
        if not there.startswith("_") and there not in SHARED.get(part, set()):
            wrong.append(f"{importer} imports {imported}")
    assert wrong == []


def cycles(edges: set[tuple[str, str]]) -> set[str]:
    """Modules that import one another in a circle: what is left when those without imports are taken away for good."""
    while True:
        importers = {importer for importer, _ in edges}
        kept = {(importer, imported) for importer, imported in edges if imported in importers}
        if kept == edges:
            return importers
        edges = kept


def test_no_two_modules_import_each_other():
    edges = {(importer, imported) for importer, imported in OWN if importer != imported}
    # A package's own __init__ is run before any module in it and may be named by them.
    inward = {(importer, imported) for importer, imported in edges if importer.startswith(f"{imported}.")}
    assert cycles(edges - inward) == set()


def external(part: str) -> set[str]:
    tops = {imported.split(".")[0] for importer, imported in EDGES if part_of(importer) == part}
    return tops - set(sys.stdlib_module_names) - {"compress"}


def test_what_each_part_may_use():
    assert external("errors") == set()
    assert external("numerics") == {"torch", "jaxtyping", "pydantic"}  # QuantizationArgs checks itself
    assert external("families") == set()
    assert "pydantic" in external("stages")
    for part in LEVEL:
        if part != "cli":
            assert not external(part) & {"rich", "typer"}, part


@pytest.mark.parametrize("file", [*CARRIED, "checkpoints/reload.py", "evaluation/_programs.py"])
def test_what_runs_without_the_package_does_not_import_it(file):
    """The carried files, and the one that proves that they are enough."""
    names = {name for name in imports(ROOT / file) if name.split(".")[0] == "compress"}
    carried = {module_name(ROOT / other) for other in CARRIED} if file in CARRIED else set()
    assert names <= carried
    assert "compress" not in {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    }


def test_the_carried_files_import_each_other_relatively():
    """In a checkpoint's folder there is no package `compress` above them."""
    for file in CARRIED:
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("compress")):
                assert (node.level, f"own_model/{node.module}.py") in {(1, other) for other in CARRIED}
