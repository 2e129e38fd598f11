"""`dtokd compare`: the arms, the statistics, the verdict in words, and the command on tiny data."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from dtokd.cli import _parser, main
from dtokd.compare import kinds, processes, verdict
from dtokd.compare import plan as plans
from dtokd.compare.arms import flags_of, parse_arm, parse_arms
from dtokd.compare.differences import Paired, student_t, studentized_range
from dtokd.compare.options import ARMS
from dtokd.errors import UsageError
from dtokd.train import reading
from safetensors.torch import load_file, save_file
from scipy import stats

from .digits import common, distilling
from .test_train_report import Page
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


def options_of(digits, teacher, output, *more):
    """One epoch, two arms besides the one without a teacher, two seeds."""
    texts = ["compare", *common(digits, output), *distilling(teacher), "--opt", "adamw", "--epochs", "1"]
    return [*texts, "--arms", "fixed:0.5", "dto:rescale=sum", "--seeds", "0", "1", *more]


def parsed(argv):
    return reading.parse(_parser()[1]["compare"], argv[1:])


# ---- the statistics


@pytest.mark.parametrize("arms", [2, 3, 9])
@pytest.mark.parametrize("freedom", [1, 2, 12, 40])
def test_quantiles_are_scipys(arms, freedom):
    assert studentized_range(0.95, arms, freedom) == pytest.approx(stats.studentized_range.ppf(0.95, arms, freedom))
    assert student_t(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom))


def test_many_seeds_need_no_finer_steps():
    """Beyond 200 degrees of freedom the interval is wider by a percent at most, never narrower."""
    limit = stats.norm.ppf(0.975)
    for freedom in (300, 10_000):
        assert limit <= student_t(0.95, freedom) <= 1.01 * limit


def test_two_arms_are_a_paired_t_test():
    a, b = [3.0, 5.0, 4.0], [1.0, 4.5, 2.0]
    found = Paired({"a": a, "b": b}).between("a", "b")
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert Paired({"a": a, "b": b}, sign=-1).between("a", "b").mean == -found.mean


@pytest.mark.parametrize("noise", [(1.0, 1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0, 2.0)])
def test_all_intervals_hold_together(noise):
    """In at least 95 % of comparisons each pair's interval has the truth; a pair alone more often."""
    trials, seeds = 400, 3
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(trials, len(noise), seeds, generator=generator, dtype=torch.float64)
    draws = draws * torch.tensor(noise)[:, None] + 10 * torch.randn(trials, 1, seeds, generator=generator)
    names = [f"arm {i}" for i in range(len(noise))]
    pairs = [(a, b) for a in names for b in names if a < b]
    missed = 0
    for trial in draws.tolist():
        paired = Paired(dict(zip(names, trial, strict=True)))
        missed += any(d.better or d.worse for d in (paired.between(a, b) for a, b in pairs))
    assert missed / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_rule_that_varies_more_has_a_wider_interval():
    quiet = {f"arm {i}": [10.0 + 0.01 * (i * s % 3) for s in range(4)] for i in range(6)}
    paired = Paired({**quiet, "wild": [9.0, 12.0, 10.5, 13.0]})
    wild, calm = paired.between("wild", "arm 0"), paired.between("arm 1", "arm 0")
    assert wild.high - wild.low > calm.high - calm.low
    assert not wild.better


def test_seeds_that_would_tell_two_arms_apart():
    """As many as make the interval exclude 0, with the wider of the two intervals."""
    arms = {"a": [1.0, 3.0, 2.0], "b": [0.5, 1.0, 1.5], "c": [0.6, 0.9, 1.5]}
    seeds = Paired(arms).seeds_for("a", "b", 100)
    assert 3 < seeds < 100
    spread = stats.tstd([0.5, 2.0, 0.5])

    def alone(n):
        return stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)

    assert alone(seeds) < 1.0
    two = Paired({name: arms[name] for name in "ab"})
    assert alone(two.seeds_for("a", "b", 100)) < 1.0 <= alone(two.seeds_for("a", "b", 100) - 1)
    assert Paired(arms, resolution=2.0).seeds_for("a", "b", 100) is None


def test_a_difference_of_less_than_an_image_is_none():
    """Results on few images are often equal to the digit, which is no certainty."""
    found = Paired({"a": [90.0, 90.0], "b": [89.0, 89.0]}, resolution=2.0).between("a", "b")
    assert (found.low, found.high) == (-1.0, 3.0)


