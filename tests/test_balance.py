"""dk.balance: from a raw Gram matrix and losses to what multiplies the raw gradients."""

import functools

import pytest
import torch

import dtokd_kernels as dk

from . import tolerances
from .inputs import families

U = 2.0**-53
GRAM = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
LOSSES = torch.tensor([2.0, 0.5], dtype=torch.float64)


def case(K, family="random", seed=0):
    """(J [K, n] raw gradients, Gram matrix, losses of different sizes)."""
    J = families(K, seed)[family]
    losses = torch.logspace(-1, 1, K, dtype=torch.float64)
    return J, J @ J.T, losses


def close(actual, expected, ulps=16, scale=None):
    """Within a few roundings of `scale`, by default the largest of `expected`: K-sized float64 arithmetic."""
    scale = expected.abs().max().item() if scale is None else scale
    assert (actual - expected).abs().max().item() <= ulps * U * scale


@pytest.mark.parametrize("K", range(1, 9))
def test_weights_are_those_of_the_log_gradients(backend, K):
    J, gram, losses = case(K)
    log_gradients = J / losses[:, None]  # Eq. 8
    balance = dk.balance(gram, losses)
    log_gram = log_gradients @ log_gradients.T
    expected = dk.min_norm_weights(log_gram)
    assert (balance.weights - expected).abs().max() <= 2 * tolerances.weights_bound(log_gram)
    close(balance.coefficients * losses, balance.weights)


@pytest.mark.parametrize("K", [2, 3])
def test_fields(backend, K):
    J, gram, losses = case(K)
    balance = dk.balance(gram, losses)
    assert torch.equal(balance.gram, gram)
    close(balance.norms, J.norm(dim=1))
    unit = J / J.norm(dim=1)[:, None]
    close(balance.cosine, unit @ unit.T)
    close(balance.norm, (balance.coefficients @ J).norm(), ulps=64, scale=(balance.coefficients * J.norm(dim=1)).sum())
    for name in ("weights", "coefficients", "private_coefficients", "plain_coefficients", "norms"):
        field = getattr(balance, name)
        assert (field.shape, field.dtype) == ((K,), torch.float64), name
    assert (balance.cosine.shape, balance.cosine.dtype) == ((K, K), torch.float64)
    assert (balance.norm.shape, balance.norm.dtype) == ((), torch.float64)
    for flag in (balance.vertex, balance.skipped, balance.conflict):
        assert (flag.shape, flag.dtype) == ((), torch.bool)


def test_golden(backend):
    balance = dk.balance(GRAM, LOSSES)
    # log-gradients: Gram [[4.5, -22], [-22, 152]], so pi = (174, 26.5) / 200.5
    close(balance.weights, torch.tensor([174.0, 26.5], dtype=torch.float64) / 200.5)
    close(balance.coefficients, torch.tensor([87.0, 53.0], dtype=torch.float64) / 200.5)


def test_conflict_and_dominance(backend):
    balance = dk.balance(GRAM, LOSSES)
    assert balance.conflict
    close(balance.dominance, torch.tensor(38 / 18, dtype=torch.float64).sqrt())
    assert not dk.balance(GRAM.abs(), LOSSES).conflict
    three = torch.eye(3, dtype=torch.float64)
    assert not dk.balance(three, [1.0, 1.0, 1.0]).conflict
    three[0, 2] = three[2, 0] = -0.1
    assert dk.balance(three, [1.0, 1.0, 1.0]).conflict


