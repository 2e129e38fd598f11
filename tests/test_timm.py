"""timm's factory, loss scaler, schedulers, averages and optimizers with two objectives, against timm's own."""

import copy
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from dtokd.timm_optim import DTOScaler
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import dtokd_kernels as dk

#: Float32 steps whose gradients were added up in another order: sums of about 1000 products in each of 10 layers,
#: relative to the largest parameter.
REORDERED_32 = 10 * 1000 * 2.0**-24
SUM = dk.weighting.Fixed([1.0, 1.0])  # the plain sum of the losses: what timm's loop trains on


def student():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=10, img_size=32)


def losses_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    labels, teacher = torch.tensor([1, 2, 3, 4]), torch.rand(4, 10, generator=generator).softmax(1)
    logits = model(images)
    return {
        "task": F.cross_entropy(logits, labels),
        "distill": F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean"),
    }


def assert_close(model, expected, allowed=REORDERED_32):
    pairs = list(zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
    size = max(b.abs().max().item() for _, b in pairs)
    assert max((a - b).abs().max().item() for a, b in pairs) <= allowed * size


# ---- the factory -----------------------------------------------------------------------------------

ARGUMENTS = {
    "decay": {"weight_decay": 0.05},
    "no exclusions": {"weight_decay": 0.05, "filter_bias_and_bn": False},
    "layer decay": {"weight_decay": 0.05, "layer_decay": 0.75},
    "layer decay, frozen stem": {"layer_decay": 0.5, "layer_decay_no_opt_scale": 0.3},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [("dtoadamw", "adamw", {"eps": 1e-7, "betas": (0.8, 0.95)}), ("dtosgd", "sgd", {"momentum": 0.8})],
)
def test_parameter_groups_of_timm(ours, theirs, options, arguments):
    """Weight decay exclusions, layer-wise rates, timm's defaults: everything as for the torch optimizer."""
    model = student()
    made = create_optimizer_v2(model, ours, lr=1e-3, max_norm=1.0, **arguments, **options)
    expected = create_optimizer_v2(model, theirs, lr=1e-3, **arguments, **options)
    assert type(made) is (dk.DTOAdamW if ours == "dtoadamw" else dk.DTOSGD)
    assert made.max_norm == 1.0
    assert len(made.param_groups) == len(expected.param_groups)
    for group, other in zip(made.param_groups, expected.param_groups, strict=True):
        group = dict(group)
        assert group.pop("balance") is True
        assert [id(p) for p in group.pop("params")] == [id(p) for p in other["params"]]
        assert group == {k: v for k, v in other.items() if k != "params"}


def test_listed_by_timm():
    assert {"dtoadamw", "dtosgd"} <= set(list_optimizers())
    assert "DTO-KD" in dict(list_optimizers("dto*", with_description=True))["dtosgd"]


def test_groups_keep_parameters_out_of_the_balance():
    model = student()
    groups = [{"params": model.blocks.parameters()}, {"params": model.head.parameters(), "balance": False}]
    assert [g["balance"] for g in create_optimizer_v2(groups, "dtoadamw").param_groups] == [True, False]


# ---- the scaler ------------------------------------------------------------------------------------


def test_signature_is_that_of_native_scaler():
    ours, theirs = (inspect.signature(kind.__call__).parameters for kind in (DTOScaler, NativeScaler))
    assert list(ours)[2:] == [*list(theirs)[2:], "share"]
    assert [p.default for p in list(ours.values())[1:-1]] == [p.default for p in list(theirs.values())[1:]]
    assert DTOScaler.state_dict_key == NativeScaler.state_dict_key


def train(
    scaler, optimizer, model, *, clip_grad=None, single=False, accumulate=1, steps=3, scheduler=None, clip="norm"
):
    """The inner part of timm's train_one_epoch."""
    for update in range(steps):
        for part in range(accumulate):
            losses = losses_of(model, accumulate * update + part)
            scaler(
                sum(losses.values()) / accumulate if single else losses,
                optimizer,
                clip_grad=clip_grad,
                clip_mode=clip,
                parameters=model.parameters(),
                create_graph=False,
                need_update=part == accumulate - 1,
                **({} if single else {"share": 1 / accumulate}),
            )
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step_update(num_updates=update + 1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize(("ours", "theirs"), [("dtoadamw", "adamw"), ("dtosgd", "sgd")])
def test_sum_of_losses_trains_as_timm(ours, theirs, clip_grad, accumulate):
    """With both weights 1 the two sets give what timm's scaler makes of the sum of the losses."""
    model, expected = student(), student()
    # no rescaling, or the weights would be 1 / 2
    optimizer = create_optimizer_v2(model, ours, lr=1e-3, weight_decay=0.05, weighting=SUM, rescale="none", eps=1e-3)
    torchs = create_optimizer_v2(expected, theirs, lr=1e-3, weight_decay=0.05, eps=1e-3)
    scaler, native = DTOScaler("cpu"), NativeScaler("cpu")
    train(scaler, optimizer, model, clip_grad=clip_grad, accumulate=accumulate)
    train(native, torchs, expected, clip_grad=clip_grad, accumulate=accumulate, single=True)
    assert_close(model, expected)
    assert scaler.state_dict() == native.state_dict()
    native.load_state_dict(scaler.state_dict())
    if clip_grad is not None:
        assert optimizer.max_norm == clip_grad
        assert optimizer.balance.norm > clip_grad  # it had something to clip


@pytest.mark.parametrize("clip", ["norm", "value", "agc"])
def test_scaler_with_another_optimizer(clip):
    """The balanced gradient becomes `.grad`; timm's own clipping and torch's scaler do the rest."""
    model, expected = student(), student()
    optimizer, other = (create_optimizer_v2(m, "sgd", lr=1e-3) for m in (model, expected))
    train(DTOScaler("cpu", weighting=SUM), optimizer, model, clip_grad=0.1, clip=clip)
    train(NativeScaler("cpu"), other, expected, clip_grad=0.1, clip=clip, single=True)
    assert_close(model, expected)


@pytest.mark.parametrize("ours", ["dtoadamw", "dtosgd"])
def test_lookahead_around_ours_is_refused(ours):
    """timm's averages a parameter only if it has a `.grad`."""
    model = student()
    with pytest.raises(TypeError, match="Lookahead around DTO"):
        train(DTOScaler("cpu"), create_optimizer_v2(model, f"lookahead_{ours}", lr=1e-3), model, steps=1)
    train(DTOScaler("cpu"), create_optimizer_v2(model, "lookahead_adamw", lr=1e-3), model, steps=1)


def test_disabled_scaler_only_balances():
    model, expected = student(), student()
    train(DTOScaler("cpu", enabled=False), dk.DTOAdamW(model.parameters()), model, steps=2)
    optimizer = dk.DTOAdamW(expected.parameters())
    for step in range(2):
        optimizer.backward(losses_of(expected, step))
        optimizer.step()
        optimizer.zero_grad()
    assert_close(model, expected, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"clip_grad": 1.0, "clip_mode": "agc"}, "clip_mode is 'agc'.*'norm'"), ({"create_graph": True}, "create_graph")],
)
def test_scaler_refuses(arguments, message):
    model = student()
    before = copy.deepcopy(model)
    optimizer = dk.DTOAdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        DTOScaler("cpu")(losses_of(model), optimizer, **arguments)
    assert optimizer.objectives == ()
    assert_close(model, before, 0.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_max_norm_is_checked_when_set(max_norm):
    optimizer = dk.DTOAdamW([torch.nn.Parameter(torch.ones(1))], max_norm=2.0)
    with pytest.raises(ValueError, match="DTOAdamW: max_norm is"):
        optimizer.max_norm = max_norm
    assert optimizer.max_norm == 2.0


# ---- schedulers, averages, optimizers of timm ------------------------------------------------------


def test_scheduler_and_average():
    """timm's schedulers scale the rate of every group by its layer's factor; its average follows the student."""
    runs = []
    for name, scaler, options in (
        ("dtoadamw", DTOScaler("cpu"), {"weighting": SUM, "rescale": "none"}),
        ("adamw", NativeScaler("cpu"), {}),
    ):
        model = student()
        optimizer = create_optimizer_v2(model, name, lr=1e-3, layer_decay=0.75, eps=1e-3, **options)
        scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=4, step_on_epochs=False, updates_per_epoch=1, warmup_epochs=2
        )
        average = ModelEmaV3(model, decay=0.9)
        for update in range(3):
            train(scaler, optimizer, model, single=name == "adamw", steps=1)
            average.update(model, update)
            scheduler.step_update(update + 1)
        runs.append((model, average.module, [group["lr"] for group in optimizer.param_groups]))
    (model, average, rates), (expected, expected_average, expected_rates) = runs
    assert rates == expected_rates
    assert len(set(rates)) > 3
    assert_close(model, expected)
    assert_close(average, expected_average)


@pytest.mark.parametrize("name", ["lion", "adan", "muon", "lamb", "adafactorbv", "madgrad", "nadamw"])
def test_timms_optimizers_take_the_balanced_direction(name):
    """As with the same `.grad` set by hand."""
    model, expected = student(), student()
    optimizers = [create_optimizer_v2(m, name, lr=1e-3, weight_decay=0.05) for m in (model, expected)]
    record = dk.backward(losses_of(model), model.parameters(), rescale="sum")
    params = list(expected.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses_of(expected).values()]
    for p, q, *gs in zip(params, model.parameters(), *grads, strict=True):
        by_hand = sum(c * g for c, g in zip(record.coefficients.float(), gs, strict=True))
        assert (q.grad - by_hand).abs().max() <= 4 * 2.0**-24 * sum(g.abs().max() for g in gs)
        p.grad = q.grad.clone()  # not by_hand: Lion takes the sign of it
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    assert_close(model, expected, 0.0)
    assert all(p.grad is None for p in model.parameters())
