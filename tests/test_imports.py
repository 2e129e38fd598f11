"""Imports go down: dtokd -> dtokd_kernels -> torch, from floor to floor inside the library, and never in a circle.

All of them count, also those under TYPE_CHECKING and inside functions: what a reader has to know to understand a file.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"dtokd_kernels": ROOT / "dtokd_kernels", "dtokd": ROOT / "python" / "dtokd"}
#: The library's floors, the lowest first: modules, or packages with all their modules. A file imports from its own
#: floor and those below.
FLOORS = (
    ("_version", "_supported", "types", "asking", "debug", "rules", "rows", "reach", "watch", "ranks"),  # words
    ("reference", "weighting"),  # formulas
    ("operations", "libraries", "implementations", "triton", "backends"),  # who computes
    ("checks", "kernels", "plan", "ops"),  # what is computed, for rows of gradients
    ("sources", "gradients", "solve"),  # from losses to what multiplies the gradients
    ("distributed.flat", "distributed.replicas", "distributed.averaged", "distributed.sharded", "distributed.shards"),
    ("distributed.connect", "distributed.find"),
    ("optim_state", "balanced", "optim", "accumulate", "held_out", "one_loss", "probing"),
    ("distributed.attach", "distributed.state", "distributed"),
    ("", "__main__"),
)


def modules() -> dict[str, Path]:
    """All modules of both packages, by name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """Modules that a file imports, ours in full and others by their first word."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    ours = {n for n in named if n in MODULES}
    return (ours | {n.split(".")[0] for n in named - ours}) - {name}


GRAPH = {name: imports(name, path) for name, path in MODULES.items()}


def floor(module: str) -> int:
    """The floor of one of the library's modules: that of the longest name that it begins with."""
    inside = module.removeprefix("dtokd_kernels").removeprefix(".")
    places = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    while inside and inside not in places:
        inside = inside.rpartition(".")[0]
        assert inside, f"{module} stands on no floor; add it to FLOORS"
    return places[inside]


def test_no_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]))


def test_the_library_imports_nothing_but_torch():
    """And triton, where its kernels are."""
    for name, found in GRAPH.items():
        if name.startswith("dtokd_kernels"):
            allowed = {"torch", "triton"} if name.startswith("dtokd_kernels.triton") else {"torch"}
            others = {n for n in found if n not in MODULES and n not in sys.stdlib_module_names} - allowed
            assert not others, f"{name} imports {sorted(others)}"
            assert not {n for n in found if n.split(".")[0] == "dtokd"}, f"{name} imports the toolkit"


def test_no_import_points_up():
    for name, found in GRAPH.items():
        if name.startswith("dtokd_kernels"):
            up = {n for n in found if n.startswith("dtokd_kernels") and floor(n) > floor(name)}
            assert not up, f"{name} imports {sorted(up)} from a floor above"


def test_every_kind_of_import_is_seen():
    """That of a function, under TYPE_CHECKING, of a name in a package, of a module beside the file."""
    assert "dtokd_kernels.distributed.find" in GRAPH["dtokd_kernels.balanced"]
    assert "dtokd_kernels.distributed" in GRAPH["dtokd_kernels"]
    assert "dtokd_kernels.reference" in GRAPH["dtokd_kernels.weighting.dto"]
    assert "dtokd_kernels.sources.source" in GRAPH["dtokd_kernels.sources.lag"]
