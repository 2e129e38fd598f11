"""Training loops as people write them: each, with two objectives, takes the steps of the plain loop."""

import copy

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import dtokd_kernels as dk

from . import tolerances
from .oracle import Student, batch, losses_of, nothing_with_gradient

STEPS = 4
OPTIMIZERS = {
    "adamw": lambda params, **options: dk.DTOAdamW(params, lr=1e-2, **options),
    "sgd": lambda params, **options: dk.DTOSGD(params, lr=1e-2, momentum=0.9, **options),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_close(actual, expected, allowed=tolerances.REORDERED):
    size = max(b.abs().max().item() for b in expected)
    assert max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True)) <= allowed * size


def loop(make, steps=STEPS, losses=losses_of, model=None):
    """The plain loop."""
    model = Student() if model is None else model
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.backward(losses(model, batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, model


# ---- fp16: GradScaler ------------------------------------------------------------------------------


def scaled_loop(make, scaler, steps=STEPS, unscale=False, model=None, losses=losses_of):
    model = Student() if model is None else model
    optimizer = make(model.parameters())
    for step in range(steps):
        values = losses(model, batch(step))
        optimizer.backward(values, scaler=scaler)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer, model


SCALED = {
    "as it comes": {},
    "sum": {"rescale": "sum"},
    "none": {"rescale": "none"},
    "raw": {"weighting": dk.weighting.DTO(log_gradients=False)},
    "fixed": {"weighting": dk.weighting.Fixed([0.3, 0.7])},
    "clipped": {"max_norm": 0.05},
    "clipped raw": {"max_norm": 0.05, "weighting": dk.weighting.DTO(log_gradients=False)},
    "balanced": {"private": "balanced"},
    "floor": {"loss_floor": 50.0},
}


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("case", SCALED)
@each_optimizer
def test_scale_changes_nothing(backend, make, case, unscale):
    """The scale is a power of 2, so not even the rounding is another; "cuda" takes other launches with a scale."""
    plain, expected = loop(lambda params: make(params, **SCALED[case]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scaled, model = scaled_loop(lambda params: make(params, **SCALED[case]), scaler, unscale=unscale)
    assert scaler.get_scale() == 2.0**12  # it has grown on the way
    if backend == "cuda":
        assert_close(parameters(model), parameters(expected))
    else:
        assert_same(parameters(model), parameters(expected))
        for name in ("weights", "table", "gram", "cosine", "norms", "norm", "vertex", "skipped"):
            # NaN where nothing was measured
            a, b = getattr(scaled.balance, name), getattr(plain.balance, name)
            assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), name


@each_optimizer
def test_scale_with_unbalanced_parameters(backend, make):
    def groups(model):
        return [
            {"params": [*model.trunk.parameters(), model.scale]},
            {"params": [*model.head.parameters(), *model.projector.parameters()], "balance": False},
        ]

    ends = []
    for scaler in (torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)):
        model = Student()
        scaled_loop(lambda _, m=model: make(groups(m), max_norm=0.1), scaler, model=model)
        ends.append(parameters(model))
    assert_close(*ends, allowed=tolerances.REORDERED if backend == "cuda" else 0.0)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
def test_scale_that_is_no_power_of_two(backend, unscale):
    raw = {"weighting": dk.weighting.Fixed()}
    _, expected = loop(lambda params: OPTIMIZERS["sgd"](params, **raw))
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.7)
    _, model = scaled_loop(lambda params: OPTIMIZERS["sgd"](params, **raw), scaler, unscale=unscale)
    assert_close(parameters(model), parameters(expected))


@pytest.mark.parametrize("where", ["task", "distill"])
@pytest.mark.parametrize("reached", ["trunk", "head", "projector"])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
@each_optimizer
def test_overflow_in_any_set(backend, make, unscale, reached, where):
    """No parameter, moment or step counter changes; the scale backs off; the loop goes on."""
    model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = make(model.parameters())

    def step(number, overflow):
        losses = losses_of(model, batch(number))
        if overflow:
            parameter = next(getattr(model, reached).parameters())
            losses[where] = losses[where] + nothing_with_gradient(parameter, torch.inf)
        optimizer.backward(losses, scaler=scaler)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(0, overflow=False)
    before = parameters(model), copy.deepcopy(optimizer.state_dict()["state"])
    step(1, overflow=True)
    assert_same(parameters(model), before[0])
    for state, old in zip(optimizer.state_dict()["state"].values(), before[1].values(), strict=True):
        assert_same(state.values(), old.values())
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_steps == 1
    step(2, overflow=False)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(model.trunk.weight, before[0][0])


def test_step_skipped_for_another_reason_keeps_the_scale(backend):
    """Zero gradients are no overflow: a smaller scale would make them no better."""
    model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    optimizer = dk.DTOAdamW(model.parameters())
    optimizer.backward([1 + 0 * p.sum() for p in (model.trunk.weight, model.scale)], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 8.0


def test_scaler_never_reads_the_gradients(backend, monkeypatch):
    """The scale is folded into the K coefficients."""
    for name in ("_amp_foreach_non_finite_check_and_unscale_", "_foreach_mul_"):
        monkeypatch.delattr(torch, name)
    scaled_loop(OPTIMIZERS["adamw"], torch.amp.GradScaler("cpu"))


def test_small_gradients_need_the_scale(backend):
    """In float16 these gradients underflow; scaled they do not, and the step is that of float32."""

    def losses(model, data):
        x, y, z = data
        with torch.autocast("cpu", torch.float16):
            task, distill = model(x)
        return {
            "task": 1e-7 * (task.float() - y).square().mean(),
            "distill": 1e-7 * (distill.float() - z).square().mean(),
        }

    def batch32(model, data):
        return losses(model, tuple(t.float() for t in data))

    moved = {}
    for scale in (1.0, 2.0**16):
        model, scaler = Student(torch.float32), torch.amp.GradScaler("cpu", init_scale=scale)
        before = parameters(model)
        scaled_loop(lambda p: dk.DTOSGD(p, lr=1e5), scaler, steps=1, model=model, losses=batch32)
        moved[scale] = [p - b for p, b in zip(parameters(model), before, strict=True)]
    exact = Student(torch.float32)
    before = parameters(exact)

    def full(model, data):
        task, distill = model(data[0].float())
        return {
            "task": 1e-7 * (task - data[1].float()).square().mean(),
            "distill": 1e-7 * (distill - data[2].float()).square().mean(),
        }

    loop(lambda p: dk.DTOSGD(p, lr=1e5), steps=1, model=exact, losses=full)
    expected = [p - b for p, b in zip(parameters(exact), before, strict=True)]
    # 2 layers, sums of at most 8 terms forth and back: 4 * 8 roundings, and weights that turn with them
    assert_close(moved[2.0**16], expected, allowed=100 * 2.0**-11)
    assert max((a - b).abs().max() for a, b in zip(moved[1.0], expected, strict=True)) > 0.3 * max(
        e.abs().max() for e in expected
    )


def test_overflow_lowers_the_scale_until_it_fits(backend):
    """The usual start: 2^16 is too much for float16, a few steps are skipped, then training goes on."""

    def losses(model, data):
        x, y, z = (t.float() for t in data)
        with torch.autocast("cpu", torch.float16):
            task, distill = model(x)
        return {"task": 20 * (task.float() - y).square().sum(), "distill": 20 * (distill.float() - z).square().sum()}

    model, scaler = Student(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = parameters(model)
    optimizer, _ = scaled_loop(OPTIMIZERS["adamw"], scaler, steps=12, model=model, losses=losses)
    assert 0 < optimizer.skipped_steps < 12
    assert scaler.get_scale() == 2.0 ** (16 - optimizer.skipped_steps.item())
    assert optimizer.state[model.trunk.weight]["step"] == 12 - optimizer.skipped_steps
    assert not torch.equal(model.trunk.weight, before[0])


def test_scaled_accumulation(backend):
    model, expected = Student(), Student()
    scaler, optimizer, plain = torch.amp.GradScaler("cpu"), None, None
    optimizer, plain = (OPTIMIZERS["adamw"](m.parameters()) for m in (model, expected))
    for part in range(3):
        optimizer.backward(losses_of(model, batch(part)), share=1 / 3, scaler=scaler)
        plain.backward({n: v / 3 for n, v in losses_of(expected, batch(part)).items()})
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert_close(parameters(model), parameters(expected))


def test_losses_scaled_by_hand_are_refused(backend):
    """Their step would be taken whatever the gradients, and `update` would fail with a message about something else."""
    model, scaler = Student(), torch.amp.GradScaler("cpu")
    optimizer = dk.DTOAdamW(model.parameters())
    before = parameters(model)
    optimizer.backward({n: scaler.scale(v) for n, v in losses_of(model, batch()).items()})
    with pytest.raises(RuntimeError, match=r"optimizer\.backward\(losses, scaler=scaler\)"):
        scaler.step(optimizer)
    assert_same(parameters(model), before)


def test_another_scaler_than_that_of_backward_is_refused(backend):
    """Its step would take out a scale that is not in the gradients; the right one takes the step afterwards."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    ours, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (64.0, 8.0))
    other.scale(torch.ones(()))  # as for another model's loss
    for _ in range(2):  # `ours` has taken a step before
        before = parameters(model)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch()), scaler=ours)
        with pytest.raises(RuntimeError, match=r"but backward got another one; .*optimizer\.backward\(losses, scaler="):
            other.step(optimizer)
        assert_same(parameters(model), before)
        ours.step(optimizer)
        ours.update()
        assert any(not torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))


def test_scaler_that_changes_within_a_step_is_refused(backend):
    model, scaler = Student(), torch.amp.GradScaler("cpu")
    optimizer = dk.DTOAdamW(model.parameters())
    optimizer.backward(losses_of(model, batch()), share=0.5, scaler=scaler)
    before = copy.deepcopy(optimizer._sets.grads)
    for other in (None, torch.amp.GradScaler("cpu")):
        with pytest.raises(ValueError, match="scaler is not that of the calls before"):
            optimizer.backward(losses_of(model, batch()), share=0.5, scaler=other)
    for row, old in zip(optimizer._sets.grads, before, strict=True):
        assert all((g is None and o is None) or torch.equal(g, o) for g, o in zip(row, old, strict=True))


def test_torchs_scaler_disabled_is_no_scaler(backend):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, model = scaled_loop(OPTIMIZERS["adamw"], scaler)
    assert_same(parameters(model), parameters(loop(OPTIMIZERS["adamw"])[1]))


def test_one_scaler_for_two_optimizers(backend):
    """An overflow in one backs the scale off once, and the other still steps, as in torch."""
    model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours, theirs = dk.DTOSGD(model.trunk.parameters(), lr=0.1), torch.optim.SGD(model.head.parameters(), lr=0.1)
    before = parameters(model.trunk), parameters(model.head)
    losses = losses_of(model, batch())
    losses["task"] = losses["task"] + nothing_with_gradient(model.trunk.weight, torch.inf)
    ours.backward(losses, scaler=scaler)
    theirs.zero_grad()
    scaler.scale(losses_of(model, batch())["task"]).backward(inputs=list(model.head.parameters()))
    for optimizer in (ours, theirs):
        scaler.step(optimizer)
    scaler.update()
    assert_same(parameters(model.trunk), before[0])
    assert not torch.equal(parameters(model.head)[0], before[1][0])
    assert scaler.get_scale() == 2.0**9


def test_scaler_state_dict(backend):
    ours, theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2), torch.amp.GradScaler("cpu")
    scaled_loop(OPTIMIZERS["sgd"], ours, steps=3)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.get_scale() == 16.0
    assert theirs.state_dict() == ours.state_dict()


@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("log_gradients", [True, False])
def test_torchs_scaler_with_another_optimizer(backend, log_gradients, rescale):
    """`dk.backward(scaler=)` leaves scaled gradients in `.grad`, so torch's own scaler and any optimizer do."""
    options = {"weighting": dk.weighting.DTO(log_gradients=log_gradients), "rescale": rescale, "max_norm": 0.5}
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)):
        model = Student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(STEPS):
            record = dk.backward(losses_of(model, batch(step)), model.parameters(), scaler=scaler, **options)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        ends.append([*parameters(model), record.weights, record.gram, record.norm])
    assert_close(*ends)


@pytest.mark.parametrize("held", [False, True], ids=["no grad", "grad"])
def test_overflow_shows_in_grad_for_the_scaler(backend, held):
    model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = parameters(model)
    if held:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    losses = losses_of(model, batch())
    losses["distill"] = losses["distill"] + nothing_with_gradient(model.projector.weight, torch.inf)
    assert dk.backward(losses, model.parameters(), scaler=scaler).skipped
    scaler.step(optimizer)
    scaler.update()
    assert_same(parameters(model), before)
    assert scaler.get_scale() == 2.0**9


def test_skip_without_overflow_adds_nothing_for_the_scaler(backend):
    model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    assert dk.backward([1 + 0 * model.scale, 2 + 0 * model.scale], [model.scale], scaler=scaler).skipped
    assert model.scale.grad == 0


# ---- bf16, checkpointing, EMA, compile, schedulers, accumulation -----------------------------------


def small(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4), nn.LayerNorm(4)
        )


