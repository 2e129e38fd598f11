"""What is written down runs: the docstrings' examples, and the Python blocks of the README and of docs/."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import dtokd
import pytest
import torch

import dtokd_kernels

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    m.name
    for package in (dtokd_kernels, dtokd)
    for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not m.name.endswith(("._C", "._cuda", ".__main__"))  # the extensions are no Python modules
)
#: Public callables whose docstring shows how they are called.
WITH_EXAMPLES = ("gram", "min_norm_weights", "balance", "combine", "backward", "DTOAdamW", "DTOSGD")


@pytest.mark.parametrize("name", ["dtokd_kernels", *MODULES])
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed; see the output above"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_public_functions_have_examples(name):
    item = getattr(dtokd_kernels, name)
    assert doctest.DocTestParser().get_examples(item.__doc__), f"{name} shows no example"


def blocks_of(path):
    """(line number, text) of each ```python block, and of each ```diff block after the change."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [
        (text[: found.start()].count("\n") + 1, found[2] if found[1] == "python" else changed(found[2]))
        for found in re.finditer(r"^```(python|diff)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def changed(diff):
    """The text that a diff makes, with empty lines for those that it removes."""
    return "".join("\n" if line[0] == "-" else line[1:] or "\n" for line in diff.splitlines(keepends=True))


def run_blocks(path):
    """One after the other in one namespace, as somebody who pastes them would; a traceback names the page's line."""
    namespace = {"__name__": "__main__"}
    for line, text in blocks_of(path):
        code = compile("\n" * line + text, str(path), "exec")
        exec(code, namespace)


def test_readme_runs(tmp_path, monkeypatch):
    readme = ROOT / "README.md"
    assert blocks_of(readme), f"{readme} has no ```python block: nothing shows how the package is used"
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)  # a reader has not asked for it
    run_blocks(readme)


PAGES = [p.relative_to(ROOT) for p in sorted(ROOT.glob("docs/**/*.md")) if blocks_of(p)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    run_blocks(ROOT / page)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