# ---- the verdict


def setting(**changes):
    told = {"metric": "top1", "seeds": [0, 1, 2], "epochs": 10, "full": 10, "chooses": "val", "judges": "test"}
    return verdict.Setting(**{**told, "images": 10_000, **changes})


def arm(text, *values, judged=None, failed=(), seconds=NAN, **rates):
    flags = f"FLAGS OF {text}"
    return verdict.Arm(text, values, values if judged is None else judged, flags, failed, seconds, rates)


def words(found):
    return " ".join(found.text)


BARE = arm("none", 70.0, 71.0, 69.0, seconds=1.0)


def test_it_helps():
    arms = [
        BARE,
        arm("share:0.5", 72.0, 72.9, 71.1),
        arm("logsum", 71.9, 73.1, 71.0),
        arm("fixed:0.5", 70.4, 71.3, 69.2),
    ]
    found = verdict.judge(arms, setting())
    assert (found.kind, found.arm, found.fixed) == ("helps", "share:0.5", "fixed:0.5")
    assert re.match(
        r"Distillation helps: \+2\.0 points \(95 % interval \+1\.\d to \+2\.\d\) with share:0\.5\.", words(found)
    )
    assert "The arm logsum cannot be told apart from it with 3 seeds." in words(found)
    assert "Use: FLAGS OF share:0.5" in words(found)
    assert re.search(r"share:0\.5 against the best fixed weights, fixed:0\.5: \+1\.7 points .*, better\.", words(found))
    assert [line.arm.text for line in found.lines] == ["share:0.5", "logsum", "fixed:0.5", "none"]
    assert "'val' chose, the 10000 images of 'test' judged." in words(found)


def test_it_hurts():
    arms = [BARE, arm("fixed:0.5", 65.0, 66.1, 64.1), arm("dto", 50.0, 51.1, 48.9)]
    found = verdict.judge(arms, setting())
    assert (found.kind, found.arm) == ("hurts", "fixed:0.5")
    assert "Distillation hurts: -4.9 points" in words(found)
    assert "even with the best arm, fixed:0.5" in words(found)
    assert "Use: no teacher" in words(found)


def test_undecided():
    found = verdict.judge([BARE, arm("fixed:0.5", 71.0, 70.8, 70.0), arm("dto", 69.0, 71.5, 70.0)], setting())
    assert (found.kind, found.arm) == ("undecided", "fixed:0.5")
    assert "may be chance with 3 seeds" in words(found)
    seeds = int(re.search(r"about (\d+) seeds would settle", words(found))[1])
    assert 3 < seeds <= 30
    assert "Add them at once with --seeds" in words(found), "looks after each seed find a difference too often"
    assert "The best so far: FLAGS OF fixed:0.5" in words(found)
    hopeless = verdict.judge([BARE, arm("fixed:0.5", 70.0, 71.2, 69.0), arm("dto", 65.0, 77.0, 70.0)], setting())
    assert "more seeds would hardly settle it" in words(hopeless)


def test_undecided_where_no_teacher_is_the_best_so_far():
    """The best arm is then not the best way to train."""
    found = verdict.judge([BARE, arm("fixed:0.5", 69.0, 70.8, 69.0), arm("dto", 66.0, 71.5, 68.0)], setting())
    assert found.kind == "undecided"
    assert "Undecided: -0.4 points" in words(found)
    assert "The best so far: no teacher." in words(found)
    assert "FLAGS" not in words(found)


def test_undecided_where_the_best_arm_hurts():
    """Its interval excludes 0, that of an arm which varies more does not."""
    arms = [BARE, arm("fixed:0.5", 60.0, 61.1, 59.0), arm("dto", 64.0, 60.0, 53.0)]
    found = verdict.judge(arms, setting())
    gains = {line.arm.text: line.to_none for line in found.lines}
    assert gains["fixed:0.5"].worse
    assert not gains["dto"].worse
    assert found.kind == "undecided"
    assert "with the best arm, fixed:0.5, so that it hurts; dto cannot be told apart from no teacher" in words(found)
    assert "chance" not in words(found)
    assert "The best so far" not in words(found)


def test_a_stream_judges():
    """How many images it has is not known."""
    found = verdict.judge([BARE, arm("dto", 75.0, 76.1, 74.1)], setting(images=0))
    assert found.kind == "helps"
    assert "'val' chose, the images of 'test' judged." in words(found)


