"""The emulation of CUDA threads finds every kind of mistake that it promises to find, and none in the kernels."""

import os
import re
import subprocess

import pytest

from . import cmake

SCHEDULES = ("forward", "reverse", "1", "2")
# in kAddressMistakes and kThreadMistakes of csrc/tests/emulation_tests.cpp
MISTAKES = {
    "static-shared-overrun": "AddressSanitizer: heap-buffer-overflow",
    "static-shared-underrun": "AddressSanitizer: use-after-poison",
    "dynamic-shared-overrun": "AddressSanitizer: heap-buffer-overflow",
    "tensor-overrun": "AddressSanitizer: heap-buffer-overflow",
    "misaligned-vector-without-a-load": "runtime error: member access within misaligned address",
    "no-barrier": "ThreadSanitizer: data race",
    "shuffle-for-a-barrier": "ThreadSanitizer: data race",
    "no-fence-before-ticket": "ThreadSanitizer: data race",
    "no-fence-after-ticket": "ThreadSanitizer: data race",
    "plain-counter": "ThreadSanitizer: data race",
    "plain-read-of-an-atomic": "ThreadSanitizer: data race",
    "blocks-without-a-grid-barrier": "ThreadSanitizer: data race",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a target built with a sanitizer, or with none."""
    folders = {}

    def build_and_run(target, sanitize, *arguments, schedule="forward"):
        if sanitize not in folders:
            folders[sanitize] = tmp_path_factory.mktemp("emulation")
        cmake.build(folders[sanitize], target, sanitize)
        environment = {**os.environ, "DTOKD_EMULATION_SCHEDULE": schedule}
        command = [folders[sanitize] / target, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return build_and_run


@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_emulation_runs_correct_kernels_and_finds_wrong_ones(run, sanitize):
    result = run("dtokd_emulation_tests", sanitize)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{schedule}: passed" for schedule in SCHEDULES]
    assert not result.stderr


def test_emulation_runs_where_stacks_are_switched_by_the_system(tmp_path):
    folder = cmake.build(tmp_path, "dtokd_emulation_tests", CMAKE_CXX_FLAGS="-DDTOKD_EMULATION_UCONTEXT")
    result = subprocess.run([folder / "dtokd_emulation_tests"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sanitizers_find(run, mistake):
    found = MISTAKES[mistake]
    sanitize = "thread" if found.startswith("Thread") else "address,undefined"
    result = run("dtokd_emulation_tests", sanitize, mistake)
    assert result.returncode != 0
    assert found in result.stderr


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_kernels_under_sanitizers(run, sanitize):
    result = run("dtokd_cuda_tests", sanitize)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr


def test_kernels_give_the_same_bits_under_every_schedule(run):
    outputs = set()
    for schedule in (*SCHEDULES, "3", "4"):
        result = run("dtokd_cuda_tests", "", schedule=schedule)
        assert result.returncode == 0, result.stdout + result.stderr
        outputs.add(result.stdout)
    (output,) = outputs
    assert re.fullmatch(r"passed: [0-9a-f]{16}\n", output)


def test_sums_in_parts(run):
    """Where float64 is slow: against long double, for all sizes of numbers and for nearly parallel gradients."""
    result = run("dtokd_parts_tests", "address,undefined")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "passed\n"
    assert not result.stderr
