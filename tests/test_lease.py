"""`make gpu` rehearsed without a GPU: what fails, hangs or is killed at any stage loses nothing of the rest."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import cases, gate, gpu, iterations, lease, report
from benchmarks.documents import replaced
from benchmarks.record import Measurement, read, write
from dtokd_kernels import implementations

from . import emulated

ROOT = Path(__file__).parents[1]
SMALL = ["--device", "cpu", "--rounds", "2", "--calls", "1", "--models", "1e4"]
TINY = ["--student", "test_vit", "--teacher", "test_vit", "--batch", "1", "--size", "160"]


def of(rows, **columns):
    return [row for row in rows if all(row[key] == value for key, value in columns.items())]


@pytest.fixture
def cuda(emulated_library):
    with emulated.emulated_cuda(emulated_library) as kernels:
        yield kernels


def test_every_part_writes_what_it_measures(cuda, tmp_path, capsys):
    """With the emulated kernels: all but events, graphs and the profiler."""
    gpu.main(["facts", "gate", "steps", "kernels", *SMALL, "--output", str(tmp_path)])
    rows = read(tmp_path / "gpu.csv")
    ours = {
        "dtokd cuda",
        "dtokd cuda two launches",
        "dtokd cuda lag",
        "dtokd cuda overlap",
        "dtokd cuda lag with check",
    }
    for metric in ("time", "ratio", "host"):
        there = {r["kernel_provider"] for r in of(rows, kernel_name="step", metric_name=metric)}
        assert there >= {"fused", "clip_fused", "foreach", "mgda", "dtokd cpu", *ours}
    assert {r["kernel_provider"] for r in of(rows, kernel_name="gate")} == there
    for name, reads in {"dtokd cuda two launches": 28, "dtokd cuda lag": 20, "dtokd cuda lag with check": 28}.items():
        assert float(of(rows, kernel_provider=name, metric_name="reads")[0]["y_value_50"]) == reads
    assert (tmp_path / "left_out.txt").read_text() == "kernels, 1e4: there is no device to profile\n"
    text = capsys.readouterr().out
    assert report.gpu_tables(rows) in text
    assert "| dtokd cuda lag |" in text
    assert "copy: " in text


def test_iterations_of_every_mode(tmp_path, monkeypatch):
    """One whose compilation fails leaves the others."""
    made = iterations.Pair

    def without_compiler(*args, mode, **options):
        if mode == "compiled":
            raise RuntimeError("no compiler")
        return made(*args, mode=mode, **options)

    monkeypatch.setattr(iterations, "Pair", without_compiler)
    gpu.main(["iterations", *SMALL, *TINY, "--output", str(tmp_path)])
    rows = read(tmp_path / "gpu.csv")
    for mode in ("eager", "bf16"):
        found = of(rows, kernel_operation_mode=mode, metric_name="ratio")
        assert {r["kernel_provider"] for r in found} == {*gpu.WAYS, "exact, cached teacher"}
    assert (tmp_path / "left_out.txt").read_text() == "iterations, compiled: RuntimeError: no compiler\n"


def test_small_models_take_one_launch_and_two(cuda, monkeypatch):
    """What is too large for one launch has one row."""
    monkeypatch.setattr(implementations, "RESIDENT_PARAMETERS", 20_000)
    one, two = "dtokd cuda", "dtokd cuda two launches"
    assert {one, two} <= gpu.competitors("cpu", 10_000).keys()
    assert one in gpu.competitors("cpu", 30_000)
    assert two not in gpu.competitors("cpu", 30_000)
    assert {n for n in gpu.competitors("cpu") if "cuda" in n} == {n for n in gpu.CAPTURABLE if "cuda" in n}
    whole, resident = [], cuda.resident
    monkeypatch.setattr(cuda, "resident", lambda *args: whole.append(resident(*args)) or whole[-1])
    for name, taken in {one: [True] * (len(cases.KINDS) * gate.STEPS), two: []}.items():
        whole.clear()
        gate.check({name: gpu.competitors("cpu")[name]})
        assert [record is not None for record in whole] == taken


class Broken:
    """A competitor that raises an error when it is made, in its first step, or after some more."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, case):
        if self.left < 0:
            raise RuntimeError("cannot be made")
        competitor = cases.fused(case)

        def step():
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("a step failed\nand more lines")
            return competitor.step()

        return cases.Competitor(step, competitor.prepare, competitor.traffic)


@pytest.mark.parametrize("steps", [-1, 0, 1, 2, 4, 6])
@pytest.mark.parametrize("broken", ["fused", "foreach"])
def test_a_competitor_that_fails_is_left_out(tmp_path, monkeypatch, steps, broken):
    """The unit too: then there are times and no ratios."""
    names = {"fused": cases.fused, "foreach": cases.foreach, "clip_fused": cases.clip_fused, broken: Broken(steps)}
    monkeypatch.setattr(gpu, "competitors", lambda *args, **options: dict(names))
    results = gpu.Results(tmp_path, "cpu")
    gpu.steps(results, "1e3", "interior", 2, 1, set(names))
    rows = read(tmp_path / "gpu.csv")
    assert {r["kernel_provider"] for r in of(rows, metric_name="time")} == names.keys() - {broken}
    ratios = {r["kernel_provider"] for r in of(rows, metric_name="ratio")}
    assert ratios == (set() if broken == "fused" else {"fused", "clip_fused"})
    [line] = (tmp_path / "left_out.txt").read_text().splitlines()
    assert line.startswith(broken)
    assert "RuntimeError: " in line
    assert report.gpu_tables(rows)