@pytest.mark.parametrize(
    "losses", [LOSSES, LOSSES.float(), [2.0, 0.5], (2, 0.5)], ids=["float64", "float32", "list", "tuple"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinds_of_arguments(backend, losses, dtype):
    expected = dk.balance(GRAM, LOSSES)
    balance = dk.balance(GRAM.to(dtype), losses)
    assert torch.equal(balance.weights, expected.weights)
    assert torch.equal(balance.coefficients, expected.coefficients)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("rescale", ["none", "sum"])
def test_constant_factor_of_a_loss(backend, K, rescale):
    """a L has gradient a g, so 1 / L takes the factor out again. Powers of two: to the bit, but for the rescaling."""
    _, gram, losses = case(K)
    factors = 2.0 ** torch.tensor([10, -7, 3, 0, -20], dtype=torch.float64)[:K]
    plain = dk.balance(gram, losses, rescale=rescale)
    scaled = dk.balance(factors[:, None] * gram * factors, factors * losses, rescale=rescale)
    assert torch.equal(scaled.weights, plain.weights)
    if rescale == "none":
        assert torch.equal(scaled.coefficients * factors, plain.coefficients)
        assert scaled.norm == plain.norm
    else:
        products = scaled.coefficients * factors
        close(products / products.sum(), plain.coefficients / plain.coefficients.sum())


def test_constant_factor_without_log_gradients(backend):
    """Over raw gradients the factor does matter: the same test would fail there."""
    weighting = dk.weighting.DTO(log_gradients=False)
    factors = torch.tensor([4.0, 1.0], dtype=torch.float64)
    plain = dk.balance(GRAM, LOSSES, weighting)
    scaled = dk.balance(factors[:, None] * GRAM * factors, factors * LOSSES, weighting)
    close(plain.weights, torch.tensor([0.6, 0.4], dtype=torch.float64))
    assert torch.equal(plain.coefficients, plain.weights)
    assert not torch.allclose(scaled.weights, plain.weights)


def test_loss_floor(backend):
    """A loss below the floor counts as the floor, in the weights and in the coefficients."""
    low = dk.balance(GRAM, torch.tensor([1e-12, 0.5]), loss_floor=1e-3)
    at = dk.balance(GRAM, torch.tensor([1e-3, 0.5], dtype=torch.float64), loss_floor=1e-3)
    assert torch.equal(low.weights, at.weights)
    assert torch.equal(low.coefficients, at.coefficients)
    assert torch.equal(low.private_coefficients, torch.tensor([1 / 1e-3, 2.0], dtype=torch.float64))
    assert not low.skipped
    default = dk.balance(GRAM, torch.tensor([1e-12, 0.5], dtype=torch.float64))
    assert default.private_coefficients[0] == 1 / 1e-8


@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_rescale_sum(backend, K):
    """The same direction, with coefficients that sum to 1."""
    _, gram, losses = case(K)
    paper = dk.balance(gram, losses)
    rescaled = dk.balance(gram, losses, rescale="sum")
    assert torch.equal(rescaled.weights, paper.weights)
    assert abs(rescaled.coefficients.sum().item() - 1) <= 2 * K * U
    total = paper.coefficients.sum()
    close(rescaled.coefficients * total, paper.coefficients)
    close(rescaled.norm * total, paper.norm, ulps=64)


@pytest.mark.parametrize("rescale", ["none", "sum"])
def test_private_and_plain_coefficients(backend, rescale):
    balance = dk.balance(GRAM, LOSSES, rescale=rescale)
    private = 1 / LOSSES if rescale == "none" else torch.ones(2)
    assert torch.equal(balance.private_coefficients, private.double())
    assert balance.plain_coefficients.tolist() == [1.0, 1.0]
    raw = dk.balance(GRAM, LOSSES, dk.weighting.DTO(log_gradients=False), rescale=rescale)
    assert raw.private_coefficients.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1e4])
@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("K", [2, 3])
def test_max_norm_is_clip_grad_norm(backend, K, rescale, max_norm):
    J, gram, losses = case(K)
    free = dk.balance(gram, losses, rescale=rescale)
    clipped = dk.balance(gram, losses, rescale=rescale, max_norm=max_norm)
    p = torch.nn.Parameter(torch.zeros_like(J[0]))
    p.grad = free.coefficients @ J
    norm = torch.nn.utils.clip_grad_norm_([p], max_norm)
    scale = (free.coefficients * J.norm(dim=1)).sum().item()
    close(clipped.norm, norm, ulps=64, scale=scale)
    assert clipped.norm == free.norm
    close(clipped.coefficients @ J, p.grad, ulps=256 * scale / norm.item())
    factor = min(1.0, max_norm / (norm.item() + 1e-6))
    for name in ("coefficients", "private_coefficients", "plain_coefficients"):
        close(getattr(clipped, name), getattr(free, name) * factor, ulps=256)
    assert torch.equal(clipped.weights, free.weights)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("absent", [0, -1])
