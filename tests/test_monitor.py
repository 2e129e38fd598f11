"""The log of balanced steps: what is written, when, and that nothing waits in between; warnings about weightings."""

import math
import sys
import types
import warnings

import pytest
import torch
from dtokd import monitor
from dtokd.monitor import CSV, BalanceLogger, TensorBoard, WandB
from torch import nn

import dtokd_kernels as dk

from .oracle import Student, batch, losses_of, nothing_with_gradient
from .written import rows


class Kept:
    """A sink that remembers."""

    def __init__(self):
        self.flushes, self.closed = [], 0

    def write(self, rows, means):
        self.flushes.append((rows, means))

    def close(self):
        self.closed += 1

    @property
    def rows(self):
        return [row for rows, _ in self.flushes for row in rows]


def train(steps, optimizer=None, each=lambda balance: None, model=None, bad=()):
    """Balances of a run; the steps in `bad` have a gradient that is not finite."""
    model = Student() if model is None else model
    optimizer = dk.DTOAdamW(model.parameters(), lr=0.05) if optimizer is None else optimizer
    balances = []
    for step in range(steps):
        losses = losses_of(model, batch(step))
        if step in bad:
            losses["task"] = losses["task"] + nothing_with_gradient(model.scale, torch.nan)
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        balances.append(optimizer.balance)
        each(optimizer.balance)
    return balances


def test_columns_of_a_step(backend):
    sink = Kept()
    with BalanceLogger([sink], every=4) as logger:
        balances = train(4, each=lambda balance: logger.log(balance, loss=balance.norm * 2))
    for step, (row, balance) in enumerate(zip(sink.rows, balances, strict=True)):
        expected = {
            "step": step,
            "weight_task": balance.weights[0],
            "weight_distill": balance.weights[1],
            "norm_task": balance.norms[0],
            "norm_distill": balance.norms[1],
            "share_task": (parts := balance.coefficients.abs() * balance.norms)[0] / parts.sum(),
            "share_distill": parts[1] / parts.sum(),
            "cosine_task_distill": balance.cosine[0, 1],
            "conflict": balance.conflict,
            "dominance": balance.dominance,
            "vertex": balance.vertex,
            "norm": balance.norm,
            "skipped": balance.skipped,
            "loss": balance.norm * 2,
        }
        assert list(row) == list(expected)
        for name, value in expected.items():
            # a few roundings in a quotient of a product
            assert abs(row[name] - float(value)) <= 4 * 2.0**-52 * abs(float(value)), name
    assert balances[0].names == ("task", "distill")


def test_means_leave_out_skipped_steps(backend):
    sink = Kept()
    with BalanceLogger([sink], every=8) as logger:
        balances = train(8, each=logger.log, bad=(2, 5))
    taken = [b for b in balances if not b.skipped]
    assert len(taken) == 6
    ((rows, means),) = sink.flushes
    assert means["step"] == rows[-1]["step"] == 7
    assert means["skip_rate"] == 2 / 8
    assert means["conflict_rate"] == sum(float(b.conflict) for b in taken) / 6
    assert means["vertex_rate"] == sum(float(b.vertex) for b in taken) / 6
    close = {"rel": 1e-12}
    assert means["weight_task"] == pytest.approx(sum(float(b.weights[0]) for b in taken) / 6, **close)
    assert means["dominance"] == pytest.approx(math.prod(float(b.dominance) for b in taken) ** (1 / 6), **close)
    assert means["conflict_rate"] + means["vertex_rate"] > 0


def test_nothing_but_skipped_steps(backend):
    sink = Kept()
    with BalanceLogger([sink], every=2) as logger:
        train(2, each=logger.log, bad=(0, 1))
    ((_, means),) = sink.flushes
    assert means["skip_rate"] == 1
    assert math.isnan(means["norm"])
    assert math.isnan(means["dominance"])


