"""The benchmarks: they refuse wrong results and count bytes as they should; the documents show what they wrote."""

import math
from pathlib import Path

import pytest

from benchmarks import cases, closeness, distributed, gate, iterations, memory, report, run, sources
from benchmarks.cases import COMPETITORS, Case, Competitor
from benchmarks.record import read

ROOT = Path(__file__).parents[1]
SHAPES = {"tiny": ((40, 7), (7,)), "other": ((3, 3, 2, 2),)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    made = run.run(SHAPES, folder, threads=[1, 2], rounds=3, slow_rounds=1, with_memory=False)
    assert (folder / "step.png").stat().st_size > 10_000
    assert read(folder / "step.csv") == made
    return made


def of(rows, **columns):
    return [row for row in rows if all(row[key] == value for key, value in columns.items())]


def test_run_measures_everything_everywhere(rows):
    for metric in ("time", "ratio"):
        found = {
            (r["kernel_provider"], r["kernel_operation_mode"], r["x_value"], r["threads"])
            for r in of(rows, metric_name=metric)
        }
        assert len(found) == len(COMPETITORS) * 2 * len(SHAPES) * 2
    for row in of(rows, metric_name="ratio", kernel_provider="fused"):
        assert float(row["y_value_50"]) == 1
    for row in rows:
        assert row["evidence"] in ("measured-cpu", "counted")
        assert all(row[column] for column in ("torch", "cpu", "timestamp"))
        assert float(row["y_value_20"]) <= float(row["y_value_50"]) <= float(row["y_value_80"])


@pytest.mark.parametrize(("kind", "ours"), [("interior", (28, 12)), ("vertex", (24, 12))])
def test_bytes_per_parameter(rows, kind, ours):
    counted = of(rows, x_value="tiny", threads="1", kernel_operation_mode=kind)
    for i, metric in enumerate(("reads", "writes")):
        assert report.byte_counts(counted, [metric]) == (ours[i], (16, 12)[i])
    assert report.byte_counts(counted, ("reads", "writes")) == (sum(ours), 28)


def test_tables_name_models_and_competitors(rows):
    text = report.step_tables(rows)
    for title in (
        *SHAPES,
        *cases.TITLES.values(),
        "40 bytes per parameter, the unit 28: 1.43",
        "36 bytes per parameter, the unit 28: 1.29",
    ):
        assert title in text


@pytest.mark.parametrize("mistake", ["no clipping", "loss ignored", "nothing done"])
def test_gate_refuses_a_wrong_step(monkeypatch, mistake):
    def wrong(case: Case) -> Competitor:
        if mistake == "nothing done":
            return Competitor(lambda: None, cases.nothing)
        if mistake == "no clipping":
            monkeypatch.setattr(cases, "MAX_NORM", math.inf)
        else:
            case.losses.fill_(1)
        return cases.dtokd(case)

    monkeypatch.setitem(COMPETITORS, "wrong", wrong)
    with pytest.raises(AssertionError, match="gate: wrong"):
        gate.check({"wrong": cases.COMPETITORS["wrong"]})


def test_memory_sees_what_a_step_allocates():
    extra = memory.peak_extra_bytes([(1000, 1000)], ["dtokd", "foreach"])
    assert extra["dtokd"] < 1e6
    assert extra["foreach"] > 3.5e6  # AdamW(foreach=True) holds another 4e6 bytes; the kernel counts to 0.2 MB or so


def test_documented_numbers_are_those_of_the_csv_files():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    results = ROOT / "benchmarks" / "results"
    assert report.step_tables(read(results / "step.csv")) in text
    text = (ROOT / "docs" / "sources.md").read_text()
    for name, table in report.sources_parts(read(results / "sources.csv")).items():
        assert table, f"{name} was not measured"
        assert table in text


def test_documented_numbers_of_ranks():
    text = (ROOT / "docs" / "distributed.md").read_text()
    assert distributed.model_table() in text
    assert report.ranks_table(read(ROOT / "benchmarks" / "results" / "distributed.csv")) in text


def test_ranks_send_what_the_model_says(tmp_path, monkeypatch, capsys):
    """Within 2 %, of a model whose parameters are most of what is sent."""
    command = ["distributed", "--ranks", "2", "--width", "256", "--depth", "2", "--steps", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--csv", str(tmp_path / "distributed.csv")])
    distributed.main()
    rows = read(tmp_path / "distributed.csv")
    for way in distributed.WAYS:
        sent, model = (
            float(of(rows, kernel_provider=way, metric_name=name)[0]["y_value_50"]) for name in ("sent", "model")
        )
        assert sent == pytest.approx(model, rel=0.02)
    assert report.ranks_table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("model", cases.MODELS)
def test_shapes_are_those_of_timm(model):
    assert cases.shapes_of(model) == cases.timm_shapes(model)


def test_sources_measures_what_is_asked(tmp_path, monkeypatch, capsys):
    """Costs with a tiny model, closeness over a few iterations; parts can be kept from an earlier file."""
    small = ["--models", "test_vit", "--student", "test_vit", "--teacher", "test_vit", "--size", "160", "--rounds", "1"]
    few = ["--batches", "1", "1", "--seeds", "0", "--iterations", "3", "--teacher-iterations", "2"]
    settings = [*small, *few, "--objectives", "feature", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["sources", "--parts", "closeness", *settings])
    sources.main()
    kept = read(tmp_path / "sources.csv")
    monkeypatch.setattr("sys.argv", ["sources", "--parts", "steps", "--keep", str(tmp_path / "sources.csv"), *settings])
    sources.main()
    rows = read(tmp_path / "sources.csv")
    assert of(rows, kernel_name="closeness") == kept
    steps = [r for r in of(rows, kernel_name="step left") if r["metric_name"] != "load"]  # of other processes
    assert {r["kernel_provider"] for r in steps} == set(iterations.STEPS)
    exact = of(kept, kernel_provider=closeness.EXACT)
    assert {r["metric_name"]: float(r["y_value_50"]) for r in exact}["error"] == 0
    assert {r["kernel_provider"] for r in of(kept, metric_name="accuracy")} == set(closeness.TRAINED)
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in closeness.TRAINED)


def test_steps_of_the_sources_are_right():
    """Two steps of what is timed equal two exact ones: gradients stay, so weights that lag by a step are the same."""
    gate.check({"dtokd overlap": iterations.STEPS["overlap"], "dtokd lag": iterations.STEPS["lag"]})


def test_whole_iterations():
    measured = iterations.measure_iterations("test_vit", "test_vit", batch=1, size=160, rounds=1)
    ratios = {m.provider: m.values[0] for m in measured if m.metric == "ratio"}
    assert ratios[iterations.SUM] == 1
    assert ratios.keys() >= {"exact", "overlap", "lag", "amortized, famo", "TorchJD MGDA"}
    assert all(ratio > 0 for ratio in ratios.values())