def small_losses(forward, data):
    x, _, z = data
    out = forward(x.float())
    return {"task": (out - z.float()).square().mean(), "distill": (out.softmax(1) - z.float().softmax(1)).abs().mean()}


#: float32 losses and gradients of `small`, computed in another order: sums of at most 16 products in each of 4 layers,
#: forth and back; weights of a system whose condition is below 10; then Adam's division.
REORDERED_32 = 10 * 8 * 16 * 2.0**-24


@each_optimizer
def test_bf16_autocast(backend, make):
    """Parameters and gradients stay float32; the losses come from bfloat16 products, 2^-8 off each."""

    def losses(model, data):
        with torch.autocast("cpu", torch.bfloat16):
            return small_losses(model, data)

    exact, rounded = small(), small()
    loop(make, steps=1, model=exact, losses=small_losses)
    optimizer, _ = loop(make, steps=1, model=rounded, losses=losses)
    assert optimizer.balance.weights.dtype == torch.float64
    assert all(v.dtype == torch.float32 for state in optimizer.state.values() for v in state.values())
    moved, expected = (
        torch.cat([(p - q).flatten() for p, q in zip(parameters(m), parameters(small()), strict=True)])
        for m in (rounded, exact)
    )
    assert torch.cosine_similarity(moved, expected, 0) > 0.9
    assert not torch.equal(moved, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@each_optimizer
def test_gradient_checkpointing(backend, make, reentrant):
    """The checkpointed part is computed anew in every backward pass, by the same operations."""
    plain, model = small(), small()

    def losses(model, data):
        def forward(x):
            return model[3:](checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant))

        return small_losses(forward, data)

    loop(make, model=plain, losses=small_losses)
    loop(make, model=model, losses=losses)
    assert_close(parameters(model), parameters(plain), REORDERED_32)