def test_one_seed_decides_nothing():
    found = verdict.judge([arm("none", 70.0), arm("dto", 90.0)], setting(seeds=[0]))
    assert found.kind == "undecided"
    assert "one seed shows no spread; it gave +20.0 with the best arm, dto" in words(found)
    assert "interval" not in words(found)
    assert "inf" not in verdict.as_markdown(found, setting(seeds=[0]))
    assert json.loads(json.dumps(verdict.as_data(found, setting(seeds=[0]))))["verdict"] == "undecided"


def test_a_diverged_arm_is_left_out_and_named():
    arms = [BARE, arm("dto", NAN, 99.0, 99.0, failed=[0]), arm("fixed:0.5", 75.0, 76.1, 74.1)]
    found = verdict.judge(arms, setting())
    assert (found.kind, found.arm) == ("helps", "fixed:0.5")
    assert "dto has no result with the seeds 0: it diverged" in words(found)
    assert found.lines[-1].arm.text == "dto"
    assert "| dto | diverged |" in verdict.as_markdown(found, setting())
    for gone in ("none", "dto"):
        arms = [arm(name, NAN, failed=[0]) if name == gone else arm(name, 70.0) for name in ("none", "dto")]
        found = verdict.judge(arms, setting(seeds=[0]))
        assert (found.kind, found.arm) == ("none", None)
        assert words(found).startswith("No verdict: ")


def test_chosen_by_one_split_and_judged_by_another():
    """The arm that is best where it is chosen, not where it is judged; both numbers are told by their splits."""
    arms = [
        BARE,
        arm("fixed:0.5", 80, 80, 80, judged=[74, 75.1, 73.1]),
        arm("dto", 79, 79, 79, judged=[78, 79.1, 76.9]),
    ]
    assert verdict.judge(arms, setting()).arm == "fixed:0.5"
    same = words(verdict.judge(arms, setting(judges="val")))
    assert "The same 10000 images of 'val' chose and judged" in same
    assert "--judge-split" in same


def test_a_loss_is_better_when_smaller():
    arms = [arm("none", 2.0, 2.1, 1.9), arm("dto", 1.0, 1.11, 0.9), arm("fixed:0.5", 1.9, 2.0, 1.85)]
    found = verdict.judge(arms, setting(metric="loss"))
    assert (found.kind, found.arm) == ("helps", "dto")
    assert "+0.997 (95 % interval" in words(found)


def test_a_shortened_schedule_is_told():
    found = verdict.judge([BARE, arm("dto", 75.0, 76.1, 74.1)], setting(epochs=3, full=30))
    assert "3 of 30 epochs" in words(found)


def test_images_of_a_cache_are_told():
    """The arm without a teacher has none, and so other augmentations."""
    arms = [BARE, arm("dto", 75.0, 76.1, 74.1)]
    assert "augmentation" not in words(verdict.judge(arms, setting()))
    told = words(verdict.judge(arms, setting(views=1)))
    assert "saw 1 augmentation of each image (--kd-cache-views), none a new one in each epoch" in told


def test_table():
    arms = [BARE, arm("dto", 75.0, 76.1, 74.1, seconds=1.5, conflict_rate=0.25, vertex_rate=0.5, share_kl=0.125)]
    head, *rows = verdict.rows_of(verdict.judge(arms, setting(jobs=2)), setting(jobs=2))
    told = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert told["none"]["to none"] == "reference"
    assert told["none"]["time to none"] == "1.00x"
    assert told["dto"]["conflict"] == "25 %"
    assert told["dto"]["vertex"] == "50 %"
    assert told["dto"]["share of kl"] == "12 %"
    assert told["dto"]["time to none"] == "1.50x"
    assert "2 runs shared the machine" in " ".join(verdict.notes(setting(jobs=2)))


# ---- the arms


def test_default_arms_are_arms():
    assert list(parse_arms(list(ARMS), 1)) == list(ARMS)
    assert ARMS[0] == "none"
    assert any(text.startswith("fixed") for text in ARMS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nobody", "choose none, fixed:WEIGHT or one of"),
        ("", "choose none"),
        ("fixed:x", "expected a number from 0 to 1"),
        ("fixed:2", "expected a number from 0 to 1"),
        ("fixed:nan", "expected a number from 0 to 1"),
        ("dto:0.5", "dto takes no number"),
        ("dto:speed=1", "rescale, params, gram, opt, lr, temperature"),
        ("cagrad:c=-1", "c is"),
        ("dto:lr=fast", "lr"),
        ("dto:rescale=foo", "rescale"),
        ("dto:lr=0.1,", "is no key=value"),
        ("share:0", "share"),
        ("heldout:0", "as in heldout:0.05"),
        ("heldout:0.6", "expected a number from 0 to 0.5"),
        ("fixed:0.5,rescale=sum", "a fixed sum has no option rescale"),
        ("fixed:0.5,gram=overlap,every=5", "a fixed sum has no option gram, every"),
        ("auto:0,every=2", "as in auto:0.05"),
    ],
)
def test_bad_arms(text, told):
    with pytest.raises(UsageError, match=re.escape(told)) as found:
        parse_arm(text)
    assert str(found.value).startswith("--arms: ")