def test_objective_without_gradient_is_left_out(backend, K, absent):
    J, _, losses = case(K, seed=3)
    J[absent] = 0
    gram = J @ J.T
    balance = dk.balance(gram, losses)
    rest = [i for i in range(K) if i != absent % K]
    alone = dk.balance(gram[rest][:, rest], losses[rest])
    assert balance.weights[absent] == 0
    assert balance.coefficients[absent] == 0
    assert torch.equal(balance.weights[rest], alone.weights)
    assert torch.equal(balance.coefficients[rest], alone.coefficients)
    assert balance.vertex == alone.vertex  # a weight that is 0 because there is nothing to weigh is no vertex
    assert not balance.skipped
    assert (balance.cosine[absent] == 0).all()
    assert balance.norms[absent] == 0
    assert balance.cosine.isfinite().all()


def test_vertex(backend):
    ones = [1.0, 1.0]
    assert not dk.balance(GRAM, ones).vertex
    beyond = torch.tensor([[1.0, 1.5], [1.5, 4.0]], dtype=torch.float64)
    at = dk.balance(beyond, ones)
    assert at.vertex
    assert at.weights.tolist() == [1.0, 0.0]
    affine = dk.balance(beyond, ones, dk.weighting.DTO(clamp=False))
    assert not affine.vertex
    close(affine.weights, torch.tensor([1.25, -0.25], dtype=torch.float64))
    assert not dk.balance(torch.tensor([[3.0]]), [1.0]).vertex
    three = dk.balance(torch.diag(torch.tensor([1.0, 2.0, 0.0]).double()), [1.0, 1.0, 1.0])
    assert not three.vertex  # 0 only where there is no gradient


@pytest.mark.parametrize("log_gradients", [True, False])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_all_gradients_zero_is_skipped(backend, K, log_gradients):
    weighting = dk.weighting.DTO(log_gradients=log_gradients)
    balance = dk.balance(torch.zeros(K, K), torch.ones(K), weighting, max_norm=1.0)
    assert balance.skipped
    assert not balance.vertex
    assert balance.weights.tolist() == [0.0] * K


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("entry", [(0, 0), (1, 1)])
@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize(
    "weighting", [None, dk.weighting.Fixed(), lambda gram: gram.diagonal()], ids=["DTO", "Fixed", "own"]
)
def test_gram_that_is_not_finite_is_skipped(backend, weighting, rescale, entry, bad):
    """One gradient that is not finite: its whole row and column are not (NaN or Inf)."""
    gram = GRAM.clone()
    i = entry[0]
    gram[i] = gram[:, i] = bad
    assert dk.balance(gram, LOSSES, weighting, rescale=rescale, max_norm=1.0).skipped


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 0.0, -1.0])
@pytest.mark.parametrize("position", [0, 1])
def test_bad_loss_is_skipped(backend, position, bad):
    losses = LOSSES.clone()
    losses[position] = bad
    assert dk.balance(GRAM, losses).skipped
    raw = dk.balance(GRAM, losses, dk.weighting.DTO(log_gradients=False))
    assert raw.skipped == (not torch.tensor(bad).isfinite())  # raw gradients may belong to a negative loss


def test_good_step_is_not_skipped(backend):
    assert not dk.balance(GRAM, LOSSES).skipped
    assert not dk.balance(1e-30 * GRAM, LOSSES, max_norm=1.0).skipped


def test_weights_that_are_not_finite_are_skipped(backend):
    assert dk.balance(GRAM, LOSSES, lambda gram: torch.tensor([float("nan"), 1.0])).skipped


class Recorder:
    """A weighting that keeps what it is given."""

    def __init__(self, log_gradients=None):
        if log_gradients is not None:
            self.log_gradients = log_gradients

    def __call__(self, gram, losses):
        self.gram, self.losses = gram, losses
        return torch.tensor([0.25, 0.75])


