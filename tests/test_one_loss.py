"""`BalancedLoss`: the gradient of its one loss is that of the optimizers' one-pass steps, in a loop for one loss."""

import pickle

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels.sources import Ema, Every, Feature, Probe
from dtokd_kernels.weighting import DTO, Amortized, LogSum, PCGrad, Share, UPGrad, WhileBetter

from .oracle import Student, batch, losses_of, nothing_with_gradient

STEPS = 5


def hidden_of(student, data):
    """The losses, and the representation that both share."""
    x, y, z = data
    hidden = torch.tanh(student.trunk(x)) * student.scale
    task, distill = (student.head(hidden) - y).square().mean(), (student.projector(hidden) - z).square().mean()
    return {"task": task, "distill": 5 * distill}, hidden


def ours(rule, source, steps=STEPS, parts=1):
    """The optimizer's own step, with gradient sets."""
    student = Student()
    optimizer = dk.DTOSGD(student.parameters(), lr=0.05, weighting=rule, gram=source(student), rescale="none")
    for step in range(steps):
        for part in range(parts):
            losses, hidden = hidden_of(student, batch(parts * step + part))
            optimizer.backward(
                losses, share=1 / parts, features=hidden if "Feature()" in repr(source(student)) else None
            )
        optimizer.step()
        optimizer.zero_grad()
    return student


