"""The drop-ins for other projects' balancers, against plain code of their published rules."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from dtokd.audiocraft import Balancer

import dtokd_kernels as dk

from .oracle import Student, batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Model Optimizer, where it is installed
    from dtokd.modelopt import LossBalancer

# ---- audiocraft ------------------------------------------------------------------------------------

WEIGHTS = {"l1": 1.0, "feat": 4.0, "adv": 2.0}


class Published:
    """EnCodec, section 3.4, in plain numbers; with the options of audiocraft's class."""

    def __init__(self, balance_grads=True, total_norm=1.0, ema_decay=0.999, per_batch_item=True, epsilon=1e-12):
        self.balance, self.total, self.decay = balance_grads, total_norm, ema_decay
        self.items, self.epsilon, self.sums, self.counts = per_batch_item, epsilon, {}, {}

    def gradient(self, grads, losses):
        """What the output receives, and the effective loss; grads by name, [B, ...]."""
        whole = sum(WEIGHTS[name] for name in grads)
        direction, effective = 0.0, 0.0
        averages = {}
        for name, g in grads.items():
            norm = sum(item.norm().item() for item in g) / len(g) if self.items else g.norm().item()
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + norm
            self.counts[name] = self.decay * self.counts.get(name, 0.0) + 1
            averages[name] = self.sums[name] / self.counts[name]
        for name, g in grads.items():
            scale = WEIGHTS[name]
            if self.balance:
                scale = WEIGHTS[name] / whole * self.total / (self.epsilon + averages[name])
            direction, effective = direction + scale * g, effective + scale * losses[name].item()
        return direction, effective, averages


def generator_losses(model, step):
    """Of an output [8, 3]; the second and third with norms that are orders of magnitude apart."""
    x, y, _ = batch(step)
    out = model.head(torch.tanh(model.trunk(x)) * model.scale)
    losses = {"l1": (out - y).abs().mean(), "feat": 100 * (out - y).square().mean(), "adv": F.relu(1 - out).mean() / 50}
    if step == 2:
        losses.pop("adv")  # a discriminator that pauses
    return losses, out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"total_norm": 3.0, "ema_decay": 0.5},
        {"per_batch_item": False, "ema_decay": 0.9},
        {"balance_grads": False},
        {"epsilon": 0.01},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_audiocraft(options):
    """Gradients of the parameters and effective losses over steps; a loss may pause."""
    model, plain = Student(), Student()
    balancer, published = Balancer(dict(reversed(WEIGHTS.items())), monitor=True, **options), Published(**options)
    for step in range(5):
        losses, out = generator_losses(model, step)
        effective = balancer.backward(losses, out)
        others, target = generator_losses(plain, step)
        grads = {n: torch.autograd.grad(v, target, retain_graph=True)[0] for n, v in others.items()}
        direction, expected, averages = published.gradient(grads, others)
        target.backward(direction)
        assert effective.item() == pytest.approx(expected, rel=1e-12)
        assert not effective.requires_grad
        ratios = {f"ratio_{name}": norm / sum(averages.values()) for name, norm in averages.items()}
        assert {name: value.item() for name, value in balancer.metrics.items()} == pytest.approx(ratios, rel=1e-12)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def test_audiocraft_is_share_at_the_output():
    """With the whole batch's norm: one rule, two doors."""
    model, plain = Student(), Student()
    shares = {name: w / sum(WEIGHTS.values()) for name, w in WEIGHTS.items()}
    rule = dk.weighting.Share(shares, total=2.0, beta=0.9)
    balanced = dk.BalancedLoss(rule, gram=dk.sources.Feature())
    balancer = Balancer(WEIGHTS, total_norm=2.0, ema_decay=0.9, per_batch_item=False, epsilon=0.0)
    for step in (0, 1, 3):
        losses, out = generator_losses(model, step)
        balancer.backward(losses, out)
        losses, out = generator_losses(plain, step)
        balanced(losses, features=out).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def test_audiocraft_trains_only_what_is_before_the_output():
    discriminator, model = torch.nn.Linear(3, 1, dtype=torch.float64), Student()
    _, out = generator_losses(model, 0)
    Balancer({"adv": 1.0}).backward({"adv": -discriminator(out).mean()}, out)
    assert all(p.grad is None for p in discriminator.parameters())
    assert model.trunk.weight.grad.abs().sum() > 0


def test_audiocraft_saves_its_averages():
    whole, cut = Balancer(WEIGHTS), Balancer(WEIGHTS)
    first, second = Student(), Student()
    for step in range(4):
        if step == 2:
            state, cut = copy.deepcopy(cut.state_dict()), Balancer(WEIGHTS)
            cut.load_state_dict(state)
        for balancer, model in ((whole, first), (cut, second)):
            balancer.backward(*generator_losses(model, step))
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(first.parameters(), second.parameters(), strict=True)
        if p.grad is not None
    )
    with pytest.raises(ValueError, match=r"the state has the losses \['l1', 'feat', 'adv'\]; weights has \['kl'\]"):
        Balancer({"kl": 1.0}).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {}}, "weights is {}; pass a number for each loss"),
        ({"weights": {"l1": 0.0}}, "weights is {'l1': 0.0}; pass a number"),
        ({"weights": {"l1": 1.0, "adv": -1.0}}, "a weight is -1.0; pass a number"),
        ({"total_norm": 0}, "total_norm is 0; pass a positive number"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; pass from 0 to below 1"),
        ({"epsilon": -1}, "epsilon is -1; pass a number that is not negative"),
    ],
)
def test_audiocraft_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        Balancer(**{"weights": WEIGHTS, **options})


