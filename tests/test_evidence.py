"""The evidence: tuning looks at validation images only, every method trains, a killed command goes on."""

import csv
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import protocol, tables
from benchmarks.evidence.data import TILE, DataSet, _Arrays, _tiles
from benchmarks.evidence.methods import METHODS, NONE, OBJECTIVES, methods_of
from benchmarks.evidence.protocol import Journal, Run, carry_out, outcomes, read, tune
from benchmarks.evidence.students import Result, train

ROOT = Path(__file__).parents[1]
RUN = Run("digits", "logits, T = 4", "DTO", lr=float("nan"), seed=0, iterations=9)
RESULT = Result(50.0, 60.0, 1.0, 2.0, 0.5, 10.0, 20.0, 1.0, 0.25, 0)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(96) % 3
    images = torch.randn(96, 1, 12, 12, generator=generator) + labels.view(-1, 1, 1, 1)
    logits = torch.nn.functional.one_hot(labels).float() * 3
    features = torch.randn(96, 20, generator=generator)
    judged = (images[:32], labels[:32])
    return DataSet(images, labels, logits, features, *judged, *judged, torch.tensor(1.0).double())


@pytest.mark.parametrize(
    ("objective", "method"),
    [(None, NONE), *((o, m) for o in ("logits, T = 4", "features") for m in methods_of(o))],
    ids=lambda value: getattr(value, "title", value),
)
def test_every_method_trains(data, objective, method):
    result = train(data, objective, method, lr=4e-3, seed=1, iterations=4)
    again = train(data, objective, method, lr=4e-3, seed=1, iterations=4)
    assert repr(result) == repr(again)  # NaN is NaN
    other = train(data, objective, method, lr=4e-3, seed=2, iterations=4)
    assert other.task_loss != result.task_loss
    assert result.skipped == 0
    assert result.task_loss > 0
    if method.grid:
        assert result.weight == float(method.title.split()[1])


def test_learning_learns(data):
    assert train(data, "logits, T = 4", METHODS[0], lr=16e-3, seed=0, iterations=40).test > 60


def peak(at):
    """Trains nothing: validation is best at one learning rate, the test set best at the smallest."""

    def results(runs):
        return [replace(RESULT, validation=-abs(run.lr - at), test=-run.lr) for run in runs]

    return results


@pytest.mark.parametrize("at", [2e-3, 8e-3, 16e-3, 64e-3])
def test_tuning_walks_to_the_best_on_the_validation_images(at):
    assert tune(RUN, peak(at)) == at


def test_tuning_stops_at_its_limits():
    assert tune(RUN, peak(1.0)) == max(protocol.LEARNING_RATES) * 2**3 == protocol.HIGHEST
    assert tune(RUN, peak(0.0)) == 1e-3


def test_the_second_seed_counts():
    first, second = protocol.TUNING_SEEDS
    scores = {(16e-3, first): 90, (16e-3, second): 70, (32e-3, first): 88, (32e-3, second): 80, (64e-3, first): 10}

    def results(runs):
        return [replace(RESULT, validation=float(scores.get((run.lr, run.seed), 0))) for run in runs]

    assert tune(RUN, results) == 32e-3


def test_journal_goes_on_where_it_was_killed(tmp_path):
    path = tmp_path / "runs" / "evidence.csv"
    trained = []

    def one(run):
        trained.append(run)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return replace(RESULT, test=float(run.seed))

    runs = [replace(RUN, lr=0.1, seed=seed) for seed in range(5)]
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        Journal(path, executor, one)(runs)
    kept = set(read(path))
    assert kept == set(runs[:2])
    with ThreadPoolExecutor(1) as executor:
        assert [r.test for r in Journal(path, executor, one)(runs)] == [0, 1, 2, 3, 4]
    assert set(trained[3:]) >= set(runs[2:])
    assert not kept & set(trained[5:])
    assert read(path) == {run: replace(RESULT, test=float(run.seed)) for run in runs}
    with ThreadPoolExecutor(1) as executor:
        Journal(path, executor, one, "abc")([replace(RUN, lr=0.1, seed=9)])
    assert [row["commit"] for row in csv.DictReader(path.read_text().splitlines())] == [""] * 5 + ["abc"]


def test_tables_compare_with_the_fixed_weights_that_validation_chose(tmp_path):
    def results(runs):
        return [
            replace(
                RESULT,
                validation=80.0 if run.method == "fixed 0.3" else 70.0,
                test={"fixed 0.3": 60.0, "fixed 0.9": 90.0}.get(run.method, 61.0 + run.seed),
            )
            for run in runs
        ]

    done = {}

    def remember(runs):
        found = results(runs)
        done.update(zip(runs, found, strict=True))
        return found

    carry_out("digits", list(OBJECTIVES), [0, 1, 2], 9, remember)
    found = outcomes(done, "digits")
    assert len(found) == 1 + sum(len(methods_of(o)) for o in OBJECTIVES)
    assert all(set(o.results) == {0, 1, 2} for o in found)
    parts = tables.parts(done)
    assert "| DTO | +2.0 | +2.0 | digits, features | 3 |" in parts.pop("summary")
    assert list(parts) == [f"digits, {o}" for o in OBJECTIVES]
    for text in parts.values():
        assert "| **fixed 0.3** | 60.0 ± 0.0 | reference |" in text
        assert "| DTO | 62.0 ± 1.0 | +2.0 ± 0.6 | 3/3 |" in text
        assert "| none | " in text
    assert "fixed 1" not in parts["digits, features"]
    assert "private" not in parts["digits, logits, T = 4"]


def test_documented_numbers_are_those_of_the_csv_file():
    page = (ROOT / "docs" / "evidence.md").read_text()
    done = read(ROOT / "benchmarks" / "results" / "evidence.csv")
    found = tables.parts(done)
    assert len(found) == 10
    for text in found.values():
        assert text in page
    for name in dict.fromkeys(run.data for run in done):
        assert all(len(o.results) == 5 for o in outcomes(done, name))


def test_no_pixel_of_a_photo_is_in_two_parts():
    """Each pixel of a photo has its own number; what does not fill a tile is left out."""
    height, width = 4 * TILE, 5 * TILE + 7
    photo = torch.arange(height * width).view(1, height, width).expand(3, -1, -1)
    parts = _tiles(photo)
    assert {part: len(tiles) for part, tiles in parts.items()} == {"train": 10, "validation": 4, "test": 6}
    numbers = torch.cat([tiles[:, 0].flatten() for tiles in parts.values()])
    assert len(numbers.unique()) == len(numbers) == 20 * TILE**2


def test_only_arrays_are_unpickled():
    with pytest.raises(pickle.UnpicklingError, match="not only arrays"):
        _Arrays(BytesIO(pickle.dumps(print))).load()