def test_an_arm_that_would_not_choose_is_refused(digits, teacher, tmp_path):
    """Before the first run, and not when its turn comes."""
    with pytest.raises(UsageError, match="--arms: 'auto': --kd-balance auto: its choice needs 40 measurements"):
        plans.Plan(parsed([*options_of(digits, teacher, tmp_path), "--arms", "auto"]))


def test_flags_make_the_arm(digits, teacher, tmp_path):
    """What the verdict tells to use is read by `dtokd train` as the options of the arm's runs."""
    base = [
        *common(digits, tmp_path),
        *distilling(teacher),
        "--opt",
        "dtoadamw",
        "--kd-distill-type",
        "logit",
        "feature",
    ]
    options = reading.parse(_parser()[1]["train"], base)
    for text in (
        "fixed:0.3",
        "heldout:0.1,every=5",
        "heldout",
        "auto:0.2",
        "share:0.5",
        "cagrad:c=0.4",
        "dto:rescale=sum,lr=0.002,opt=adamw",
        "taskfirst",
    ):
        changes = parse_arm(text, 2)
        given = reading.parse(_parser()[1]["train"], base + shlex.split(flags_of(text, options, changes)))
        assert {key: getattr(given, key) for key in changes} == changes
        assert given.opt == ("adamw" if text.startswith(("fixed", "dto")) else "dtoadamw")


def test_an_arm_is_what_its_text_tells(digits, teacher, tmp_path):
    """Options of a balance that the command line has for all hold for the rules, and refuse no weighted sum."""
    more = ["--kd-balance", "cagrad", "--kd-balance-kwargs", "c=0.4", "--kd-balance-gram", "overlap"]
    plan = plans.Plan(parsed([*options_of(digits, teacher, tmp_path), *more]))
    found = {run.arm: run.options for run in plan.runs()}
    assert [found[arm].kd_balance for arm in plan.arms] == ["none", "none", "dto"]
    assert [found[arm].kd_balance_gram for arm in plan.arms] == [None, None, "overlap"]
    assert [found[arm].kd_balance_kwargs for arm in plan.arms] == [{}, {}, {}]
    flags = [flags_of(arm, plan.options, changes) for arm, changes in plan.arms.items()]
    assert flags[1].endswith("--kd-balance-kwargs, without --kd-balance-gram")
    given = reading.parse(_parser()[1]["train"], [*common(digits, tmp_path), *more, *shlex.split(flags[2])])
    assert (given.kd_balance, given.kd_balance_kwargs, given.kd_balance_gram) == ("dto", {}, "overlap")


# ---- the command


@pytest.fixture(scope="module")
def compared(digits, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    assert main(options_of(digits, teacher, output)) == 0
    return output


def test_compare(compared, digits, teacher, tmp_path, capsys, monkeypatch):
    """Two seeds of three arms; the second call trains nothing, and a missing run is made up for."""
    output = shutil.copytree(compared, tmp_path / "out")
    folder = output / "compare"
    options = options_of(digits, teacher, output)
    first = {name: (folder / name).read_text() for name in ("compare.md", "compare.csv", "compare.json", "report.html")}
    lines = rows(folder / "compare.csv")
    assert [(row["arm"], row["seed"]) for row in lines] == [
        (name, seed) for seed in "01" for name in ("none", "fixed:0.5", "dto:rescale=sum")
    ]
    told = json.loads(first["compare.json"], parse_constant=pytest.fail)
    assert {line["arm"] for line in told["arms"]} == {"none", "fixed:0.5", "dto:rescale=sum"}
    dto = next(line for line in told["arms"] if line["arm"].startswith("dto"))
    assert 0 <= dto["share_kl"] <= 1
    assert dto["time_to_none"] > 0
    assert dto["time_to_best_fixed"] > 0
    assert dto["judged"] == [float(row["top1_judged"]) for row in lines if row["arm"].startswith("dto")]
    page = Page(first["report.html"])
    assert page.open == []
    assert page.outside == []
    assert "Difference in top1 to no teacher" in page.captions
    assert "Share of the gradient: kl" in page.captions
    assert {"none", "fixed:0.5", "dto:rescale=sum"} <= set(page.names)
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "train", None)
        assert main(options) == 0
    assert first["compare.md"].strip() in capsys.readouterr().out
    shutil.rmtree(folder / "fixed_0.5" / "seed-1")
    assert main(options) == 0
    for row, again in zip(lines, rows(folder / "compare.csv"), strict=True):
        assert {**again, "seconds": row["seconds"]} == row


