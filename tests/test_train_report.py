"""`dtokd report`, `dtokd eval`."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from dtokd import evaluate, metric
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.report.chart import line_chart
from dtokd.report.page import write_report

from .digits import common, distilling
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def trained(digits, teacher, tmp_path_factory):
    """Two epochs, with TensorBoard; the last one's EMA is the student."""
    torch.set_num_threads(1)
    options = common(digits, tmp_path_factory.mktemp("runs"))
    options += [*distilling(teacher), "--kd-balance", "dto", "--opt", "dtoadamw", "--log-tensorboard"]
    assert main(["train", *options, "--experiment", "a<b", "--kd-distill-type", "feature"]) == 0
    return next(p.parent for p in __import__("pathlib").Path(options[options.index("--output") + 1]).rglob("args.yaml"))


class Page(HTMLParser):
    """Checks the nesting; collects captions, outside references and the numbers of lines."""

    def __init__(self, text):
        super().__init__()
        self.open, self.captions, self.outside, self.lines = [], [], [], 0
        self.names, self.shown = [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.outside += [v for k, v in attributes if k in ("src", "href")]
        self.lines += tag == "polyline"
        self.shown += tag == "tr" and "details" not in self.open
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.lines += tag == "polyline"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions.append(data)
        if self.open and self.open[-1] == "span":
            self.names.append(data)


def test_report(trained):
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert "@import" not in text
    assert "url(" not in text
    told = " ".join(page.captions)
    for figure in ("Accuracy", "Losses", "Weights", "Conflict", "Dominance"):
        assert figure in told
    assert page.lines >= 10
    assert len([name for name in page.names if name.strip()]) == page.lines, "a curve without a name"
    assert "feature / task" in page.names
    assert page.shown == 0, "rows of a table stand between the reader and what concludes"
    assert text.index("<figure>") < text.index("<details>")
    assert "a&lt;b" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "kd_teacher_path" in text
    assert torch.__version__ in text


def test_report_again(trained, capsys):
    before = (trained / "report.html").read_text()
    assert main(["report", str(trained)]) == 0
    assert (trained / "report.html").read_text() == before
    assert main(["report", str(trained.parent)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def scalars(path):
    """From each name in TensorBoard to its (step, value) pairs."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    shown = events.EventAccumulator(str(path / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_tensorboard(trained):
    """Losses, evaluation and learning rate where each epoch ends, beside the balanced steps."""
    found = scalars(trained)
    assert "dto/weight_task" in found
    epochs = rows(trained / "summary.csv")
    for name, column in (("train/loss", "train_loss"), ("train/feature", "train_feature"), ("lr", "lr")):
        assert [step for step, _ in found[name]] == [3, 7]
        assert [v for _, v in found[name]] == pytest.approx([float(row[column]) for row in epochs], rel=1e-6)
    assert [value for _, value in found["eval/top1"]] == pytest.approx([float(row["eval_top1"]) for row in epochs])


def test_tensorboard_of_a_weighted_sum(digits, tmp_path):
    """Without a balance too; after a resume each epoch once."""
    options = ["train", *common(digits, tmp_path), "--log-tensorboard", "--experiment", "x", "--resume", "auto"]
    assert main([*options, "--epochs", "1"]) == 0
    assert main([*options, "--epochs", "3"]) == 0
    found = scalars(tmp_path / "x")
    assert found.keys() == {"train/loss", "train/task", "eval/loss", "eval/top1", "eval/top5", "lr"}
    assert [[step for step, _ in pairs] for pairs in found.values()] == [[3, 7, 11]] * 6


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", ["390,844", "1400,900"])
def test_report_in_a_browser(trained, tmp_path, size):
    """It renders, on a phone and on a desk; the picture is not of one colour."""
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
    subprocess.run([*command, f"--screenshot={shot}", (trained / "report.html").as_uri()], check=True, timeout=60)
    from PIL import Image

    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24)) > 10


def test_chart():
    svg = line_chart("a & b", {"one": [(0, 1.0), (1, float("nan")), (2, 100.0)], "none": []}, "x", log=True, mark=1)
    assert "a &amp; b" in svg
    assert svg.count("<polyline") == 1
    assert "nan" not in svg
    assert line_chart("", {"a": [(0, float("nan"))]}, "x") == ""
    assert line_chart("", {"a": [(0, 0.0)]}, "x", log=True) == ""
    assert "<circle" in line_chart("", {"a": [(3, 7.0)]}, "x")
    many = line_chart("", {str(i): [(0, i), (1, i)] for i in range(9)}, "x")
    looks = [part.partition('"')[0] for part in many.split('<polyline class="')[1:]]
    assert len(set(looks)) == 9, "two lines look the same"
    gap = line_chart("", {"a": [(0, 1.0)], "none": [], "c": [(0, 2.0)]}, "x")
    assert '<i class="s2"></i>c' in gap, "an arm has another colour in another chart"
    long = line_chart("", {"a": [(i, i % 2) for i in range(10_001)]}, "x")
    assert long.count(",") < 500


def test_eval_is_the_runs_own(trained, capsys):
    assert main(["eval", str(trained), "--workers", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    best = max(rows(trained / "summary.csv"), key=lambda row: float(row["eval_top1"]))
    assert (result["top1"], result["loss"]) == (float(best["eval_top1"]), pytest.approx(float(best["eval_loss"])))
    assert result["images"] == 30


def test_eval_takes_its_batch_size(trained, tmp_path, monkeypatch):
    """Also of a run that was judged with another one."""
    path = shutil.copytree(trained, tmp_path / "x")
    text = (path / "args.yaml").read_text()
    (path / "args.yaml").write_text(text.replace("validation_batch_size: null", "validation_batch_size: 30"))
    assert text != (path / "args.yaml").read_text()
    sizes, load = [], evaluate.data.validation_loader

    def noted(*arguments):
        loader = load(*arguments)
        sizes.append(loader.loader.batch_size)
        return loader

    monkeypatch.setattr(evaluate.data, "validation_loader", noted)
    assert main(["eval", str(path)]) == main(["eval", str(path), "-b", "5"]) == 0
    assert sizes == [30, 5]


def test_eval_of_a_run_with_published_weights_is_refused(trained, capsys):
    """It would judge the run's own weights."""
    assert main(["eval", str(trained), "--pretrained"]) == 2
    assert "--pretrained" in capsys.readouterr().err


def test_eval_prints_json(trained, capsys, monkeypatch):
    """NaN, as the loss of a student that has diverged, is no number of JSON."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"top1": 10.0, "loss": float("nan"), "x": float("inf")})
    assert main(["eval", str(trained), "--workers", "0"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (result["top1"], result["loss"], result["x"]) == (10.0, None, None)


def test_eval_counts_the_images_that_it_has_skipped(trained, digits, tmp_path, capsys):
    """Not those of an earlier evaluation, which may have been repaired since."""
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(digits, tmp_path / "data")
    options = ["eval", str(run), "--workers", "0", "--data-dir", str(data), "--on-bad-image", "skip"]
    images = sorted((data / "validation").rglob("*.png"))[:2]
    held = [image.read_bytes() for image in images]

    def count():
        assert main(options) == 0
        return json.loads(capsys.readouterr().out).get("skipped_images", 0)

    for image in images:
        image.write_bytes(b"")
    assert count() == 2
    assert count() == 2
    images[0].write_bytes(held[0])
    assert count() == 1
    images[1].write_bytes(held[1])
    assert count() == 0


def test_eval_of_weights(trained, teacher, digits, capsys):
    options = ["eval", "--data-dir", str(digits), "--workers", "0", "--img-size", "32", "--checkpoint", str(teacher)]
    assert main([*options, "--model", "test_resnet"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 30
    for more, message in (
        (["--model", "test_vit"], "does not hold weights of test_vit"),
        (["--model", "test_resnet", "--val-split", "test"], "has no folder 'test'"),
        (["--model", "test_resnet", "--num-classes", "11"], "does not hold weights of test_resnet"),
    ):
        assert main([*options, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", "--data-dir", str(digits)]) == 2
    assert "no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "lower", "best"),
    [
        ([1.0, 3.0, 2.0, 3.0], False, 1),
        ([1.0, 3.0, 2.0, 1.0], True, 0),
        ([NAN, 1.0, NAN, 2.0, NAN], False, 3),
        ([NAN, 2.0, NAN, 1.0, float("inf")], True, 3),
        ([NAN, NAN, NAN], False, 2),
        ([NAN, NAN, NAN], True, 2),
    ],
)
def test_best_epoch(values, lower, best):
    """NaN is no epoch's best while there is a number; the last one of nothing but NaN has learned longest."""
    assert metric.best_of(values, lower) == best


def test_report_of_nothing(tmp_path):
    with pytest.raises(UsageError, match="is no run directory"):
        write_report(tmp_path)