def test_flushes_every_n_steps_and_at_the_end():
    sink = Kept()
    with BalanceLogger([sink], every=3, step=100) as logger:
        for i, balance in enumerate(train(8)):
            logger.log(balance)
            assert len(sink.flushes) == (i + 1) // 3
        assert sink.closed == 0
    assert [len(rows) for rows, _ in sink.flushes] == [3, 3, 2]
    assert [row["step"] for row in sink.rows] == list(range(100, 108))
    assert sink.closed == 1
    logger.close()
    assert sink.closed == 1
    with pytest.raises(RuntimeError, match="is closed"):
        logger.log(balance)


@pytest.mark.parametrize("make", [dk.DTOAdamW, dk.DTOSGD])
def test_logs_an_optimizer_by_itself(make):
    model, sink = Student(), Kept()
    optimizer = make(model.parameters())
    with BalanceLogger([sink], every=2, optimizer=optimizer):
        balances = train(5, optimizer, model=model)
    assert [row["norm"] for row in sink.rows] == [b.norm.item() for b in balances]
    train(1, optimizer, model=model)  # the hook is gone
    assert len(sink.rows) == 5


def test_logs_backward_of_any_optimizer():
    model, sink = Student(), Kept()
    with BalanceLogger([sink]) as logger:
        record = dk.backward(losses_of(model, batch()), model.parameters())
        logger.log(record)
    assert sink.rows[0]["weight_distill"] == record.weights[1].item()


