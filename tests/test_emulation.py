"""The emulation of CUDA threads runs what it must, and finds every kind of mistake that it promises to find."""

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
    """Runs the tests built with a sanitizer."""
    folders = {}

    def build_and_run(sanitize, *arguments):
        if sanitize not in folders:
            folders[sanitize] = cmake.build(tmp_path_factory.mktemp("emulation"), "dtokd_emulation_tests", sanitize)
        command = [folders[sanitize] / "dtokd_emulation_tests", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return build_and_run


@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_emulation_runs_correct_kernels_and_finds_wrong_ones(run, sanitize):
    result = run(sanitize)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split("\n") == [*(f"{schedule}: passed" for schedule in SCHEDULES), ""]
    assert not result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sanitizers_find(run, mistake):
    found = MISTAKES[mistake]
    result = run("thread" if found.startswith("Thread") else "address,undefined", mistake)
    assert result.returncode != 0
    assert found in result.stderr