@each_optimizer
def test_exponential_moving_average(backend, make):
    model = small()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected = None
    optimizer = make(model.parameters())
    for step in range(STEPS):
        optimizer.backward(small_losses(model, batch(step)))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        now = parameters(model)
        # the first update copies
        expected = now if expected is None else [0.9 * e + 0.1 * p for e, p in zip(expected, now, strict=True)]
    assert_close(parameters(average), expected, 4 * STEPS * 2.0**-24)


@pytest.fixture
def compiler():
    """torch.compile from scratch, and no trace of it."""
    torch.compiler.reset()
    yield
    torch._functorch.config.donated_buffer = True
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["aot_eager", "inductor"])
def test_compiled_model(compiler, kind):
    """Two backward passes through one compiled graph: torch sees at the first that more will come."""
    plain, model = small(), small()
    compiled = torch.compile(model, backend=kind)
    loop(OPTIMIZERS["adamw"], steps=2, model=plain, losses=small_losses)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for step in range(2):
        optimizer.backward(small_losses(compiled, batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    assert_close(parameters(model), parameters(plain), REORDERED_32)


def test_compiled_model_that_was_trained_on_one_loss(compiler):
    """Its compiled backward pass overwrites what it reads: an error with the remedy, and the remedy."""
    plain, model = small(), small()
    compiled = torch.compile(model, backend="aot_eager")
    small_losses(compiled, batch())["task"].backward()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match=r"DTOSGD\.backward.*donated_buffer = False.*torch\.compiler\.reset"):
        optimizer.backward(small_losses(compiled, batch()))
    assert_same(parameters(model), parameters(plain))
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()
    small_losses(compiled, batch())["task"].backward()
    optimizer.backward(small_losses(compiled, batch()))
    optimizer.step()
    loop(lambda p: dk.DTOSGD(p, lr=0.01), steps=1, model=plain, losses=small_losses)
    assert_close(parameters(model), parameters(plain), REORDERED_32)


@each_optimizer
def test_accumulation_with_a_scheduler(backend, make):
    """Two half batches a step, the learning rate halved after each step: as whole batches at the same rates."""

    def train(parts):
        model = small()
        optimizer = make(model.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for step in range(STEPS):
            whole = [t.chunk(parts) for t in batch(step)]
            for part in zip(*whole, strict=True):
                optimizer.backward({n: v / parts for n, v in small_losses(model, part).items()})
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**STEPS
        return parameters(model)

    assert_close(train(2), train(1), REORDERED_32)


# ---- any optimizer: dtokd_kernels.backward ---------------------------------------------------------

OTHERS = {
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_any_optimizer_takes_the_balanced_direction(backend, other):
    """As with the same `.grad` set by hand, from coefficients of the balance."""
    ours, expected = small(), small()
    optimizers = [OTHERS[other](list(m.parameters())) for m in (ours, expected)]
    for step in range(STEPS):
        record = dk.backward(small_losses(ours, batch(step)), ours.parameters(), rescale="sum", max_norm=1.0)
        optimizers[0].step()
        optimizers[0].zero_grad()
        params = list(expected.parameters())
        losses = small_losses(expected, batch(step)).values()
        grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        for p, *gs in zip(params, *grads, strict=True):
            p.grad = sum(c * g for c, g in zip(record.coefficients.float(), gs, strict=True))
        optimizers[1].step()
        optimizers[1].zero_grad()
    # Muon and NAdam divide by what the gradient's own length is: rounding counts as much as with Adam
    assert_close(parameters(ours), parameters(expected), STEPS * REORDERED_32)


def test_fills_grad_without_a_copy(backend):
    """Where there was no `.grad`, the first objective's gradient becomes it; where there was one, it stays in place."""
    made = []
    p = nn.Parameter(torch.ones(64))
    handle = p.register_post_accumulate_grad_hook(lambda q: made.append(q.grad.data_ptr()))
    dk.backward([p.square().sum(), (p - 3).square().sum()], [p])
    handle.remove()
    assert p.grad.data_ptr() == made[0]
    before = p.grad.data_ptr()
    dk.backward([p.square().sum(), (p - 3).square().sum()], [p])
    assert p.grad.data_ptr() == before


def test_every_logs_unscaled_numbers_in_all_steps():
    """In those that keep the weights too."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.0, rescale="sum", gram=dk.sources.Every(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch()), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        exact = dk.backward(losses_of(model, batch()), model.parameters())
        torch.testing.assert_close(optimizer.balance.norms, exact.norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(optimizer.balance.gram, exact.gram, rtol=1e-6, atol=1e-9)


def test_what_a_scaler_said_is_forgotten_with_the_gradients():
    models = [Student(), Student()]
    made = [dk.DTOSGD(m.parameters(), lr=0.1) for m in models]
    scaler = torch.amp.GradScaler("cpu")
    made[0].backward(losses_of(models[0], batch()), scaler=scaler)
    scaler.unscale_(made[0])
    made[0].zero_grad()  # given up
    for model, optimizer in zip(models, made, strict=True):
        optimizer.backward(losses_of(model, batch()))
        optimizer.step()
    assert_same(parameters(models[0]), parameters(models[1]))


def test_zero_grad_inside_a_scaled_step():
    """By a hook, say: what the scaler has put on the optimizer is the scaler's to take away."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        optimizer.backward(losses_of(model, batch(step)), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert not optimizer.balance.skipped