def test_a_wrong_competitor_is_not_timed(tmp_path, monkeypatch):
    names = {"fused": cases.fused, "wrong": lambda case: cases.Competitor(lambda: None, cases.nothing)}
    monkeypatch.setitem(cases.COMPETITORS, "wrong", names["wrong"])
    monkeypatch.setattr(gpu, "competitors", lambda *args, **options: dict(names))
    gpu.main(["gate", "steps", *SMALL, "--output", str(tmp_path)])
    assert {r["kernel_provider"] for r in read(tmp_path / "gpu.csv")} == {"fused"}
    assert "wrong: AssertionError: gate: wrong" in (tmp_path / "left_out.txt").read_text()


def test_a_run_that_is_killed_leaves_the_rounds_that_are_over(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    rounds = []

    def show(self, going_on=(), own=gpu.Results.show):
        own(self, going_on)
        rounds.append(len(going_on))
        if len(rounds) == 2:
            raise Killed

    monkeypatch.setattr(gpu, "competitors", lambda *args, **options: {"fused": cases.fused})
    monkeypatch.setattr(gpu.Results, "show", show)
    with pytest.raises(Killed):
        gpu.steps(gpu.Results(tmp_path, "cpu"), "1e3", "interior", 5, 1, {"fused"})
    [row] = of(read(tmp_path / "gpu.csv"), metric_name="time")
    assert "2 rounds of 1" in row["extra_benchmark_config_str"]


def stage(name, code, seconds=30.0):
    return lease.Stage(name, [sys.executable, "-c", code, "{folder}"], seconds)


@pytest.fixture
def writes(tmp_path):
    """Code that writes one row, as a stage does."""
    write(tmp_path / "row.csv", [Measurement("step", "fused", "eager", "time", "ms", "1e3", [1.0], 1)])
    copy = (
        f"import sys, pathlib as p; f = p.Path(sys.argv[1]); f.mkdir(); row = p.Path({str(tmp_path / 'row.csv')!r})\n"
    )
    return copy + "(f / 'gpu.csv').write_bytes(row.read_bytes()); (f / 'left_out.txt').write_text('it: too large')\n"


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    "how", ["raise SystemExit('last words')", "import os; os.abort()", "import time; time.sleep(60)"]
)
def test_a_stage_that_fails_loses_nothing(tmp_path, writes, at, how):
    codes = [writes, writes, writes]
    codes[at] += how
    stages = [stage(f"s{i}", code, seconds=3.0 if i == at else 30.0) for i, code in enumerate(codes)]
    folder = tmp_path / "gpu"
    start = time.monotonic()
    assert not lease.Run(folder, 60).go(stages)
    assert time.monotonic() - start < 30
    states = json.loads((folder / "stages.json").read_text())
    assert [states[s.name]["state"] == "passed" for s in stages] == [i != at for i in range(3)]
    assert len(read(folder / "gpu.csv")) == 3  # that of the stage which failed too
    text = (folder / "README.md").read_text()
    assert "| fused |" in text or "torch fused AdamW" in text
    assert f"- s{at}: it: too large" in text
    if "last words" in how:
        assert "last words" in text


def test_a_second_run_goes_on(tmp_path):
    """What was never run comes first, then what did not pass; what passed is not repeated."""
    folder, marks = tmp_path / "gpu", tmp_path / "marks"
    marks.write_text("")
    mark = f"open({str(marks)!r}, 'a').write('%s ')\n"
    slow = mark % "slow" + "import time; time.sleep(60)"
    stages = [stage("first", mark % "first"), stage("slow", slow, 12.0), stage("late", mark % "late")]
    assert not lease.Run(folder, 20).go(stages)
    assert marks.read_text() == "first slow "
    assert "| late | not run | 0.0 | the time was over |" in (folder / "README.md").read_text()
    stages[1] = stage("slow", slow, 2.0)
    assert not lease.Run(folder, 30).go(stages)
    assert marks.read_text() == "first slow late slow "
    stages[1] = stage("slow", mark % "slow")
    assert lease.Run(folder, 30).go(stages)
    assert lease.Run(folder, 30).go(stages)
    assert marks.read_text() == "first slow late slow slow "


def test_a_tool_that_is_not_there_is_left_out(tmp_path):
    assert lease.Run(tmp_path, 30).go([lease.Stage("sanitizer", ["no-such-tool"], 10)])
    assert "| sanitizer | left out | 0.0 | no-such-tool is not there |" in (tmp_path / "README.md").read_text()


