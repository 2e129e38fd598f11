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
    """(line number, text) of each ```python block, and of each ```diff as it is after the change."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.finditer(r"^```(python|diff)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        (text[: block.start()].count("\n") + 1, block[2] if block[1] == "python" else after(block[2]))
        for block in found
    ]


def after(diff):
    """What a diff leads to; its lines keep their numbers."""
    return "\n".join("" if line.startswith("-") else line[1:] for line in diff.splitlines())


def before(diff):
    """What a diff begins with."""
    return "\n".join("" if line.startswith("+") else line[1:] for line in diff.splitlines())


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


DIFFS = [
    (p, n)
    for p in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    for n in range(p.read_text().count("```diff"))
]


@pytest.mark.parametrize(("page", "number"), DIFFS, ids=lambda value: getattr(value, "name", value))
def test_diffs_begin_with_python_too(page, number):
    """Both sides are whole programs: what is removed parses as well, and each side differs from the other."""
    diff = re.findall(r"^```diff\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[number]
    assert all(line[:1] in ("-", "+", " ") for line in diff.splitlines()), "a line has none of the three marks"
    compile(before(diff), str(page), "exec")
    assert before(diff) != after(diff)


def test_reference_has_all_that_is_public():
    page = (ROOT / "docs/api/kernels.md").read_text()
    of_their_own = {"__version__", "debug", "sources", "weighting"}  # pages and sections
    missing = [n for n in dtokd_kernels.__all__ if n not in of_their_own and f"dtokd_kernels.{n}\n" not in page]
    assert missing == []


WRITTEN = [*ROOT.glob("*.md"), ROOT / "examples/README.md", *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", sorted(WRITTEN), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files that links name exist, with the headings that they name; `make docs` looks at the site's own."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles], target


def test_contributors_are_led_to_files_that_exist():
    named = re.findall(
        r"`((?:benchmarks|csrc|docs|dtokd_kernels|python|tests|tools)/[\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_errors_that_troubleshooting_quotes_are_raised():
    """In the headings and in the list under DistributedDataParallel; numbers and "..." stand for any text."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r'^(?:## |- )"(.*)"', page, re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "dtokd_kernels").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # the parts of a text in one
    assert len(quoted) > 6
    for text in quoted:
        for part in re.split(r"\.\.\.|is -?\d\S*", text):
            assert part.strip(" :,") in source, text


def test_readme_is_short():
    """A visitor decides in two minutes."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