def plain(rule, source, steps=STEPS, parts=1, scaler=None, each=None):
    """A loop for one loss: any trainer's."""
    student = Student()
    balanced = dk.BalancedLoss(rule, gram=source(student))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for step in range(steps):
        for part in range(parts):
            losses, hidden = hidden_of(student, batch(parts * step + part))
            features = hidden if "Feature()" in repr(source(student)) else None
            loss = balanced(losses, features=features, scaler=scaler)
            assert loss.item() == pytest.approx(sum(v.item() for v in losses.values()), rel=1e-14)
            (loss / parts if scaler is None else scaler.scale(loss / parts)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if each is not None:
            each(step, balanced)
    return student


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


SOURCES = {
    "probe": lambda student: Probe(student.trunk),
    "all": lambda student: Probe([student.trunk, student.scale, student.head, student.projector]),
    "feature": lambda student: Feature(),
    "module": lambda student: Feature(student.trunk),
    "every": lambda student: Every(2, Feature()),
    "ema": lambda student: Ema(0.5, Probe(student.trunk)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "rule", [DTO, lambda: Share({"task": 0.3, "distill": 0.7}), UPGrad], ids=["dto", "share", "up"]
)
def test_as_an_optimizers_one_pass(rule, source):
    assert_same(plain(rule(), SOURCES[source]), ours(rule(), SOURCES[source]))


@pytest.mark.parametrize(
    "rule",
    [Amortized, LogSum, lambda: WhileBetter("task"), lambda: PCGrad(seed=3)],
    ids=["amortized", "logsum", "whilebetter", "pcgrad"],
)
def test_rules_of_other_kinds(rule):
    source = SOURCES["feature"] if rule().__class__ is PCGrad else lambda student: None
    assert_same(plain(rule(), source), ours(rule(), source))


def test_shares_frozen_take_no_measurement():
    def rule():
        return Share({"task": 0.3, "distill": 0.7}, freeze_after=2)

    counts = []
    real = torch.autograd.grad

    def counted(*args, **options):
        counts.append(1)
        return real(*args, **options)

    seen = []
    torch.autograd.grad = counted
    try:
        plain(rule(), SOURCES["feature"], each=lambda step, _: seen.append(len(counts)))
    finally:
        torch.autograd.grad = real
    assert seen == [2, 4, 4, 4, 4]
    assert_same(plain(rule(), SOURCES["feature"]), ours(rule(), SOURCES["feature"]))


@pytest.mark.parametrize("rule", [DTO, UPGrad], ids=["log", "raw"])
def test_accumulation(rule):
    """Each micro-batch is weighed by itself, as in the optimizers' one-pass steps."""
    assert_same(plain(rule(), SOURCES["probe"], parts=2), ours(rule(), SOURCES["probe"], parts=2))


def test_scale_changes_nothing():
    rule = Share({"task": 0.3, "distill": 0.7})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected = plain(Share({"task": 0.3, "distill": 0.7}), SOURCES["feature"])
    assert_same(plain(rule, SOURCES["feature"], scaler=scaler), expected)


def test_small_gradients_in_fp16_need_the_scale():
    """Without it what is measured is 0."""
    w = torch.full((4,), 2.0**-14, dtype=torch.float16, requires_grad=True)
    z = w * 2.0**-14
    losses = [(z * 2.0**-14).float().sum() + 1, (2 * z * 2.0**-14).float().sum() + 1]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    balanced = dk.BalancedLoss(Share([0.5, 0.5], total=1.0), gram=Probe(w))
    balanced(losses, scaler=scaler)
    assert balanced.balance.norms.tolist() == [2.0**-27, 2.0**-26]
    balanced(losses)
    assert balanced.balance.norms.tolist() == [0, 0]


def test_weights_of_autocast_are_of_float64():
    """The Gram matrix and the rule are not computed in bfloat16, even inside the trainer's autocast."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(16, 4), torch.randn(8, 16)

    def found(inside):
        balanced = dk.BalancedLoss(gram=Feature())
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
            losses = [out.float().square().mean(), (out.float() - 1).square().mean()]
            if inside:
                balanced(losses, features=out)
        if not inside:
            balanced(losses, features=out)
        return balanced.balance.weights

    assert torch.equal(found(True), found(False))


@pytest.mark.parametrize("scaled", [False, True])
def test_what_cannot_be_balanced_counts_nothing(scaled):
    """The host does not know of it on a GPU: the coefficients are zero, or NaN for a scaler to see."""
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    balanced = dk.BalancedLoss(Share([0.5, 0.5], beta=0.5), gram=Probe(w))
    values = [w.sum(), nothing_with_gradient(w, torch.inf)]
    loss = balanced(values, scaler=torch.amp.GradScaler("cpu") if scaled else None)
    assert loss.item() == 3
    assert balanced.balance.skipped
    assert balanced.state_dict()["weighting"]["counts"].tolist() == [0, 0]  # nothing is remembered of it
    roots = torch.autograd.grad(loss, values)
    assert all(root.isnan() if scaled else root == 0 for root in roots)


def test_evaluation_is_the_sum_and_leaves_the_memory():
    student = Student()
    balanced = dk.BalancedLoss(Share({"task": 0.3, "distill": 0.7}), gram=Feature())
    with torch.no_grad():
        losses, hidden = hidden_of(student, batch())
        assert balanced(losses, features=hidden).item() == pytest.approx(sum(losses.values()).item(), rel=1e-15)
        assert balanced(list(losses.values())).item() == pytest.approx(sum(losses.values()).item(), rel=1e-15)
        assert balanced(losses["task"]) == losses["task"]
        with pytest.raises(TypeError, match=r"BalancedLoss: losses\['task'\] is a float"):
            balanced({"task": 0.5})
        with pytest.raises(ValueError, match=r"losses\['task'\] has shape \(2,\), expected a scalar"):
            balanced({"task": torch.ones(2)})
    assert balanced.state_dict() == {}
    assert balanced.balance is None


@pytest.mark.parametrize("source", ["feature", "every", "ema"])
def test_saved_with_any_optimizer(source):
    """A run that is cut and loaded goes on bit for bit, through pickle-free files."""

    def run(cut):
        torch.manual_seed(0)
        student, state = Student(), None
        for begin, end in ((0, cut), (cut, 6)):
            balanced = dk.BalancedLoss(Share({"task": 0.3, "distill": 0.7}, beta=0.9), gram=SOURCES[source](student))
            optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
            balanced.save_with(optimizer)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(begin, end):
                losses, hidden = hidden_of(student, batch(step))
                balanced(losses, features=None if source == "ema" else hidden).backward()
                optimizer.step()
                optimizer.zero_grad()
            state = pickle.loads(pickle.dumps(optimizer.state_dict()))
        return student

    for p, q in zip(run(3).parameters(), run(6).parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_that_is_refused_leaves_optimizer_and_memory():
    student = Student()

    def new(rule, *more):
        balanced = dk.BalancedLoss(rule)
        optimizer = torch.optim.SGD([{"params": student.parameters()}, *more], lr=0.1, momentum=0.9)
        balanced.save_with(optimizer)
        balanced(losses_of(student, batch())).backward()
        optimizer.step()
        return balanced, optimizer

    balanced, optimizer = new(Amortized())
    before = str(optimizer.state_dict())
    _, more = new(Amortized(), {"params": [torch.nn.Parameter(torch.ones(1))]})
    _, of_another_rule = new(Amortized("eq18"))
    for state, message in (
        (more.state_dict(), "different number of parameter groups"),
        (of_another_rule.state_dict(), "belongs to another weighting"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()) == before
    assert balanced.state_dict()


def test_state_without_the_entry_leaves_the_memory():
    student = Student()
    rule = Amortized()
    balanced, optimizer = dk.BalancedLoss(rule), torch.optim.SGD(student.parameters(), lr=0.1)
    balanced(losses_of(student, batch())).backward()
    theirs, memory = optimizer.state_dict(), balanced.state_dict()
    balanced.save_with(optimizer)
    optimizer.load_state_dict(theirs)
    assert str(balanced.state_dict()) == str(memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gram is None, but one loss is weighed before"),
        ({"gram": "exact"}, "gram is 'exact', but one loss is weighed before"),
        ({"gram": "lag"}, "gram is 'lag', but one loss is weighed before"),
        ({"gram": Probe()}, r"gram is Probe\(\), but one loss is weighed before"),
        ({"gram": Every(2)}, "but one loss is weighed"),
        ({"gram": "none"}, "gram is 'none', but weighting"),
        ({"weighting": LogSum(), "gram": "exact"}, "gram is 'exact', but one loss is weighed before"),
        ({"weighting": Amortized(), "rescale": "mean"}, "rescale is 'mean'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        dk.BalancedLoss(**options)


def test_refused_losses():
    student = Student()
    losses, hidden = hidden_of(student, batch())
    balanced = dk.BalancedLoss(gram=Feature())
    with pytest.raises(ValueError, match="has no features for this call; pass backward"):
        balanced(losses)
    with pytest.raises(ValueError, match=r"BalancedLoss: losses\['task'\] is -"):
        balanced({**losses, "task": -losses["task"]}, features=hidden)
    with pytest.raises(ValueError, match=r"BalancedLoss: losses\['task'\] needs no gradient"):
        balanced({**losses, "task": losses["task"].detach()}, features=hidden)
    rule = dk.BalancedLoss(Share({"task": 0.5, "kd": 0.5}), gram=Feature())
    with pytest.raises(ValueError, match="shares"):
        rule(losses, features=hidden)
    assert balanced.balance is None


def test_losses_of_several_dtypes_and_shapes():
    """The sum is of the widest type, at least float32; each loss's gradient is of its own."""
    w = [torch.ones(3, dtype=t, requires_grad=True) for t in (torch.float16, torch.float64)]
    values = [w[0].sum() * 2**-10, w[1].sum().reshape(1, 1)]
    loss = dk.BalancedLoss(LogSum())(values)
    assert loss.dtype is torch.float64
    assert loss.shape == ()
    loss.backward()
    for p, value in zip(w, values, strict=True):
        torch.testing.assert_close(p.grad, torch.full_like(p, value.item() / 3 / 2 / value.item()), rtol=1e-3, atol=0)
    assert dk.BalancedLoss(LogSum())([w[0].sum()]).dtype is torch.float32