@pytest.mark.parametrize("K", [1, 3])
def test_number_of_objectives(backend, K):
    """Without names objectives are numbered; conflict is that of any pair."""
    sink = Kept()
    p = nn.Parameter(torch.ones(4))
    targets = torch.tensor([0.0, 3.0, -2.0])[:K]
    with BalanceLogger([sink]) as logger:
        logger.log(dk.backward([(p - t).square().sum() for t in targets], [p]))
        gram = torch.eye(K) + (torch.tensor([[0.0, -0.5, 0.5], [-0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]))[:K, :K]
        logger.log(dk.balance(gram, torch.ones(K)))
    first, second = sink.rows
    assert ("dominance" in first) == (K > 1)
    assert first["norm_0"] == 4.0
    assert second["conflict"] == float(K > 1)
    if K == 3:
        assert first["cosine_0_1"] == -1
        assert second["cosine_1_2"] == 0.5


def test_other_columns_are_refused_and_lose_nothing():
    sink = Kept()
    two, one = dk.balance(torch.eye(2), [1.0, 1.0]), dk.balance(torch.eye(1), [1.0])
    with BalanceLogger([sink]) as logger:
        logger.log(two, loss=two.norm)
        for args, kwargs in (((one,), {"loss": two.norm}), ((two,), {}), ((two,), {"accuracy": two.norm})):
            with pytest.raises(ValueError, match="with another logger"):
                logger.log(*args, **kwargs)
        logger.log(two, loss=two.norm)
    assert len(sink.rows) == 2


@pytest.mark.parametrize("every", [0, -3])
def test_every_is_positive(every):
    with pytest.raises(ValueError, match="every is"):
        BalanceLogger([], every=every)


def test_waits_only_in_a_flush():
    """Steps stay on the device; a flush copies once, and reads the copy."""
    waits = []
    balances = train(20)
    with BalanceLogger([Kept()], every=10) as logger:
        for i, balance in enumerate(balances):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with dk.debug.warn_on_sync(), dk.debug.watch("logger"):
                    logger.log(balance)
            waits += [(i, str(w.message).split()[3]) for w in caught]
    assert waits == [(i, f"torch.Tensor.{name},") for i in (9, 19) for name in ("cpu", "tolist")]


def test_a_record_that_is_written_anew():
    """As a captured graph does in each replay: what was logged stays."""
    sink = Kept()
    record = dk.balance(torch.eye(2), [1.0, 1.0])
    with BalanceLogger([sink]) as logger:
        logger.log(record)
        record.norm.fill_(7.0)
        logger.log(record)
    assert [row["norm"] for row in sink.rows] == [pytest.approx(0.5**0.5), 7.0]


def test_written_after_an_exception(tmp_path):
    path = tmp_path / "new" / "steps.csv"
    other = Kept()
    balances = train(5)

    def fail():
        with BalanceLogger([CSV(path), other], every=3) as logger:
            for balance in balances:
                logger.log(balance)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(rows(path)) == 5
    assert other.closed == 1


def test_a_sink_that_fails_leaves_the_others_closed():
    class Full(Kept):
        def write(self, rows, means):
            raise OSError("no space left")

    full, other = Full(), Kept()
    logger = BalanceLogger([full, other])
    logger.log(dk.balance(torch.eye(2), [1.0, 1.0]))
    with pytest.raises(OSError, match="no space left"):
        logger.close()
    assert (full.closed, other.closed) == (1, 1)


def test_csv_of_steps_and_of_means(tmp_path):
    steps, means = tmp_path / "steps.csv", tmp_path / "means.csv"
    with BalanceLogger([CSV(steps), CSV(means, means=True)], every=4) as logger:
        balances = train(8, each=logger.log)
        assert len(rows(steps)) == 8  # on disk after each flush
    lines = rows(steps)
    assert [float(row["norm"]) for row in lines] == pytest.approx([b.norm.item() for b in balances], rel=1e-8)
    assert [row["step"] for row in lines] == [str(i) for i in range(8)]
    assert [row["step"] for row in rows(means)] == ["3", "7"]
    assert "conflict_rate" in rows(means)[0]


def test_csv_goes_on_or_starts_anew(tmp_path):
    path = tmp_path / "steps.csv"
    record, three = dk.balance(torch.eye(2), [1.0, 1.0]), dk.balance(torch.eye(3), [1.0, 1.0, 1.0])

    def run(record, **options):
        with BalanceLogger([CSV(path, **options)]) as logger:
            logger.log(record)

    run(record, append=True)
    run(record, append=True)
    assert len(rows(path)) == 2
    with pytest.raises(ValueError, match=r"steps\.csv has the columns"):
        run(three, append=True)
    assert len(rows(path)) == 2
    run(three)
    assert len(rows(path)) == 1


class Writer:
    """Stands for tensorboard's."""

    def __init__(self, directory, purge_step=None):
        self.directory, self.scalars, self.closed = directory, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_mocked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    sink = TensorBoard(tmp_path)
    with BalanceLogger([sink], every=2, step=10) as logger:
        balances = train(2, each=logger.log)
    writer = sink._writer
    assert writer.directory == str(tmp_path)
    assert ("dto/weight_task", balances[0].weights[0].item(), 10) in writer.scalars
    assert ("dto_mean/conflict_rate", sum(float(b.conflict) for b in balances) / 2, 11) in writer.scalars
    assert writer.closed


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with BalanceLogger([TensorBoard(tmp_path)], every=2) as logger:
        train(2, each=logger.log)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_tensorboard_shows_each_step_once(tmp_path):
    """A process wrote four steps and ended; the next one goes on with the second."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    for first in (0, 1):
        with BalanceLogger([TensorBoard(tmp_path, first)], every=1, step=first) as logger:
            train(4 - first, each=logger.log)
    shown = events.EventAccumulator(str(tmp_path)).Reload()
    for name in ("dto/norm", "dto_mean/norm"):
        assert [event.step for event in shown.Scalars(name)] == [0, 1, 2, 3]


class Run:
    """Stands for a run of W&B."""

    def __init__(self):
        self.logged, self.metrics = [], []

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize("given", [True, False])
def test_wandb_mocked(monkeypatch, given):
    """The current run, or the one that is given; flushes over a step axis of their own."""
    run = Run()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None if given else run))
    with BalanceLogger([WandB(run) if given else WandB()], every=2) as logger:
        train(4, each=logger.log)
    assert run.metrics == [("dto/*", "dto/step")]
    assert [values["dto/step"] for values in run.logged] == [1, 3]
    assert all("dto/conflict_rate" in values for values in run.logged)


@pytest.mark.parametrize(
    ("sink", "module", "arguments"), [("TensorBoard", "torch.utils.tensorboard", ("x",)), ("WandB", "wandb", ())]
)
def test_what_is_not_installed(monkeypatch, sink, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{sink}: the package is not installed; pip install {sink.lower()}"):
        getattr(monitor, sink)(*arguments)


def test_wandb_without_a_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    with pytest.raises(RuntimeError, match=r"wandb\.init"):
        WandB()


# ---- weightings that wait for the device -----------------------------------------------------------


def equal(gram):
    return torch.full_like(gram[0], 0.5)


WAITING = {
    "if": lambda gram: gram[0] if gram[0, 0] > 1 else gram[1],
    "item": lambda gram: equal(gram) * gram[0, 0].item(),
    "float": lambda gram: equal(gram) * float(gram[0, 0]),
    "tolist": lambda gram: torch.tensor(gram.diagonal().tolist()),
    "numpy": lambda gram: torch.from_numpy(gram.numpy().diagonal().copy()),
    "cpu": lambda gram: gram.diagonal().cpu(),
    "solve": lambda gram: torch.linalg.solve(gram, equal(gram)),
    "nonzero": lambda gram: gram[0][(gram[0] > -1).nonzero().flatten()],
    "mask": lambda gram: gram[0][gram[0] > -1],
    "in": lambda gram: gram[0] if 2.0 in gram else gram[1],
}
GRAM = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("case", WAITING)
def test_waiting_weighting_is_warned_about(backend, case):
    """At the weighting's own line, and only where it is asked for."""
    dk.balance(GRAM, [1.0, 1.0], WAITING[case])
    with dk.debug.warn_on_sync(), pytest.warns(dk.debug.SyncWarning, match="makes the host wait") as caught:
        dk.balance(GRAM, [1.0, 1.0], WAITING[case])
    assert caught[0].filename == __file__
    assert caught[0].lineno == WAITING[case].__code__.co_firstlineno


def test_weightings_that_do_not_wait(backend):
    with dk.debug.warn_on_sync(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for weighting in (
            dk.weighting.DTO(),
            dk.weighting.LogSum(),
            lambda gram: gram.diagonal().rsqrt() / gram.diagonal().rsqrt().sum(),
            lambda gram: torch.linalg.solve_ex(gram, equal(gram))[0],
            lambda gram, losses: torch.where(gram[0, 0] > losses[0], gram[0], gram[1]),
        ):
            dk.balance(GRAM, [1.0, 1.0], weighting)


def test_waiting_weighting_of_an_optimizer(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=WAITING["if"])
    with dk.debug.warn_on_sync(), pytest.warns(dk.debug.SyncWarning):
        train(1, optimizer, model=model)


# ---- names -----------------------------------------------------------------------------------------


def test_two_objectives_of_one_name():
    """Keys differ, but what is logged and saved under their names would not."""
    p = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([p])
    with pytest.raises(ValueError, match=r"two objectives named '1', of the keys 1 and '1'"):
        optimizer.backward({1: p.sum(), "0": p.sum(), "1": p.sum()})
    with pytest.raises(ValueError, match="two objectives named"):
        dk.backward({1: p.sum(), "1": p.sum()}, [p])
    assert p.grad is None
    assert optimizer.objectives == ()


def test_steps_that_measured_nothing_say_nothing_of_conflicts():
    kept, model = Kept(), Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=dk.weighting.LogSum())
    with BalanceLogger([kept], every=2, optimizer=optimizer):
        train(2, optimizer, model=model)
    ((rows, means),) = kept.flushes
    assert all(math.isnan(row["conflict"]) and math.isnan(row["dominance"]) for row in rows)
    assert math.isnan(means["conflict_rate"])
    assert math.isnan(means["dominance"])
    assert means["norm"] > 0


@pytest.mark.parametrize(
    ("names", "scalars"),
    [
        (("a", "b_c", "a_b", "c"), {}),
        (("a", "b"), {"norm": torch.tensor(1.0)}),
        (("a", "b"), {"step": torch.tensor(1.0)}),
    ],
)
def test_columns_of_one_name_are_refused(names, scalars):
    w = nn.Parameter(torch.ones(3))
    record = dk.backward({name: (w * i).sum() for i, name in enumerate(names, 1)}, [w])
    with BalanceLogger([], every=1) as logger, pytest.raises(ValueError, match="would stand twice"):
        logger.log(record, **scalars)
