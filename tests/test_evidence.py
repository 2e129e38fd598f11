"""The evidence: tuning looks at validation images only, every method trains, a killed command goes on."""

import csv
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import pytest
import timm
import torch
from dtokd.detect.batch import Detections
from dtokd.detect.detectors.dense import Dense, make_backbone
from dtokd.detect.scenes import Scenes, write_scenes
from torch import nn

from benchmarks.evidence import pages, protocol, tables
from benchmarks.evidence.classifiers import MODELS, RESNET
from benchmarks.evidence.data import (
    MAKERS,
    SAME,
    TILE,
    VARIANTS,
    DataSet,
    _Arrays,
    _tiles,
    few_images,
    weak_teacher,
    wrong_teacher,
)
from benchmarks.evidence.methods import METHODS, NONE, OBJECTIVES, SETTINGS, iterations_of, methods_of
from benchmarks.evidence.protocol import Run, carry_out, outcomes, read, tune
from benchmarks.evidence.scenes import SceneSet, _outputs, _read
from benchmarks.evidence.students import Result, train
from benchmarks.evidence.trials import AdamMetric, OwnMomentum
from benchmarks.journal import Journal

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
    right = torch.tensor(1.0).double()
    return DataSet(images, labels, logits, features, *judged, *judged, right, right)


@pytest.mark.parametrize(
    ("objective", "method"),
    [("", NONE), *((o, m) for o in ("logits, T = 4", "features", "logits and features") for m in methods_of(o))],
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
    if method.fixed is not None:
        assert result.weight == pytest.approx(float(method.title.split()[1]), abs=1e-12)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = write_scenes(tmp_path_factory.mktemp("scenes"), Scenes(train=10, val=8))
    train, judged = _read(folder, "train"), _read(folder, "val")
    torch.manual_seed(0)
    teacher = Dense("fcos", make_backbone("test_resnet", {}, None), 3, width=64)
    return SceneSet(train, judged, judged, _outputs(teacher, train), 0.9, 0.8)


@pytest.mark.parametrize("title", ["none", "fixed 0.5", "DTO", "held-out gain", "while better"])
def test_detectors_train(scenes, title):
    method = next(m for m in (NONE, *METHODS) if m.title == title)
    objective = "" if method is NONE else "features and predictions"
    result, again = (train(scenes, objective, method, lr=4e-3, seed=1, iterations=2) for _ in range(2))
    assert repr(result) == repr(again)
    assert result.task_loss > 0
    if title == "fixed 0.5":
        assert result.weight == pytest.approx(0.5)
    if title == "while better":  # the student finds nothing yet: 1 - 0.2 / 1
        assert result.weight == pytest.approx(0.8)


def test_scenes_are_judged_as_dtokd_detect_judges(scenes):
    """Objects found where they are give AP50 1, also on a part of the scenes, in any order."""

    class Finds(nn.Module):
        def __init__(self, numbers):
            super().__init__()
            self.numbers = numbers

        def forward(self, images):
            held = scenes.test.batch(self.numbers)[1]
            return Detections(
                [{k: t[k] for k in ("boxes", "labels")} | {"scores": torch.ones(len(t["labels"]))} for t in held]
            )

    assert scenes.test.score(Finds(torch.arange(8))) == 1
    assert scenes.test.score(Finds(torch.tensor([1, 2, 5])), torch.tensor([5, 1, 2])) == 1
    assert scenes.test.score(Finds(torch.tensor([2, 1, 5])), torch.tensor([5, 1, 2])) < 1


def test_own_momentum_without_a_difference_is_adamw(data):
    """Of half the sum of both losses."""
    trial, plain = (nn.Linear(20, 4) for _ in range(2))
    plain.load_state_dict(trial.state_dict())
    own = OwnMomentum(trial.parameters(), lr=0.01, weight_decay=0.05, max_norm=0.1, delta=0.0)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.05)

    def losses(model, inputs):
        return {"task": model(inputs).square().mean() + 1, "distill": (model(inputs) - 1).abs().mean()}

    for inputs in data.features.split(16):
        own.backward(losses(trial, inputs))
        own.step()
        adamw.zero_grad()
        (0.5 * sum(losses(plain, inputs).values())).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        adamw.step()
    for p, q in zip(trial.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_weights_in_adamws_metric():
    """Worked out by hand, for g = (1, 0) and (1, 1) on losses of 1, and the second moment of the first step's sum."""
    w = nn.Parameter(torch.zeros(2))
    optimizer = AdamMetric([w], lr=0.0, weight_decay=0.0, max_norm=1e9)
    optimizer.backward({"a": 1 + w[0], "b": 1 + w.sum()})
    assert optimizer.balance.weights.tolist() == [1, 0]  # the shorter one is the nearest point in Euclid's metric
    optimizer.step()
    optimizer.state[w]["exp_avg_sq"].copy_(0.001 * torch.tensor([1.0, 1e8]))
    optimizer.backward({"a": 1 + w[0], "b": 1 - 2 * w[0] + w[1]})
    # the second coordinate counts 1e-4 of the first: g = 1 and -2 in one dimension, shortest at 2/3 and 1/3
    assert optimizer.balance.weights.tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-4)


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
        Journal(path, Run, Result, executor, one)(runs)
    kept = set(read(path))
    assert kept == set(runs[:2])
    with ThreadPoolExecutor(1) as executor:
        assert [r.test for r in Journal(path, Run, Result, executor, one)(runs)] == [0, 1, 2, 3, 4]
    assert set(trained[3:]) >= set(runs[2:])
    assert not kept & set(trained[5:])
    assert read(path) == {run: replace(RESULT, test=float(run.seed)) for run in runs}
    with ThreadPoolExecutor(1) as executor:
        Journal(path, Run, Result, executor, one, "abc")([replace(RUN, lr=0.1, seed=9)])
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

    carry_out("digits", list(OBJECTIVES), [0, 1, 2], remember)
    carry_out("digits, wrong teacher", list(OBJECTIVES), [0, 1], remember)
    assert {run.iterations for run in done} == {200}
    found = outcomes(done, "digits")
    assert len(found) == 1 + sum(len(methods_of(o)) for o in SETTINGS["digits"])
    assert all(set(o.results) == {0, 1, 2} for o in found)
    parts = tables.parts(done)
    assert "| DTO | +2.0 | +2.0 to +2.0 | +2.0 | digits, logits, T = 4 | +0.0 | 3 |" in parts.pop("summary")
    # of bad teachers the differences are to no teacher
    first, _, *rows = parts.pop("bad teachers").splitlines()
    assert first == "| | digits, wrong teacher, logits, T = 4 |"
    assert rows[0] == "| fixed 0.9 | +28.5 |"
    assert rows[-1] == "| fixed 0.3 | -1.5 |"
    assert "| DTO | +0.0 |" in rows
    parts.pop("digits, wrong teacher, logits, T = 4")
    assert list(parts) == [f"digits, {o}" for o in SETTINGS["digits"]]
    for text in parts.values():
        assert "| **fixed 0.3** | 60.0 ± 0.0 | reference |  |  |" in text
        low, high = text.split("| DTO | 62.0 ± 1.0 | +2.0 | ")[1].split(" | 3/3 |")[0].split(" to ")
        assert float(low) < 2 < float(high)
        assert float(low) + float(high) == pytest.approx(4, abs=0.11)
        assert "| none | " in text
    assert "fixed 1" not in parts["digits, features"]
    assert "private" not in parts["digits, logits, T = 4"]


