"""`make gpu`: what a GPU that is lent for minutes should answer, in stages, the most telling first.

    python -m benchmarks.lease [--seconds 540] [--output runs/gpu]

Each stage is a process of its own with a time limit; its log and its rows are written as they come, so that a stage
that fails, hangs or is killed loses nothing of the others. When the time is over, what was not run is named; a second
call goes on there, and repeats what did not pass. After each stage README.md and gpu.csv in the folder hold all rows so
far. `--docs` writes the tables into the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dtokd_kernels import libraries
from dtokd_kernels._version import built_from

from . import report
from .documents import replaced
from .record import Row, read, write_rows

ROOT = Path(__file__).parents[1]
EMULATED = "build/emulated/dtokd_emulated.so"
RESULTS = ROOT / "runs/gpu"
SECONDS = 540
#: What may travel to a machine that is lent, of which 64 MiB are the limit.
CARRIED_MIB = 60
#: Where the tables stand in a document.
BEGIN, END = "<!-- GPU figures: `python -m benchmarks.lease --docs` -->", "<!-- end of the GPU figures -->"
DOCUMENTS = {"docs/gpu.md": report.gpu_tables, "docs/benchmarks.md": report.gpu_line, "README.md": report.gpu_line}


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: of its files.
        command: what it runs; "{folder}" stands for the folder of its rows.
        seconds: its time limit.
        environment: what it needs there.
        optional: it needs what a machine may not allow; then it is left out, and is no failure.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False


def _measured(name: str, seconds: float, *arguments: str) -> Stage:
    return Stage(name, [sys.executable, "-m", "benchmarks.gpu", *arguments, "--output", "{folder}"], seconds)


def _tested(name: str, seconds: float, *arguments: str, before: Sequence[str] = ()) -> Stage:
    environment = {"DTOKD_TEST_DEVICE": "cuda", "DTOKD_REQUIRE_NATIVE": "1", "DTOKD_EMULATED_LIBRARY": EMULATED}
    if before:  # without torch's pool of memory, in which a tensor's end is another's beginning
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return Stage(name, command, seconds, environment)


def _sanitizer(*tool: str) -> list[str]:
    return ["compute-sanitizer", "--error-exitcode", "1", "--tool", *tool]


def _profiled(name: str, seconds: float, *arguments: str) -> Stage:
    """Bytes, cache hits, pipes and stalls of single launches, which the hardware counts; read them in the log."""
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats")
    ours = ["--kernel-name-base", "demangled", "--kernel-name", "regex:dtokd", "--launch-count", "24"]
    command = ["ncu", "--target-processes", "all", *ours, *(f"--section={section}" for section in sections)]
    measured = _measured(name, seconds, *arguments)
    return Stage(name, [*command, *measured.command], seconds, optional=True)


_NAMES = "step gram combine weights balance optim backward state drop_in errors long_run properties torchjd"
TESTS = [f"tests/test_{name}.py" for name in _NAMES.split()]
#: The most telling first; those of the first run take less than nine minutes together, even if all are cut off.
STAGES = (
    _measured("smoke", 60, "facts", "gate", "--only", "cuda"),
    _tested("bits", 60, "tests/test_gpu.py", "-k", "same_bits"),
    _measured("deit_tiny", 60, "steps", "kernels", "--only", "cuda", "--models", "deit_tiny"),
    _measured("vit_base", 45, "steps", "kernels", "--only", "cuda", "--models", "vit_base", "--rounds", "7"),
    _measured("deit_small", 40, "steps", "kernels", "--only", "cuda", "--models", "deit_small", "--rounds", "7"),
    _measured("1e9", 40, "steps", "--only", "cuda", "--models", "1e9", "--rounds", "3", "--calls", "3"),
    _measured("iterations", 90, "iterations"),
    _tested("only_on_a_gpu", 60, "tests/test_gpu.py", "-k", "not same_bits and not triton"),
    # torch asks the driver for things that it can do without, and takes no for an answer
    _tested(
        "memcheck",
        40,
        "tests/test_gpu.py",
        "-k",
        "same_bits and 2-dtype0",
        before=_sanitizer("memcheck", "--report-api-errors", "no"),
    ),
    _measured("triton", 45, "gate", "steps", "kernels", "--only", "triton", "--models", "deit_tiny", "--rounds", "5"),
    # of a second run
    _profiled("profile", 90, "steps", "--only", "cuda", "--models", "deit_tiny", "--rounds", "1", "--calls", "1"),
    _tested("triton_tests", 120, "tests/test_gpu.py", "-k", "triton"),
    _measured("12e6", 40, "steps", "--only", "cuda", "--models", "12e6"),
    _tested("tests", 300, *TESTS),
    _tested("racecheck", 120, "tests/test_gpu.py", "-k", "same_bits and 2-dtype0", before=_sanitizer("racecheck")),
    _tested("synccheck", 120, "tests/test_gpu.py", "-k", "same_bits and 2-dtype0", before=_sanitizer("synccheck")),
)


def build_stage() -> Stage | None:
    """Compiles the CUDA extension for the GPU that is there and the emulation; None if both travelled along."""
    version = built_from(ROOT / "csrc")
    extension, emulated = ROOT / "dtokd_kernels/_cuda.abi3.so", ROOT / EMULATED
    commands = []
    if not extension.exists() or libraries.version_of(extension) != version:
        commands.append(f"DTOKD_BUILD=cuda {sys.executable} setup.py --quiet build_ext --inplace --force")
    if not emulated.exists() or libraries.version_of(emulated) != version:
        commands.append(f"{sys.executable} -m tests.emulated {Path(EMULATED).parent}")
    if not commands:
        return None
    return Stage("build", ["sh", "-c", " & ".join(commands) + " & wait"], 300)


def carried() -> dict[str, float]:
    """MiB of what travels to a machine that is lent: the files of the checkout, and what is built beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    built = [*sorted((ROOT / "dtokd_kernels").glob("_*.abi3.so")), ROOT / EMULATED]
    files = [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    sizes = {"checkout": sum(path.stat().st_size for path in files)}
    sizes |= {str(path.relative_to(ROOT)): path.stat().st_size for path in built if path.exists()}
    return {name: size / 2**20 for name, size in sizes.items()}


class Run:
    """The stages of a run, and those of the runs before in the same folder.

    Args:
        folder: where everything goes: STAGE.log, STAGE.csv, stages.json, gpu.csv, README.md.
        seconds: for all stages of this run.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self._end = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "stages.json"
        self.states: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def go(self, stages: Sequence[Stage]) -> bool:
        """Run what has not passed yet; what was never run comes first. Returns whether everything has passed."""
        waiting = [stage for stage in stages if not self._over(stage)]
        waiting.sort(key=lambda stage: stage.name in self.states and self._state(stage) != "not run")
        for stage in waiting:
            left = self._end - time.monotonic()
            if left < min(10.0, stage.seconds):
                self._note(stage, "not run", 0.0, "the time was over")
            else:
                self._run(stage, min(stage.seconds, left))
            self.write(stages)
        self.write(stages)
        return all(map(self._over, stages))

    def _over(self, stage: Stage) -> bool:
        return self._state(stage) in ("passed", "left out")

    def _state(self, stage: Stage) -> object:
        return self.states.get(stage.name, {}).get("state")

    def _note(self, stage: Stage, state: str, seconds: float, said: str) -> None:
        self.states[stage.name] = {"state": state, "seconds": round(seconds, 1), "said": said}
        (self.folder / "stages.json").write_text(json.dumps(self.states, indent=1) + "\n")
        print(f"{stage.name}: {state}, {seconds:.0f} s: {said}", flush=True)

    def _run(self, stage: Stage, limit: float) -> None:
        rows = self.folder / f"{stage.name}.parts"
        shutil.rmtree(rows, ignore_errors=True)
        command = [part.replace("{folder}", str(rows)) for part in stage.command]
        if shutil.which(command[0]) is None:
            self._note(stage, "left out", 0.0, f"{command[0]} is not there")
            return
        log = self.folder / f"{stage.name}.log"
        start = time.monotonic()
        with log.open("w") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all that it starts ends with it
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if (made := rows / "gpu.csv").exists():
            shutil.copy(made, self.folder / f"{stage.name}.csv")
        if (made := rows / "left_out.txt").exists():
            shutil.copy(made, self.folder / f"{stage.name}.left_out.txt")
        shutil.rmtree(rows, ignore_errors=True)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
        state = "passed" if code == 0 else f"cut off after {limit:.0f} s" if code is None else f"failed ({code})"
        if code and stage.optional:
            state = "left out"
        self._note(stage, state, time.monotonic() - start, lines[-1][:200] if code != 0 else "")

    def rows(self, stages: Sequence[Stage]) -> list[Row]:
        """Of all stages so far, in their order."""
        paths = [self.folder / f"{stage.name}.csv" for stage in stages]
        return [row for path in paths if path.exists() for row in read(path)]

    def write(self, stages: Sequence[Stage]) -> None:
        """gpu.csv and README.md."""
        rows = self.rows(stages)
        if rows:
            write_rows(self.folder / "gpu.csv", rows)
        name = next((row["gpu_name"] for row in rows if row["gpu_name"]), "no GPU")
        lines = [f"# Measured on {name}", "", "Written by `make gpu`; `gpu.csv` holds the numbers.", ""]
        lines += ["| stage | | seconds | last words |", "|---|---|---|---|"]
        for stage in stages:
            state = self.states.get(stage.name, {"state": "not run", "seconds": 0, "said": ""})
            said = str(state["said"]).replace("|", "/")
            lines.append(f"| {stage.name} | {state['state']} | {state['seconds']} | {said} |")
        left_out = [
            f"- {stage.name}: {line}"
            for stage in stages
            if (path := self.folder / f"{stage.name}.left_out.txt").exists()
            for line in path.read_text().splitlines()
        ]
        if left_out:
            lines += ["", "## Left out", "", *left_out]
        text = "\n".join([*lines, "", "## Figures", "", report.gpu_tables(rows)])
        (self.folder / "README.md").write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lease", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages of this call")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results, and of those before")
    parser.add_argument("--docs", action="store_true", help="only write the tables of gpu.csv into the documents")
    parser.add_argument("--carried", action="store_true", help="only say how much travels to a machine that is lent")
    options = parser.parse_args(arguments)
    if options.carried:
        sizes = carried()
        parts = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
        total = f"{sum(sizes.values()):.1f} of {CARRIED_MIB} MiB: {parts}"
        print(total)
        parser.exit(0 if sum(sizes.values()) <= CARRIED_MIB else 1)
    if options.docs:
        path = options.output / "gpu.csv"
        if not path.exists():
            parser.error(f"{path} is not there; run `make gpu` on a machine with a GPU first")
        for document, figures in DOCUMENTS.items():
            text = (ROOT / document).read_text()
            (ROOT / document).write_text(replaced(text, BEGIN, END, figures(read(path))))
        return
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    run = Run(options.output.resolve(), options.seconds)
    build = build_stage()
    if build is not None and not run.go([build]):
        parser.exit(1, f"the extension was not built; see {run.folder / 'build.log'}\n")
    parser.exit(0 if run.go(STAGES) else 1)


if __name__ == "__main__":
    main()