@pytest.mark.parametrize("log_gradients", [None, True, False])
def test_what_a_weighting_is_given(backend, log_gradients):
    """The Gram matrix of the log-gradients, or the raw one if it says so; and the losses."""
    weighting = Recorder(log_gradients)
    balance = dk.balance(GRAM, LOSSES, weighting)
    scale = torch.ones(2) if log_gradients is False else 1 / LOSSES
    close(weighting.gram, scale[:, None] * GRAM * scale)
    assert torch.equal(weighting.losses.double(), LOSSES)
    assert balance.weights.tolist() == [0.25, 0.75]
    close(balance.coefficients, balance.weights * scale)


def _one(gram):
    return torch.full((len(gram),), 0.5)


def _two(gram, losses):
    return 1 / losses


def _optional(gram, losses=None, scale=1.0):
    return torch.tensor([0.1, 0.9]) if losses is None else torch.zeros(2)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (_one, [0.5, 0.5]),
        (_two, [0.5, 2.0]),
        (_optional, [0.1, 0.9]),  # only what it requires is handed over
        (lambda *args: torch.tensor([float(len(args)), 0.0]), [2.0, 0.0]),
        (functools.partial(_two, losses=torch.tensor([4.0, 8.0])), [0.25, 0.125]),
        (dk.weighting.Fixed([3.0, 4.0]), [3.0, 4.0]),
        (dk.weighting.Fixed(), [0.5, 0.5]),
        (dk.weighting.LogSum(), [0.5, 0.5]),
    ],
    ids=["one", "two", "optional", "varargs", "partial", "Fixed", "Fixed none", "LogSum"],
)
def test_custom_weightings(backend, weighting, expected):
    weights = dk.balance(GRAM, LOSSES, weighting).weights
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=2**-24, atol=0)


def test_fixed_weights_multiply_raw_gradients(backend):
    assert dk.balance(GRAM, LOSSES, dk.weighting.Fixed([3.0, 4.0])).coefficients.tolist() == [3.0, 4.0]
    log = dk.balance(GRAM, LOSSES, dk.weighting.Fixed([3.0, 4.0], log_gradients=True))
    assert log.coefficients.tolist() == [1.5, 8.0]
    assert dk.balance(GRAM, LOSSES, dk.weighting.LogSum()).coefficients.tolist() == [0.25, 1.0]


def test_subclass_of_the_default_weighting(backend):
    """A subclass may decide otherwise: nothing takes it for the DTO that the kernels know."""

    class Half(dk.weighting.DTO):
        def __call__(self, gram, losses=None):
            return super().__call__(gram) / 2

    close(dk.balance(GRAM, LOSSES, Half()).weights, dk.balance(GRAM, LOSSES).weights / 2)


def test_weights_are_dropped_where_there_is_no_gradient(backend):
    gram = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert dk.balance(gram, LOSSES, dk.weighting.Fixed([3.0, 4.0])).coefficients.tolist() == [3.0, 0.0]


def test_backends_agree_on_records_that_are_skipped(backend):
    """Whatever a skipped record holds, its shapes are right, so that logging it does not break."""
    balance = dk.balance(torch.full((2, 2), float("nan")), LOSSES)
    assert balance.skipped
    assert balance.weights.shape == (2,)
    assert balance.cosine.shape == (2, 2)


def test_changes_nothing(backend):
    gram, losses = GRAM.clone().requires_grad_(), LOSSES.clone().requires_grad_()
    balance = dk.balance(gram, losses, max_norm=0.1, rescale="sum")
    assert torch.equal(gram.detach(), GRAM)
    assert torch.equal(losses.detach(), LOSSES)
    assert not balance.coefficients.requires_grad
    assert not balance.gram.requires_grad


def test_one_objective_dominates_none():
    balance = dk.balance(torch.ones(1, 1), torch.ones(1))
    assert not balance.conflict
    with pytest.raises(ValueError, match=r"Balance.dominance: there is one objective"):
        balance.dominance  # noqa: B018