def test_runs_of_other_schedules_are_not_mixed():
    """Of another length they do not count; of two tunings they would hide a method."""
    run = replace(RUN, lr=8e-3, iterations=iterations_of("digits"))
    tuned = {replace(run, seed=protocol.TUNING_SEEDS[0]): RESULT}
    longer = {replace(run, iterations=999): replace(RESULT, test=99.0)}
    (found,) = outcomes({**tuned, run: RESULT, **longer}, "digits")
    assert {seed: result.test for seed, result in found.results.items()} == {0: 60.0}
    with pytest.raises(ValueError, match=r"DTO: counted seeds have the learning rates \[0\.008, 0\.016\]"):
        outcomes({**tuned, run: RESULT, replace(run, lr=16e-3, seed=1): RESULT}, "digits")


def test_documented_numbers_are_those_of_the_csv_file():
    done = read(pages.RESULTS)
    assert len(tables.parts(done)) == 2 + 24
    for document, text in pages.written(done).items():
        assert document.read_text() == text
    for name in dict.fromkeys(run.data for run in done):
        assert all(len(o.results) in (5, 10, 20) for o in outcomes(done, name))


def test_all_settings_can_be_made():
    assert set(SETTINGS) == {*MAKERS, *VARIANTS, *SAME, "scenes"}
    long = {name: iterations_of(name) for name in SETTINGS if iterations_of(name) != 200}
    assert long == {"digits, long": 2000, "photos, long": 2000, "scenes": 400}
    assert {kind for _, _, kind in (name.partition(", ") for name in SETTINGS)} >= set(MODELS)
    sizes = {
        name: sum(p.numel() for p in timm.create_model(model, **options).parameters())
        for name, (model, options) in {**MODELS, "": RESNET}.items()
    }
    assert sizes["smaller student"] < sizes[""] < sizes["larger student"]


def test_bad_teachers_are_bad_and_few_images_are_few(data):
    classes = data.logits.shape[1]
    wrong = wrong_teacher(data)
    assert torch.equal(wrong.logits.argmax(1), (data.labels + 1) % classes)
    assert wrong.teacher_accuracy == 0
    few = few_images(data, 5, of=32)
    assert torch.equal(few.images, torch.cat([data.images[start : start + 5] for start in (0, 32, 64)]))
    assert len(few.labels) == len(few.logits) == len(few.features) == 15
    drawn = weak_teacher(data, 0)
    assert drawn.logits.std() < 0.5  # it has learned nothing
    assert torch.equal(drawn.images, data.images)
    assert weak_teacher(data, 2).logits.shape == (96, 10)


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