def test_audiocraft_refuses_losses():
    model, balancer = Student(), Balancer(WEIGHTS)
    losses, out = generator_losses(model, 0)
    with pytest.raises(ValueError, match=r"no weight of the losses \['kl'\]; weights has \['l1', 'feat', 'adv'\]"):
        balancer.backward({**{n: losses[n] for n in ("l1", "adv")}, "kl": losses["feat"]}, out)
    with pytest.raises(ValueError, match=r"losses\['adv'\] does not depend on input"):
        balancer.backward({**losses, "adv": model.scale.square().sum()}, out)
    with pytest.raises(ValueError, match=r"weights of the losses \['l1'\] are all 0"):
        Balancer({"l1": 0.0, "adv": 1.0}).backward({"l1": losses["l1"]}, out)
    with pytest.raises(TypeError, match="losses is a list; pass a dict"):
        balancer.backward(list(losses.values()), out)
    with pytest.raises(ValueError, match="input is a scalar and has no items; pass per_batch_item=False"):
        balancer.backward({"l1": model.scale * 2}, model.scale)
    assert balancer.state_dict() == {}
    assert all(p.grad is None for p in model.parameters())


def test_vqgan():
    """The published code at the last layer, and the diff of docs/migration.md."""
    model, plain = Student(), Student()
    rule = dk.weighting.Share([1.0, 0.5], beta=0.0, primary=0)
    balanced = dk.BalancedLoss(rule, gram=dk.sources.Probe(model.head.weight))
    for step in range(3):
        losses, _ = generator_losses(model, step)
        balanced([losses["l1"], losses["feat"]]).backward()
        losses, _ = generator_losses(plain, step)
        first, second = (
            torch.autograd.grad(losses[name], plain.head.weight, retain_graph=True)[0] for name in ("l1", "feat")
        )
        (losses["l1"] + 0.5 * (first.norm() / second.norm()).detach() * losses["feat"]).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


# ---- Model Optimizer -------------------------------------------------------------------------------


def ratio_balancer(losses):
    """Model Optimizer's published rule for two losses: distillation is scaled to the value of the task's loss."""
    task, distill = losses.values()
    return task + distill * (task.detach() / distill.detach())


def modelopt_losses(model, step=0):
    x, y, z = batch(step)
    hidden = torch.tanh(model.trunk(x)) * model.scale
    task, distill = (model.head(hidden) - y).square().mean(), (model.projector(hidden) - z).square().mean()
    return {"student_loss": task, "MSELoss_0": distill}


def test_modelopt_log_sum_is_its_rule_for_two_losses():
    """Up to the length: L_task times the gradient of the sum of the logarithms, of which LogSum takes the mean."""
    model, plain = Student(), Student()
    LossBalancer(dk.BalancedLoss(dk.weighting.LogSum()))(modelopt_losses(model)).backward()
    losses = modelopt_losses(plain)
    ratio_balancer(losses).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad * 2 * losses["student_loss"].detach(), q.grad)


def test_modelopt_reduces_the_students_loss_first():
    model = Student()
    balancer = LossBalancer(dk.BalancedLoss(dk.weighting.Amortized()))
    losses = modelopt_losses(model)
    per_item = torch.stack([losses["student_loss"], 3 * losses["student_loss"]])
    balancer.set_student_loss_reduction_fn(torch.mean)
    total = balancer({**losses, "student_loss": per_item})
    torch.testing.assert_close(total, 2 * losses["student_loss"] + losses["MSELoss_0"])
    assert balancer.balanced.balance.names == ("student_loss", "MSELoss_0")
    assert list(balancer.parameters()) == []  # which Model Optimizer demands


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh()), torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.trunk(x))


@pytest.mark.filterwarnings("ignore")
def test_modelopt_itself():
    """Converted, trained, exported: as the plain loop with the same balance."""
    mtd = pytest.importorskip("modelopt.torch.distill")
    torch.manual_seed(0)
    teacher, model = Net(), Net()
    plain, taught = copy.deepcopy(model), copy.deepcopy(teacher)
    logits = mtd.LogitsDistillationLoss(reduction="batchmean")
    criterion = {("trunk", "trunk"): torch.nn.MSELoss(), ("head", "head"): logits}

    def make(student):
        rule = dk.weighting.Share({"student_loss": 0.2, "MSELoss_0": 0.3, "LogitsDistillationLoss_1": 0.5})
        return dk.BalancedLoss(rule, gram=dk.sources.Probe(student.trunk))

    settings = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": LossBalancer(make(model))}
    student, balanced = mtd.convert(model, mode=[("kd_loss", settings)]), make(plain)
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (student, plain)]
    for step in range(3):
        x, y, _ = (t.float() for t in batch(step))
        loss = student.compute_kd_loss(student_loss=(student(x) - y).square().mean())
        loss.backward()
        hidden, target = plain.trunk(x), taught.trunk(x).detach()
        out, wanted = plain.head(hidden), taught(x).detach()
        losses = {
            "student_loss": (out - y).square().mean(),
            "MSELoss_0": F.mse_loss(hidden, target),
            "LogitsDistillationLoss_1": F.kl_div(out.log_softmax(1), wanted.softmax(1), reduction="batchmean"),
        }
        expected = balanced(losses)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    exported = mtd.export(student)
    for p, q in zip(exported.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