def test_differences_are_paired(digits, teacher, tmp_path):
    """All arms of a seed begin with one student, which stays as it is without a learning rate; seeds differ."""
    argv = options_of(digits, teacher, tmp_path, "--lr", "0", "--warmup-lr", "0", "--kd-distill-type", "feature")
    assert main(argv) == 0
    folder = tmp_path / "compare"
    students = {
        (arm, seed): load_file(folder / arm / f"seed-{seed}" / "student-last.safetensors")["fc.weight"]
        for arm in ("none", "fixed_0.5", "dto_rescale=sum")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        for name in ("fixed_0.5", "dto_rescale=sum"):
            assert torch.equal(students[name, seed], students["none", seed])
    assert not torch.equal(students["none", 0], students["none", 1])
    assert not list(folder.rglob("epoch-*.safetensors")), "checkpoints of finished runs fill the disk"


def test_order_and_augmentation_do_not_depend_on_the_teacher(digits, teacher, tmp_path, monkeypatch):
    """With --data-seed; a feature's projector draws random numbers before, which the seed of the data undoes."""
    from dtokd.train import engine

    seen, add = [], engine.Losses.add

    def note(self, values, *arguments, **more):
        seen.append(float(values["task"].detach()))
        add(self, values, *arguments, **more)

    monkeypatch.setattr(engine.Losses, "add", note)

    def first_losses(name, *more):
        del seen[:]
        argv = ["train", *common(digits, tmp_path), "--experiment", name, "--lr", "0", *more]
        assert main(argv) == 0
        return list(seen)

    feature = [*distilling(teacher), "--kd-distill-type", "feature", "--kd-projector", "orthogonal"]
    alone = first_losses("a", "--data-seed", "3")
    assert first_losses("b", "--data-seed", "3", *feature) == alone
    assert first_losses("c", "--data-seed", "4") != alone
    assert alone[:4] != alone[4:], "the epochs have the same batches"
    assert first_losses("d", *feature) != first_losses("e")


def test_an_interrupted_comparison_goes_on(digits, teacher, tmp_path, monkeypatch, compared):
    """A signal in the middle of a run ends it with its number; the same command then has the undisturbed results."""
    options = options_of(digits, teacher, tmp_path)
    original, count = kinds.train, [0]

    def stopping(own, progress):
        count[0] += 1
        if count[0] == 3:
            monkeypatch.setattr(kinds, "train", original)
            from dtokd.train import engine

            step = engine.Engine._step
            monkeypatch.setattr(engine.Engine, "_step", lambda self: (step(self), os.kill(os.getpid(), signal.SIGINT)))
            try:
                return original(own, progress)
            finally:
                monkeypatch.setattr(engine.Engine, "_step", step)
        return original(own, progress)

    monkeypatch.setattr(kinds, "train", stopping)
    assert main(options) == 128 + signal.SIGINT
    assert not (tmp_path / "compare" / "compare.md").exists()
    assert main(options) == 0
    for row, again in zip(rows(compared / "compare/compare.csv"), rows(tmp_path / "compare/compare.csv"), strict=True):
        assert {**again, "seconds": row["seconds"]} == row


def test_it_finds_its_runs_again(compared, digits, teacher, tmp_path, capsys, monkeypatch):
    """More seeds and arms, another place of the data, other workers: the finished runs are kept. Else it is refused."""
    output = shutil.copytree(compared, tmp_path / "out")
    data, weights = shutil.copytree(digits, tmp_path / "data"), shutil.copy(teacher, tmp_path / "t.safetensors")
    trained = []
    run_train = kinds.train
    monkeypatch.setattr(kinds, "train", lambda own, progress: trained.append(own) or run_train(own, progress))

    def trains(*more, data=data, weights=weights):
        del trained[:]
        assert main([*options_of(data, weights, output), *more]) == 0
        return len(trained)

    def refused(*more, data=data, weights=weights):
        assert main([*options_of(data, weights, output), *more]) == 2
        return capsys.readouterr().err

    assert trains("--log-interval", "3", "--jobs", "1") == 0
    assert trains("--seeds", "1", "0", "--arms", "fixed:0.5") == 0
    assert trains("--seeds", "0", "2", "--arms", "none", "fixed:0.5") == 2
    assert trains("--seeds", "0", "--arms", "fixed:0.6") == 1
    assert "--lr was 0.001, is now 0.002" in refused("--lr", "0.002")
    assert "--epochs was 1, is now 2" in refused("--epochs", "2")
    assert "choose another --experiment" in refused("--model", "test_vit")
    assert "--eval-metric was 'top1', is now 'loss'" in refused("--eval-metric", "loss")
    image = min((data / "train").rglob("*.png"))
    held = image.read_bytes()
    shutil.copy(max((data / "train").rglob("*.png")), image)
    assert "the images of 'train' have changed" in refused()
    image.write_bytes(held)
    assert trains() == 0
    held = load_file(weights)
    save_file({**held, "fc.bias": held["fc.bias"] + 1}, weights)
    assert "the file or directory of --kd-teacher-path has changed" in refused()
    save_file(held, weights)
    monkeypatch.setattr(timm, "__version__", "0.0")
    assert "timm was" in refused()


def test_directories_of_models_count_by_their_contents(digits, teacher, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(teacher, folder / "model.safetensors")
    argv = [*options_of(digits, teacher, tmp_path), "--model", f"local-dir:{folder}"]

    def told():
        return plans.Plan(parsed(argv)).told()

    before = told()
    assert told() == before
    changed = load_file(teacher)
    save_file({**changed, "fc.bias": changed["fc.bias"] + 1}, folder / "model.safetensors")
    assert told() != before


def test_a_cache_changes_the_images(digits, teacher, tmp_path):
    """So a comparison that began without one does not go on with one; where it is does not matter."""

    def told(*more):
        return plans.Plan(parsed([*options_of(digits, teacher, tmp_path), *more])).told()

    assert told("--kd-cache-teacher", str(tmp_path / "a")) != told()
    assert told("--kd-cache-teacher", str(tmp_path / "a")) == told("--kd-cache-teacher", str(tmp_path / "b"))


def test_images_are_those_of_the_split_that_judges(digits, teacher, tmp_path):
    """Also if it is the first one that is opened."""
    assert plans.Plan(parsed(options_of(digits, teacher, tmp_path))).images == 30
    assert plans.Plan(parsed([*options_of(digits, teacher, tmp_path), "--judge-split", "train"])).images == 64


def test_a_diverged_run(digits, teacher, tmp_path, capsys, monkeypatch):
    """The others are trained, the verdict names it, and it is not trained again; without any other there is none."""
    options = options_of(digits, teacher, tmp_path)
    argv = [*options, "--seeds", "0", "--arms", "fixed:0.5,lr=1e12", "fixed:0.5"]
    assert main(argv) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "fixed:0.5,lr=1e12 has no result with the seeds 0: it diverged" in out
    assert {row["arm"]: bool(row["diverged"]) for row in rows(tmp_path / "compare" / "compare.csv")} == {
        "none": False, "fixed:0.5,lr=1e12": True, "fixed:0.5": False,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "train", None)
        assert main(argv) == 0
        assert main([*options, "--seeds", "0", "--arms", "fixed:0.5,lr=1e12"]) == 1
    assert "No verdict: all arms with a teacher have diverged" in " ".join(capsys.readouterr().out.split())


def test_a_split_of_its_own_judges(digits, teacher, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    shutil.copytree(data / "validation", data / "test")
    image = min((data / "test").rglob("*.png"))
    image.unlink()
    argv = [*options_of(data, teacher, tmp_path), "--seeds", "0", "--arms", "fixed:0.5", "--judge-split", "test"]
    assert main(argv) == 0
    lines = rows(tmp_path / "compare" / "compare.csv")
    number = 29 / 100
    assert all(
        float(row["top1_judged"]) * number == pytest.approx(round(float(row["top1_judged"]) * number)) for row in lines
    )
    text = (tmp_path / "compare" / "compare.md").read_text()
    assert "'validation' chose, the 29 images of 'test' judged." in text


def test_images_are_held_out_for_one_arm_alone(digits, teacher, tmp_path):
    argv = [*options_of(digits, teacher, tmp_path), "--seeds", "0", "--arms", "heldout:0.25,every=2", "dto"]
    assert main([*argv, "--jobs", "2"]) == 0
    lines = rows(tmp_path / "compare" / "compare.csv")
    assert [row["arm"] for row in lines] == ["none", "heldout:0.25,every=2", "dto"]
    assert all(row["top1_judged"] for row in lines)


def test_a_shorter_schedule(digits, teacher, tmp_path):
    more = ["--epochs", "20", "--warmup-epochs", "4", "--decay-milestones", "8", "16", "--schedule-share", "0.25"]
    plan = plans.Plan(parsed([*options_of(digits, teacher, tmp_path), *more]))
    own = next(plan.runs()).options
    assert (own.epochs, own.warmup_epochs, own.decay_milestones, own.decay_epochs) == (5, 1, [2, 4], 22.5)
    for epoch, expected in (("0", 0), ("1", 1), ("12", 3)):  # 0 would be never
        plan = plans.Plan(parsed([*options_of(digits, teacher, tmp_path), *more, "--mixup-off-epoch", epoch]))
        assert next(plan.runs()).options.mixup_off_epoch == expected


def test_preview_trains_nothing(compared, digits, teacher, tmp_path, capsys):
    assert main([*options_of(digits, teacher, tmp_path), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "6 runs, 6 to train" in " ".join(capsys.readouterr().out.split())
    assert main([*options_of(digits, teacher, compared), "--seeds", "0", "1", "2", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "9 runs, 3 to train" in out
    assert "min are left" in out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--arms", "nobody"], "--arms: 'nobody'"),
        (["--arms", "dto:foo=1"], "--arms: 'dto:foo=1'"),
        (["--arms", "fixed:0.5", "fixed:0.50"], "--arms: 'fixed:0.5' and 'fixed:0.50' are the same"),
        (["--arms", "fixed:0.5", "fixed:0.5,lr=0.001"], "'fixed:0.5' and 'fixed:0.5,lr=0.001' are the same with these"),
        (["--arms", "none"], "--arms: none alone"),
        (["--arms", "dto:opt=foo"], "--arms: 'dto:opt=foo': --opt: no optimizer is called 'foo'"),
        (["--arms", "heldout:0.01"], "--arms: 'heldout:0.01': --kd-held-out: 0.01 of 64 images are 1"),
        (["--seeds", "0", "1", "0"], "--seeds: 0 is there twice"),
        (["--val-split", ""], "--val-split: empty"),
        (["--judge-split", "validation"], "--judge-split: 'validation' is the --val-split too"),
        (["--judge-split", "foo"], "'foo'"),
    ],
)
def test_refused(digits, teacher, tmp_path, capsys, more, told):
    assert main([*options_of(digits, teacher, tmp_path), *more]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--kd-teacher-path {there}/nothing.safetensors", "there is no file"),
        ("--kd-model-name test_vit", "does not hold weights of 'test_vit'"),
        ("--kd-distill-type feature --arms fixed:0.5 whilebetter", "--arms: 'whilebetter': no teacher predicts"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_first_run(digits, tmp_path, capsys, more, told):
    """After it the folder would be one of another teacher."""
    path = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    argv = [*options_of(digits, path, tmp_path / "out"), *more.format(there=tmp_path).split()]
    assert main(argv) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_objectives_of_several_teachers_are_counted(digits, teacher, tmp_path):
    """One has a classifier of other classes: its features alone are imitated."""
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), other)
    more = ["--kd-model-name", "test_resnet", "test_resnet", "--kd-teacher-path", str(teacher), str(other)]
    more += ["--kd-distill-type", "logit", "feature", "--arms", "fixed:0.4", "share:0.4"]
    plan = plans.Plan(parsed([*options_of(digits, teacher, tmp_path), *more]))
    assert plan.arms["fixed:0.4"]["distill_loss_weight"] == [0.2]
    assert plan.arms["share:0.4"]["kd_balance_kwargs"] == {"shares": [0.4, 0.2, 0.2, 0.2]}


def test_refused_without_a_teacher(digits, tmp_path, capsys):
    assert main(["compare", *common(digits, tmp_path)]) == 2
    assert "--kd-model-name: missing" in capsys.readouterr().err


def test_a_run_is_no_comparison(digits, teacher, tmp_path, capsys):
    """Its folder stays as it is."""
    assert main(["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "1"]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert main([*options_of(digits, teacher, tmp_path), "--experiment", "x"]) == 2
    assert "--experiment: " in (error := capsys.readouterr().err)
    assert "holds a run of dtokd train" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("argv", [["--seeds"], ["--arms"], ["--schedule-share", "0"], ["--jobs", "0"]])
def test_refused_by_the_parser(digits, teacher, tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as end:
        main([*options_of(digits, teacher, tmp_path), *argv])
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 5}', "[" * 100_000])
@pytest.mark.parametrize("name", ["comparison.json", "none/seed-0/finished.json"])
def test_damaged_notes(compared, digits, teacher, tmp_path, capsys, name, text):
    output = shutil.copytree(compared, tmp_path / "out")
    (output / "compare" / name).write_text(text)
    assert main(options_of(digits, teacher, output)) == 2
    error = capsys.readouterr().err
    assert f"{name} is damaged" in error
    assert error.count("\n") == 1


# ---- several processes


def test_in_processes(digits, teacher, tmp_path, capsys, compared):
    """Two at a time have the results of one after the other."""
    assert main([*options_of(digits, teacher, tmp_path), "--jobs", "2"]) == 0
    for row, again in zip(rows(compared / "compare/compare.csv"), rows(tmp_path / "compare/compare.csv"), strict=True):
        assert {**again, "seconds": row["seconds"]} == row
    assert "2 runs shared the machine" in (tmp_path / "compare" / "compare.md").read_text()
    assert "epoch 1/1" in (tmp_path / "compare" / "none" / "seed-0.log").read_text()


def test_times_are_those_of_the_call_that_trained(digits, teacher, tmp_path):
    """A later call, with other --jobs, trains nothing, and still tells that runs have shared the machine."""
    argv = options_of(digits, teacher, tmp_path)
    plan = plans.Plan(parsed(argv))
    plan.begin()
    for run in plan.runs():
        plans.Result(50.0, 50.0, seconds=1.0, jobs=1 + run.seed).write(run)
    assert main([*argv, "--jobs", "1"]) == 0
    assert "up to 2 runs shared the machine" in (tmp_path / "compare" / "compare.md").read_text()


def test_a_signal_ends_all_processes(digits, teacher, tmp_path):
    argv = [*options_of(digits, teacher, tmp_path), "--jobs", "2", "--epochs", "500"]
    process = subprocess.Popen([sys.executable, "-m", "dtokd", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logs = [tmp_path / "compare" / name / "seed-0.log" for name in ("none", "fixed_0.5")]
    end = time.monotonic() + 120
    while not all(log.exists() and "evaluation" in log.read_text() for log in logs):
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out.decode()
    assert all("are saved: the same command" in " ".join(log.read_text().split()) for log in logs)
    assert not list(tmp_path.rglob(".lock"))


class Ended:
    """A process that has ended in some way."""

    def __init__(self, code, printed):
        self.returncode, self._printed = code, printed

    def poll(self):
        return self.returncode

    def wait(self):
        return self.returncode


@pytest.mark.parametrize(
    ("code", "printed", "told"),
    [
        (-9, "epoch 1\n", r"ended by signal 9 \(SIGKILL\); it may have had too little memory"),
        (1, "Traceback\nKeyError: 1\n", "ended with exit code 1"),
        (2, "dtokd train: error: --model: foo\n", r"none with seed 0: --model: foo"),
    ],
)
def test_a_process_that_fails(digits, teacher, tmp_path, capsys, monkeypatch, code, printed, told):
    """One sentence, no traceback, and no file that says that the run is finished."""

    def start(run, jobs, device):
        processes.log_of(run).parent.mkdir(parents=True, exist_ok=True)
        processes.log_of(run).write_text(printed)
        return run, Ended(code, printed), processes.log_of(run).open("ab")

    monkeypatch.setattr(processes, "_start", start)
    assert main([*options_of(digits, teacher, tmp_path), "--jobs", "2"]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not list(tmp_path.rglob("finished.json"))


def test_gpus_in_turn(digits, teacher, tmp_path, monkeypatch):
    """Each run sees one GPU: of those that this process sees."""
    options = parsed([*options_of(digits, teacher, tmp_path), "--device", "cuda"])
    assert processes.gpus(options) == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.gpus(options) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert processes.gpus(options) == ["5", "7"]
    options.device = "cuda:1"
    assert processes.gpus(options) == []