def test_what_a_machine_does_not_allow_is_left_out(tmp_path):
    """A profiler without the right to count; it is no failure, and not tried again."""
    refused = [sys.executable, "-c", "raise SystemExit('ERR_NVGPUCTRPERM')"]
    stages = [lease.Stage("profile", refused, 30, optional=True)]
    assert lease.Run(tmp_path, 30).go(stages)
    assert "| profile | left out |" in (text := (tmp_path / "README.md").read_text())
    assert "ERR_NVGPUCTRPERM" in text
    [profile] = [stage for stage in lease.STAGES if stage.optional]
    assert profile.command[0] == "ncu"


def test_the_stages_of_the_first_run_take_less_than_nine_minutes():
    names = [s.name for s in lease.STAGES]
    first = lease.STAGES[: names.index("triton") + 1]
    assert sum(s.seconds for s in first) <= lease.SECONDS <= 540
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("chosen", [s for s in lease.STAGES if "benchmarks.gpu" in s.command], ids=lambda s: s.name)
def test_the_measuring_stages_are_commands_that_there_are(chosen, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    for part in ("facts", "check", "steps", "kernels", "whole_iterations"):
        monkeypatch.setattr(gpu, part, lambda *args, _part=part: called.append(_part) or set())
    monkeypatch.setattr(gpu.torch.cuda, "empty_cache", lambda: None)
    arguments = [
        str(tmp_path) if a == "{folder}" else a for a in chosen.command[chosen.command.index("benchmarks.gpu") + 1 :]
    ]
    gpu.main(arguments)
    assert called


@pytest.mark.parametrize("chosen", [s for s in lease.STAGES if "pytest" in s.command], ids=lambda s: s.name)
def test_the_testing_stages_name_files_that_there_are(chosen):
    files = [argument for argument in chosen.command if argument.startswith("tests/")]
    assert files
    assert all((ROOT / name).is_file() for name in files)


def test_nothing_that_travelled_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "ROOT", tmp_path)
    for name in ("csrc/torch", "dtokd_kernels", "build/emulated"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "csrc/torch/version.cpp").write_text("")
    version = lease.built_from(tmp_path / "csrc")
    extension, emulation = tmp_path / "dtokd_kernels/_cuda.abi3.so", tmp_path / lease.EMULATED
    for path in (extension, emulation):
        path.write_bytes(b"dtokd-version:" + version.encode() + b"\0")
    assert lease.build_stage() is None
    emulation.write_bytes(b"dtokd-version:0.1.0+old\0")
    [*_, script] = lease.build_stage().command
    assert "tests.emulated" in script
    assert "setup.py" not in script
    extension.unlink()
    assert "setup.py" in lease.build_stage().command[-1]


def test_what_is_carried_is_counted(tmp_path, monkeypatch, capsys):
    """And with a CUDA extension for one architecture, of 16 MiB, this checkout is far below the limit."""
    assert sum(size for name, size in lease.carried().items() if "_cuda" not in name) <= lease.CARRIED_MIB - 40
    monkeypatch.setattr(lease, "ROOT", tmp_path)
    for name in ("dtokd_kernels/_cuda.abi3.so", "build/emulated/dtokd_emulated.so", "listed.py", "not_listed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1 << 20))
    for command in (["init", "-q"], ["add", "listed.py"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for limit, code in ((3, 0), (2.5, 1)):
        monkeypatch.setattr(lease, "CARRIED_MIB", limit)
        with pytest.raises(SystemExit) as exit_:
            lease.main(["--carried"])
        assert exit_.value.code == code
        assert f"3.0 of {limit} MiB: checkout 1.0, dtokd_kernels/_cuda.abi3.so 1.0, build" in capsys.readouterr().out


@pytest.mark.parametrize("document", lease.DOCUMENTS)
def test_documents_have_the_figures_of_the_csv_file(document):
    """Or say that there are none."""
    text, path = (ROOT / document).read_text(), lease.RESULTS / "gpu.csv"
    assert text.count(lease.BEGIN) == text.count(lease.END) == 1
    if path.exists():
        assert replaced(text, lease.BEGIN, lease.END, lease.DOCUMENTS[document](read(path))) == text
    else:
        assert "No GPU figure has been measured" in text


@pytest.mark.parametrize("gap", ["\n\n", "\n"])
def test_figures_are_written_between_their_marks(gap):
    more = {"provider": "dtokd cuda", "mode": "graph", "metric": "ratio", "unit": "1", "threads": 1}
    rows = [Measurement("step", model="deit_tiny", values=[1.375], **more).row()]
    text = f"before {lease.BEGIN}{gap}No GPU figure has been measured.{gap}{lease.END}\nafter\n"
    for make in lease.DOCUMENTS.values():
        assert "1.38" in make(rows)
        assert make([])
        written = replaced(text, lease.BEGIN, lease.END, make(rows))
        assert written == f"before {lease.BEGIN}{gap}{make(rows)}{gap}{lease.END}\nafter\n"
        assert written == replaced(written, lease.BEGIN, lease.END, make(rows))
    with pytest.raises(ValueError, match="no lines"):
        replaced("nothing", lease.BEGIN, lease.END, "")
