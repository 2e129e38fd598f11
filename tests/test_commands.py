"""Commands that the workflows, CI and the documents name: they are there, and go together."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
JOBS = {f"{file}/{name}": job for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"), ROOT / "examples/README.md"]
#: Programs that a workflow's machine has besides make.
THERE = {"sudo", ".venv/bin/pip"}

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")


def targets_of(line):
    """What a call of make names; none for another program."""
    program, *words = shlex.split(line, comments=True) or [""]
    return [word for word in words if "=" not in word and not word.startswith("-")] if program == "make" else []


@pytest.mark.parametrize("name", JOBS)
def test_job_runs_what_is_there(name):
    job = JOBS[name]
    assert job["timeout-minutes"] <= 90
    assert "actions/checkout" in job["steps"][0]["uses"]
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert any(targets_of(line) for line in lines)
    for line in lines:
        for command in line.split(" && "):
            assert command.split()[0] in {"make", *THERE}, command
            assert set(targets_of(command)) <= TARGETS, command


def test_workflows_run_what_ci_runs():
    """And on each Python that the package names."""
    script = (ROOT / ".ci/run").read_text().splitlines()
    gated = {target for line in script for target in targets_of(line)}
    assert {"lint", "docs", "test"} <= gated <= TARGETS
    jobs = [job for name, job in JOBS.items() if name.startswith("ci.yml/")]
    run = {target for job in jobs for step in job["steps"] for target in targets_of(step.get("run", ""))}
    assert gated <= run
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert JOBS["ci.yml/test"]["strategy"]["matrix"]["python"] == named
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {target for hook in hooks for target in targets_of(hook["entry"])} <= gated


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page):
    """Targets of make, modules that are run with -m, and scripts of this checkout."""
    text = page.read_text()
    called = [line.strip() for line in re.findall(r"^(?: {4}|\$ )(make .*)$", text, re.MULTILINE)]
    called += re.findall(r"`(make [^`]*)`", text)
    for line in called:
        words = re.split(r"\s#|;|\s\.\.\.", line)[0]
        assert set(targets_of(words)) <= TARGETS, line
    for module in re.findall(r"python -m ((?:benchmarks|tests|dtokd|dtokd_kernels)[\w.]*)", text):
        assert find_spec(module) is not None, module
    for script in re.findall(r"(?:python|torchrun(?: --\S+ \d+)*) ((?:tools|examples)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
