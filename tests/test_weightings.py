"""dk.weighting: each rule against its definition, against TorchJD and against general solvers; and the memories."""

import copy
import itertools
import pickle

import pytest
import qpsolvers
import torch
import torchjd.aggregation as jd
import torchjd.scalarization as js
from scipy import stats
from scipy.optimize import minimize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchjd.linalg import QuadprogProjector

import dtokd_kernels as dk
from dtokd_kernels import reference, weighting
from dtokd_kernels.types import Options
from dtokd_kernels.weighting import _eigen, _random, pcgrad

from . import tolerances
from .inputs import FAMILIES, families, gram_of
from .oracle import Student, batch, losses_of, nothing_with_gradient

U = 2.0**-53
#: Affinely independent gradients: the result is unique, and well enough conditioned to be compared.
GENERIC = ("random", "wide", "aligned", "conflicting", "tiny", "huge")
SIZES = (1, 2, 3, 5, 8)
NO, YES = torch.tensor(False), torch.tensor(True)

MAKERS = {name: lambda name=name, **options: weighting.from_name(name, **options) for name in weighting.NAMES}
MAKERS["gram"] = lambda: weighting.Amortized("gram")
MAKERS["taskfirst"] = lambda **options: weighting.TaskFirst(
    0, "pcd", tau=0.9, **options
)  # "cosine" has weights of 0, 1
STATEFUL = [name for name, make in MAKERS.items() if isinstance(make(), weighting.Stateful)]
#: These learn from measurements on held-out samples, not from steps (test_held_out.py, test_while_better.py).
OBSERVING = {"heldout", "auto", "whilebetter"}
NEED_NO_GRAM = {"amortized", "dwa", "eq18", "famo", "fixed", "logsum", "rlw", "uncertainty", *OBSERVING}
each_weighting = pytest.mark.parametrize("name", MAKERS)
each_stateful = pytest.mark.parametrize("name", STATEFUL)
learning_from_steps = pytest.mark.parametrize("name", [name for name in STATEFUL if name not in OBSERVING])


def losses(K, seed=0):
    return torch.rand(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def unit(J):
    return J / J.norm(dim=1, keepdim=True)


def step(rule, gram, values, skipped=NO):
    """Weights of one step, with the memory taken over as the optimizers do."""
    grams = torch.stack([gram, torch.zeros_like(gram), torch.zeros_like(gram)])
    weights = reference.balance(grams, values, Options(rule)).weights
    if isinstance(rule, weighting.Stateful):
        rule.commit(skipped)
    return weights


def close(actual, expected, bound):
    assert ((actual - expected).abs() <= bound).all(), (actual, expected, bound)


# ---- what holds for all


class OnTheDevice(TorchDispatchMode):
    """Fails at what stalls a GPU: reading a value, copies from or to the host, solvers that read their error code."""

    READ_THEIR_ERROR_CODE = ("eig", "svd", "inv.", "inverse", "pinv", "solve.", "lstsq")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert devices <= {"cuda"}, f"{func} has tensors on {devices}"
        name = str(func)
        assert "linalg" not in name or not any(word in name for word in self.READ_THEIR_ERROR_CODE), name
        return out


@each_weighting
@pytest.mark.parametrize("K", [1, 2, 5])
def test_nothing_stalls_the_device(name, K):
    """A GPU's tensors without their values: whatever would read one raises, and copies between devices are seen."""
    rule = MAKERS[name]()
    if name == "fixed":
        rule = weighting.Fixed([1.0] * K)
    with FakeTensorMode():
        gram = torch.empty(K, K, dtype=torch.float64, device="cuda")
        values = torch.empty(K, dtype=torch.float64, device="cuda")
        with OnTheDevice():
            for _ in range(2):
                balance = dk.balance(gram, values, rule)
                if isinstance(rule, weighting.Stateful):
                    rule.commit(balance.skipped)
            if getattr(rule, "reading", None) == "famo":
                rule.observe(values)
        assert balance.weights.device.type == "cuda"


@pytest.mark.parametrize(
    "stalling",
    [
        lambda gram: gram * gram[0, 0].item(),
        lambda gram: torch.tensor([1.0, 0.0], device=gram.device),
        lambda gram: gram[[0]],
        lambda gram: gram[gram[0].argmin()],
        lambda gram: gram[gram > 0],
        lambda gram: torch.linalg.eigh(gram)[0],
        lambda gram: gram.cpu(),
    ],
    ids=["value", "list", "index by a list", "index by a scalar", "mask", "error code", "host"],
)
def test_what_stalls_is_seen(stalling):
    """The test above can fail."""
    with FakeTensorMode():
        gram = torch.empty(2, 2, dtype=torch.float64, device="cuda")
        with OnTheDevice(), pytest.raises(Exception, match=r"has tensors on|aten|linalg"):
            stalling(gram)


@each_weighting
@pytest.mark.parametrize("K", SIZES)
def test_weights_are_finite_and_the_same_each_time(name, K):
    for family, J in families(K).items():
        gram = gram_of(J)
        weights = step(MAKERS[name](), gram, losses(K))
        assert weights.dtype == torch.float64
        assert weights.shape == (K,)
        assert weights.isfinite().all(), family
        assert (weights[gram.diagonal() == 0] == 0).all(), family
        assert torch.equal(step(MAKERS[name](), gram, losses(K)), weights), family


@each_weighting
@pytest.mark.parametrize("K", [3, 8])
def test_weights_do_not_depend_on_the_number_of_threads(name, K):
    """Nor on the layout of the matrix."""
    gram = gram_of(families(K)["conflicting"])
    strided = torch.zeros(K, 2 * K, dtype=torch.float64)[:, ::2].copy_(gram)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen += [step(MAKERS[name](), g, losses(K)) for g in (gram, strided)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(weights, seen[0]) for weights in seen)


@each_weighting
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_is_skipped(backend, name, bad):
    """One entry on the diagonal, or a whole row: no solver raises at it, and the step changes nothing."""
    for row in (False, True):
        gram = gram_of(families(3)["random"])
        gram[1, 1] = bad
        if row:
            gram[1] = gram[:, 1] = bad
        assert dk.balance(gram, losses(3), MAKERS[name]()).skipped


@each_weighting
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_as_if_it_had_not_been(name, bad):
    """The step is skipped, and what the weighting remembers is what it was: the next steps are those without it."""
    ends = []
    for disturbed in (False, True):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        torch.manual_seed(0)
        optimizer = dk.DTOSGD([p], lr=0.01, weighting=MAKERS[name](), rescale="sum")
        for step in range(4):
            for spoilt in (True, False) if disturbed and step == 2 else (False,):
                losses = [(p - 3).square().sum() + 1, (p + torch.tensor([2.0, -1.0])).square().sum() + 1]
                if spoilt:
                    losses[1] = losses[1] * bad
                optimizer.backward(losses)
                optimizer.step()
                optimizer.zero_grad()
                assert bool(optimizer.balance.skipped) == spoilt
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


@each_weighting
def test_says_whether_it_needs_the_gram(name):
    """Without need any matrix will do, and with it not."""
    rule = MAKERS[name]()
    needs = getattr(rule, "needs_gram", True)
    assert needs == (name not in NEED_NO_GRAM)
    J = torch.tensor(
        [[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-9.0, 0.0, 3.0]], dtype=torch.float64
    )  # conflicts with the mean
    seen = []
    for gram in (gram_of(J), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double())):
        rule = MAKERS[name]()
        step(rule, gram, losses(3))
        seen.append(step(rule, gram, losses(3, 1)))
    assert torch.equal(*seen) == (not needs)


@pytest.mark.parametrize(
    "name",
    sorted(set(MAKERS) - {"rlw", "fixed", "logsum", "dto", "mgda", "taskfirst", *OBSERVING}),
)
@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("family", ["random", "conflicting"])
def test_permutation_of_objectives(name, K, family):
    """(Positions matter to PCGrad's order and to the primary objective of two rules. `DTO` is in test_weights.py.)"""
    K = 2 if name == "pcgrad" else K
    gram, values = gram_of(families(K)[family]), losses(K)

    def solve(gram, values=values):
        rule = MAKERS[name]()
        step(rule, gram, values)
        return step(rule, gram, values**1.5)

    order = torch.randperm(K, generator=torch.Generator().manual_seed(K))
    permuted = solve(gram[order][:, order], values[order])
    close(permuted, solve(gram)[order], tolerances.sensitivity(solve, gram)[order])


SCALED = ("cagrad", "config", "dto", "dualproj", "imtlg", "mgda", "pcgrad", "upgrad")


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_scale_of_all_gradients(name, K, family):
    """Powers of two scale without a rounding, and the weights keep their bits: no threshold depends on the scale."""
    gram = gram_of(families(K)[family])
    weights = step(MAKERS[name](), gram, losses(K))
    for exponent in (-100, 40):
        assert torch.equal(step(MAKERS[name](), gram * 4.0**exponent, losses(K)), weights)


@pytest.mark.parametrize("name", ["nashmtl", "imtlg", "config"])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_direction_is_invariant_to_the_units_of_the_losses(name, K):
    J = families(K)["random"]
    factors = 2.0 ** torch.arange(-3, K - 3, dtype=torch.float64)
    directions = [
        torch.nn.functional.normalize(step(MAKERS[name](), gram_of(G), losses(K)) @ G, dim=0)
        for G in (J, factors[:, None] * J)
    ]
    close(*directions, 16 * K * U)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - NEED_NO_GRAM - {"gram", "dto", "mgda", "reachable"}))
def test_published_form_is_on_raw_gradients_and_log_gradients_are_a_choice(name):
    gram = torch.tensor([[1.0, 0.5, -9.0], [0.5, 4.25, -4.5], [-9.0, -4.5, 90.0]], dtype=torch.float64)
    values = losses(3)
    scale = 1 / values
    raw, log = (dk.balance(gram, values, MAKERS[name](log_gradients=choice)) for choice in (False, True))
    assert MAKERS[name]().log_gradients is False
    expected = dk.balance(scale[:, None] * gram * scale, values, MAKERS[name]())
    assert torch.equal(log.weights, expected.weights)
    assert not torch.equal(log.weights, raw.weights)


# ---- quadratic programs


def projection_gap_bound(cosines, y):
    """Optimality conditions on unit gradients: elimination's residual and the test's own sums, (6 K + 2) u |C| |y|.

    An objective nearer to the span of others than sqrt(EQUAL) may be left out, and falls short by that share of ||d||.
    """
    K = len(cosines)
    length = (y @ cosines @ y).clamp(min=0).sqrt()
    return (6 * K + 2) * U * (cosines.abs() @ y.abs()) + tolerances.EQUAL**0.5 * length


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dualproj_is_the_projection(K, family):
    """v >= 1/K; <g_i, d> >= 0 for all i, and 0 where v_i > 1/K: the solution's conditions, and nobody else's."""
    for seed in range(3):
        J = families(K, seed)[family]
        gram = gram_of(J)
        v = weighting.DualProj()(gram)
        norms = J.norm(dim=1)
        present = norms > 0
        assert (v >= 1 / K - 4 * U)[present].all()
        cosines = unit(J)[present] @ unit(J)[present].T
        y = (v * norms)[present]
        bound = projection_gap_bound(cosines, y)
        gains = cosines @ y
        assert (gains >= -bound).all()
        raised = v[present] > 1 / K + 4 * U
        assert (gains.abs() <= bound)[raised].all()


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_conflicts_with_no_gradient(K, family):
    for seed in range(3):
        J = families(K, seed)[family]
        norms = J.norm(dim=1)
        present = norms > 0
        w = weighting.UPGrad()(gram_of(J))
        assert (w[present] >= 1 / K - 4 * U).all()
        cosines = unit(J)[present] @ unit(J)[present].T
        y = (w * norms)[present]
        assert (cosines @ y >= -projection_gap_bound(cosines, y)).all()


def nearly_dependent(K, share, seed):
    """Conflicting gradients, the last of which is a combination of others up to a share of it; two are equal."""
    J = families(K, seed)["conflicting"]
    J[-1] = (J[:2] * torch.tensor([[0.3], [0.6]])).sum(0) + share * J[-1]
    if K > 3:
        J[2] = J[0]
    return J


@pytest.mark.parametrize("rule", ["UPGrad", "DualProj", "CAGrad"])
@pytest.mark.parametrize("K", [3, 5, 8])
@pytest.mark.parametrize("share", [0.0, 1e-8, 1e-7, 3e-7, 1e-6, 3e-6])
def test_order_of_objectives_near_dependence(rule, K, share):
    """Where rounding decides which of several weights give the direction, it decides alike in any order."""
    for seed in range(4):
        J = nearly_dependent(K, share, seed)
        gram = gram_of(J)
        weights = getattr(weighting, rule)()(gram)
        for draw in range(4):
            order = torch.randperm(K, generator=torch.Generator().manual_seed(draw))
            close(getattr(weighting, rule)()(gram[order][:, order]), weights[order], 4 * U * weights[order])
        if rule != "CAGrad":
            y = weights * J.norm(dim=1)
            assert (unit(J) @ (weights @ J) >= -projection_gap_bound(unit(J) @ unit(J).T, y)).all()


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "cagrad", "nashmtl", "pcgrad", "imtlg", "config"])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_lengths_that_are_far_apart(name, K):
    """Gradients 1e-60 to 1e60 long: a program of unit gradients all the same."""
    J = families(K)["conflicting"] * torch.logspace(-60, 60, K, dtype=torch.float64)[:, None]
    weights = step(MAKERS[name](), gram_of(J), losses(K))
    assert weights.isfinite().all()
    if name in ("upgrad", "dualproj"):
        cosines = unit(J) @ unit(J).T
        y = weights * J.norm(dim=1)
        assert (cosines @ y >= -projection_gap_bound(cosines, y)).all()


@pytest.mark.parametrize("K", [2, 3, 8])
def test_upgrad_is_the_mean_of_projections(K):
    """One unit gradient at a time it is DualProj's program, as quadprog solves it."""
    J = unit(families(K)["conflicting"])
    gram = gram_of(J)
    rows = [
        torch.from_numpy(
            qpsolvers.solve_qp(gram.numpy(), torch.zeros(K).double().numpy(), lb=e.numpy(), solver="quadprog")
        )
        for e in torch.eye(K, dtype=torch.float64)
    ]
    close(weighting.UPGrad()(gram), torch.stack(rows).mean(0), tolerances.sensitivity(weighting.UPGrad(), gram))


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("rule", ["UPGrad", "DualProj"])
def test_projections_agree_with_torchjd(rule, K):
    """TorchJD adds rho to the diagonal of G / trace(G), so its v^T G v is at most rho trace(G) |v|^2 too large.

    Both combinations are projections on one set: the square of their distance is at most that. (For UPGrad of each
    row, whose weights are not negative and sum to K times the result.) quadprog itself rounds: 1e-12 of the length.
    """
    rho = 1e-12
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=rho)
    for family in GENERIC:
        J = families(K)[family]
        gram = gram_of(J)
        ours = getattr(weighting, rule)()(gram)
        theirs = getattr(jd, f"{rule}Weighting")(projector=projector)(gram)
        distance2 = ((ours - theirs) @ J).square().sum()
        assert distance2 <= (rho + 1e-24) * gram.trace() * (K * ours.sum()) ** 2, family


# ---- CAGrad


def cagrad_dual(gram, c, w):
    mean = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    return w @ gram @ mean + c * (mean @ gram @ mean).clamp(min=0).sqrt() * (w @ gram @ w).clamp(min=0).sqrt()


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("K", SIZES)
def test_cagrad_is_optimal(K, c):
    """Its d is within the distance, and the smallest <g_i, d> meets the dual that SLSQP finds, to 1e-6 as it does."""
    for family, J in families(K).items():
        gram = gram_of(J)
        present = gram.diagonal() > 0
        if not present.any():
            continue
        gram = gram / gram.diagonal().max()
        away = weighting.CAGrad(c)(gram) - 1 / K
        assert (away >= -4 * U).all()
        mean = torch.full((K,), 1 / K, dtype=torch.float64)
        # squares of combinations: K^2 terms, each 4 u off, of sizes up to |sum|^2
        rounding = 4 * (K + 1) * K * U * (away.sum() ** 2 + 1)
        assert away @ gram @ away <= c**2 * (mean @ gram @ mean) + rounding, family
        worst = (gram @ (mean + away))[present].min().item()
        bounds = [(0, 1 if p else 0) for p in present]
        found = [
            minimize(
                lambda w, gram=gram: cagrad_dual(gram, c, torch.from_numpy(w)).item(),
                start / start.sum(),
                bounds=bounds,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-12, "maxiter": 300},
            ).x
            for start in (present.double().numpy(), (present * torch.arange(1.0, K + 1)).double().numpy())
        ]
        duals = [cagrad_dual(gram, c, torch.from_numpy(w).clamp(min=0) / w.clip(0).sum()).item() for w in found]
        duals += [cagrad_dual(gram, c, e).item() for e in torch.eye(K, dtype=torch.float64)[present]]
        assert -(rounding**0.5) <= min(duals) - worst <= 1e-6, family


def test_cagrad_golden():
    """Orthogonal gradients of one length: by symmetry d = (1 + c) g_0."""
    close(weighting.CAGrad(0.5)(torch.eye(2).double()), torch.full((2,), 0.75).double(), 4 * U)


def test_cagrad_without_distance_is_the_mean():
    gram = gram_of(families(3)["random"])
    close(weighting.CAGrad(0.0)(gram), 1 / 3, 1e-7)  # distances err by the root of rounding


def test_cagrad_where_gradients_cancel():
    """g_1 = -g_3, and the mean, g_2 / 3, is near their normal plane: no direction in reach is good for both."""
    J = torch.tensor([[1.0, 0.0], [0.3, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    gram = gram_of(J)
    d = weighting.CAGrad(0.5)(gram) @ J
    close(d, torch.tensor([0.0, 1 / 3], dtype=torch.float64), 8 * U)


# ---- closed forms from the eigenvalues


@pytest.mark.parametrize("K", range(1, 9))
def test_jacobi(K):
    """The eigenvalues for the GPU against LAPACK's; vectors that are orthogonal and give the matrix back."""
    for family, J in families(K).items():
        gram = gram_of(J)
        size = gram.abs().max().clamp(min=1e-300)
        values, vectors = _eigen.jacobi(gram)
        bound = 32 * K * U  # seven sweeps, each about 4 u per rotation that meets an entry
        assert ((values.sort().values - torch.linalg.eigvalsh(gram)).abs() <= bound * K * size).all(), family
        assert ((vectors * values @ vectors.T - gram).abs() <= bound * K * size).all(), family
        assert ((vectors.T @ vectors - torch.eye(K)).abs() <= bound).all(), family


@pytest.mark.parametrize("rule", ["IMTLG", "AlignedMTL"])
@pytest.mark.parametrize("K", SIZES)
def test_eigenvalue_rules_agree_with_torchjd(rule, K):
    for family in ("random", "aligned", "conflicting"):
        gram = gram_of(families(K)[family])
        ours = getattr(weighting, rule)()
        close(ours(gram), getattr(jd, f"{rule}Weighting")()(gram), tolerances.sensitivity(ours, gram))


@pytest.mark.parametrize("K", SIZES[1:])
@pytest.mark.parametrize("family", [*GENERIC, "equal", "two equal", "opposite", "one zero", "parallel"])
def test_config_agrees_with_torchjd(family, K):
    """Directions: for dependent gradients there are many weights for the shortest one."""
    J = families(K)[family]
    J = J / J.norm(dim=1).max()

    def direction(gram):
        return weighting.ConFIG()(gram) @ J

    gram = gram_of(J)
    independent = family in GENERIC
    bound = tolerances.sensitivity(direction, gram) if independent else 64 * K * K * U  # exactly dependent: well posed
    close(direction(gram), jd.ConFIG()(J), bound)


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("family", GENERIC)
def test_imtlg_projects_equally(family, K):
    J = families(K)[family]
    gram = gram_of(J)
    weights = weighting.IMTLG()(gram)
    close(weights.sum(), torch.tensor(1.0), 4 * K * U * weights.abs().sum())
    projections = unit(J) @ (weights @ J)
    bound = tolerances.sensitivity(lambda gram: unit(J) @ (weighting.IMTLG()(gram) @ J), gram)
    close(projections, projections.mean(), bound)


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("family", GENERIC)
def test_config_has_equal_cosines(family, K):
    J = families(K)[family]
    gram = gram_of(J)
    d = weighting.ConFIG()(gram) @ J
    size = d.norm()
    bound = tolerances.sensitivity(lambda gram: unit(J) @ (weighting.ConFIG()(gram) @ J) / size, gram)
    cosines = unit(J) @ d / size
    close(cosines, cosines.mean(), bound)
    assert (cosines > 0).all()
    assert abs((J @ d).sum() / size - size) <= bound.max() * K * J.norm(dim=1).max() / cosines.min()


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("family", GENERIC)
def test_alignedmtl_has_components_of_one_length(family, K):
    """B G B = lambda_min I for its matrix B: with the mean, ||d||^2 = lambda_min / K; and <g, d> is the root of G."""
    gram = gram_of(families(K)[family])
    weights = weighting.AlignedMTL()(gram)
    values, vectors = torch.linalg.eigh(gram)
    bound = tolerances.sensitivity(lambda gram: gram @ weighting.AlignedMTL()(gram), gram)
    root = (vectors * values.sqrt()) @ vectors.T
    close(gram @ weights, values[0].sqrt() * root.mean(1), bound)


def cancelling(K, share, seed):
    """Gradients of unequal lengths, of which a combination with positive weights leaves about a share of its parts."""
    J = families(K, seed)["random"] * (1 + torch.arange(K, dtype=torch.float64))[:, None]
    weights = torch.rand(K - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    others = (weights @ J[:-1]).norm()
    J[-1] = -(weights @ J[:-1]) + share * others * unit(J[-1:])[0]
    return J


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("share", [0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_gradients_that_cancel(share, K):
    """IMTL-G's direction goes to 0 with what they leave; ConFIG's is at most as long as they are together."""
    for seed in range(20):
        J = cancelling(K, share, seed)
        if share == 0:
            J = J.float().double()  # as float32 rounds it
        gram = gram_of(J)
        norms = J.norm(dim=1)
        weights = weighting.IMTLG()(gram)
        assert (weights @ J).norm() <= 4 * max(share, 1e-7) * norms.max(), seed
        if share <= 1e-8:
            assert (weights == 0).all()
        d = weighting.ConFIG()(gram) @ J
        assert d.norm() <= (1 + 1e-6) * norms.sum(), seed
        if K == 2:  # nothing else than what they leave
            assert d.norm() <= 4 * max(share, 1e-7) * norms.sum(), seed


def test_opposite_gradients_have_no_common_direction():
    gram = torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64)
    for rule in (weighting.IMTLG(), weighting.ConFIG()):
        assert rule(gram).tolist() == [0.0, 0.0]
    d2 = [w @ gram @ w for w in (weighting.AlignedMTL()(gram), weighting.NashMTL()(gram))]
    close(d2[0], gram.trace() / 2 * (1 / 2 - 2 / 5), 16 * U * 5)  # one component of length ||g||, of the mean


# ---- Nash-MTL


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("family", [*GENERIC, "nearly parallel", "equal", "two equal", "parallel", "one zero"])
def test_nash_is_the_fixed_point(family, K):
    """a * (G a) = 1 and ||d||^2 = K. With b_i = ||g_i|| a_i the ridge adds 1e-10 b_i^2, rounding K u b_i sum b_j."""
    for seed in range(3):
        J = families(K, seed)[family]
        gram = gram_of(J)
        a = weighting.NashMTL()(gram)
        present = gram.diagonal() > 0
        assert (a[present] > 0).all()
        b = (a * J.norm(dim=1))[present]
        bound = 1e-10 * b * b + 16 * (K + 1) * U * b * b.sum()
        close((a * (gram @ a))[present], torch.ones(int(present.sum())).double(), bound)
        assert abs(a @ gram @ a - present.sum()) <= bound.sum()


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_nash_converges(K, share):
    """Gradients whose sum nearly cancels, near a stationary point: the fixed number of steps is enough there too."""
    for seed in range(5):
        J = unit(families(K, seed)["random"])
        J = J - (1 - share) * J.mean(0)
        gram = gram_of(J)
        a = weighting.NashMTL()(gram)
        b = a * J.norm(dim=1)
        close(a * (gram @ a), torch.ones(K).double(), 1e-10 * b * b + 16 * (K + 1) * U * b * b.sum())


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.9, 1.0])
def test_nash_of_two(cosine):
    """b_1 = b_2 by symmetry, so b^2 (1 + cosine) = 1."""
    norms = torch.tensor([0.5, 3.0], dtype=torch.float64)
    gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64) * norms[:, None] * norms
    expected = 1 / (norms * (1 + cosine) ** 0.5)
    close(weighting.NashMTL()(gram), expected, expected * (1e-10 + 8 * U) / (1 + cosine))


# ---- PCGrad and chance


def test_pcgrad_of_two():
    """Both projected if they conflict, else their sum; no gradient is then conflicted with."""
    for family in ("random", "aligned", "conflicting", "opposite", "wide"):
        for seed in range(5):
            gram = gram_of(families(2, seed)[family])
            weights = step(weighting.PCGrad(), gram, losses(2))
            (g11, g12), (_, g22) = gram.tolist()
            conflict = min(g12, 0.0)
            expected = torch.tensor([1 - conflict / g11, 1 - conflict / g22], dtype=torch.float64)
            close(weights, expected, 4 * U * expected)
            assert (gram @ weights >= -8 * U * gram.diagonal() * expected).all()


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_pcgrad_agrees_with_torchjd(monkeypatch, K):
    """With the same orders."""
    for family in ("random", "conflicting", "wide"):
        gram = gram_of(families(K)[family])
        rule = weighting.PCGrad(seed=K)
        step(rule, gram, losses(K))
        orders = iter(pcgrad.orders(rule.seed, rule.state_dict()["step"], K))
        monkeypatch.setattr(torch, "randperm", lambda n, orders=orders: next(orders))
        theirs = jd.PCGradWeighting()(gram)
        monkeypatch.undo()

        def solve(gram, rule=rule):
            return rule(gram, losses(K))

        close(solve(gram), theirs, tolerances.sensitivity(solve, gram))


def test_pcgrad_meets_all_orders():
    seen = {tuple(row) for step in range(40) for row in pcgrad.orders(0, torch.tensor(step), 3).tolist()}
    assert seen == set(itertools.permutations(range(3)))


def test_random_numbers_are_splitmix64():
    """Against the algorithm in Python's integers; and their first numbers for another state, as published."""

    def numbers(state, count):
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield z ^ (z >> 31)

    assert list(numbers(1234567, 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed in (0, 1, -1, 2**70):
        start = next(numbers(seed, 1))
        expected = [(bits >> 11) + 0.5 for bits in numbers(start, 12)]
        drawn = [_random.uniform(seed, torch.tensor(step), 4) for step in range(3)]
        assert (torch.cat(drawn) * 2.0**53).tolist() == expected


def test_random_numbers_are_uniform():
    """Kolmogorov and Smirnov find nothing to object at 1 in 1000, for one seed, nor for one step of many seeds."""
    one = _random.uniform(3, torch.tensor(5), 100_000)
    many = torch.cat([_random.uniform(seed, torch.tensor(0), 4) for seed in range(2000)])
    for sample in (one, many):
        assert ((sample > 0) & (sample < 1)).all()
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3


def test_rlw_is_the_softmax_of_normal_numbers():
    rule = weighting.RLW(seed=4)
    gram = torch.eye(3).double()
    weights = torch.stack([step(rule, gram, losses(3)) for _ in range(500)])
    assert (weights > 0).all()
    close(weights.sum(1), torch.ones(500), 4 * U)
    differences = (weights[:, 0] / weights[:, 1]).log() / 2**0.5  # of two normal numbers
    assert stats.kstest(differences.numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(step(weighting.RLW(seed=5), gram, losses(3)), weights[0])


# ---- rules that remember


def torch_adamw(start, gradients, **options):
    """torch's AdamW over given gradients, as functions of the numbers; yields the numbers before each step."""
    p = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([p], **options)
    for gradient in gradients:
        yield p.detach().clone()
        p.grad = gradient(p.detach())
        optimizer.step()
    yield p.detach().clone()


def by_autograd(objective):
    """The gradient of a scalar function, as torch takes it."""

    def gradient(w):
        w = w.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(objective(w), w)[0]

    return gradient


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("reading", ["gram", "eq18"])
def test_amortized_descends_what_it_says(reading, K):
    """Against autograd on the objective as printed, and torch's AdamW."""
    grams = [gram_of(families(K, seed)["random"]) for seed in range(8)]
    values = [losses(K, seed) for seed in range(8)]

    def objective(i):
        scale = 1 / values[i]
        log_gram = scale[:, None] * grams[i] * scale
        if reading == "gram":
            return lambda w: w.softmax(0) @ log_gram @ w.softmax(0) / 2
        return lambda w: (w.softmax(0) @ values[i].log()).square() / 2

    rule = weighting.Amortized(reading, lr=0.1, weight_decay=0.3)
    expected = torch_adamw(
        torch.zeros(K).double(), [by_autograd(objective(i)) for i in range(8)], lr=0.1, weight_decay=0.3
    )
    for i, logits in zip(range(8), expected, strict=False):
        # K terms in each sum; Adam divides by the gradient's own size, which only leaves relative errors
        close(step(rule, grams[i], values[i]), logits.softmax(0), 64 * K * (i + 1) * U)


@pytest.mark.parametrize("observed", [True, False])
def test_famo_agrees_with_torchjd(observed):
    """Without weight decay, as theirs is coupled; the same losses told after the step, or found in the next one."""
    theirs = js.FAMO(3, lr=0.1, weight_decay=0.0).double()
    rule = weighting.Amortized("famo", lr=0.1, weight_decay=0.0)
    sequence = [losses(3, seed) for seed in range(10)]
    for before, after in itertools.pairwise(sequence):
        close(step(rule, torch.eye(3).double(), before), theirs._w.detach().softmax(0), 1e-6)  # they add 1e-8 to losses
        theirs(before)
        theirs.update(after)
        if observed:
            rule.observe(list(after))
    assert (theirs._w.detach().softmax(0) - 1 / 3).abs().max() > 0.05  # it went somewhere


def test_famo_takes_each_rate_once():
    """What was observed is not taken from the next batch again, nor a second time."""
    first, second = weighting.Amortized(), weighting.Amortized()
    gram = torch.eye(2).double()
    for rule in (first, second):
        step(rule, gram, losses(2, 0))
        rule.observe(losses(2, 1))
    first.observe(losses(2, 2))
    assert torch.equal(first.state_dict()["learned"], second.state_dict()["learned"])
    weights = step(first, gram, losses(2, 3))
    assert torch.equal(weights, second.state_dict()["learned"].softmax(0))


def test_famo_ignores_losses_that_have_no_logarithm():
    rule = weighting.Amortized()
    step(rule, torch.eye(2).double(), losses(2))
    before = rule.state_dict()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        rule.observe(torch.tensor([1.0, bad]))
        assert memories_equal(rule.state_dict(), before)


def test_famo_is_invariant_to_units():
    factors = torch.tensor([1e-3, 7.0, 1e4], dtype=torch.float64)
    rules = weighting.Amortized(), weighting.Amortized()
    for seed in range(10):
        values = losses(3, seed)
        weights = [step(r, torch.eye(3).double(), f * values) for r, f in zip(rules, (1, factors), strict=True)]
        # rates are differences of logarithms as large as 10: 1e-13 of their size at least 0.01
        close(*weights, 1e-11)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_amortized_comes_to_the_exact_weights(K):
    """For a Gram matrix that stays (no decay): the exact weights inside the simplex stay, and others come near them.

    Adam's steps do not shrink, so what is compared is what it descends: ||d||^2, within 1 % of the smallest.
    """
    for family in ("random", "conflicting", "aligned"):
        gram = gram_of(families(K)[family])
        rule = weighting.Amortized("gram", lr=0.01, weight_decay=0.0)
        for _ in range(1500):
            weights = rule(gram, torch.ones(K).double())
            rule.commit(NO)
        exact = dk.min_norm_weights(gram)
        smallest = exact @ gram @ exact
        size = gram.diagonal().min()
        assert smallest - 16 * K * U * size <= weights @ gram @ weights <= 1.01 * smallest + 1e-3 * size, family


def test_exact_weights_are_a_fixed_point():
    """There all <g_i, d> are equal, so the slope of the logits is rounding."""
    gram = gram_of(torch.eye(3, dtype=torch.float64) + 0.1 * families(3, n=3)["random"])
    exact = dk.min_norm_weights(gram)
    assert (exact > 0).all()
    rule = weighting.Amortized("gram")
    rule.load_state_dict(rule.initial(gram) | {"learned": exact.log()})
    close(step(rule, gram, torch.ones(3).double()), exact, 8 * U)
    slope = rule.state_dict()["exp_avg"] / 0.1
    close(slope, torch.zeros(3), tolerances.kkt_gap_bound(gram))


def test_amortized_leaves_out_a_zero_gradient():
    """Its weight goes to the others, and its logit stays."""
    gram = gram_of(families(3, seed=1)["one zero"])
    rule = weighting.Amortized("gram", weight_decay=0.0)
    assert step(rule, gram, torch.ones(3)).tolist() == [0.5, 0.0, 0.5]
    assert rule.state_dict()["learned"][1] == 0


@pytest.mark.parametrize("K", [2, 3])
def test_uncertainty_learns_the_noise(K):
    """Against autograd on Eq. 7 and torch's AdamW; TorchJD writes the same objective."""
    values = [losses(K, seed) for seed in range(8)]
    theirs = js.UW(K).double()

    def objective(i):
        def objective(s):
            ours = ((-s).exp() * values[i] / 2 + s / 2).sum()
            with torch.no_grad():
                theirs.log_var.copy_(s)
            assert abs(theirs(values[i]) - ours) <= 8 * K * U * ours.abs() + 8 * U
            return ours

        return objective

    expected = torch_adamw(
        torch.zeros(K).double(), [by_autograd(objective(i)) for i in range(8)], lr=0.1, weight_decay=0.0
    )
    rule = weighting.UncertaintyWeighting(lr=0.1)
    for i, s in zip(range(8), expected, strict=False):
        close(step(rule, torch.eye(K).double(), values[i]), (-s).exp() / 2, 64 * K * (i + 1) * U)


def test_uncertainty_settles_at_half_the_inverse_loss():
    rule = weighting.UncertaintyWeighting(lr=0.02)
    values = torch.tensor([0.5, 4.0], dtype=torch.float64)
    for _ in range(500):
        weights = step(rule, torch.eye(2).double(), values)
    close(weights * values, torch.tensor([0.5, 0.5]), 0.02)  # within one step of s


def test_dwa_agrees_with_torchjd():
    period = 3
    rule, theirs = weighting.DWA(period, temperature=0.7), js.DWA(temperature=0.7)
    moved = 0.0
    for epoch in range(5):
        for i in range(period):
            values = losses(3, 10 * epoch + i)
            weights = step(rule, torch.eye(3).double(), values)
            close(weights, theirs._compute_weights(values), 16 * U)
            assert abs(weights.sum() - 3) <= 16 * U
            if epoch < 2:
                assert weights.tolist() == [1.0, 1.0, 1.0]
            moved = max(moved, (weights - 1).abs().max().item())
            theirs(values)
        theirs.step()
    assert moved > 0.05


@pytest.mark.parametrize("later", [0.0, 1e-300, 1.0])
def test_dwa_goes_on_where_a_loss_has_been_zero(later):
    """An objective that is switched on later: weights that are not finite would skip all steps from then on."""
    rule = weighting.DWA(period=2)
    for i in range(10):
        values = torch.tensor([1.0, 0.0 if i < 5 else later], dtype=torch.float64)
        weights = step(rule, torch.eye(2).double(), values)
        assert weights.isfinite().all()
        assert i >= 8 or weights.tolist() == [1.0, 1.0]
    assert (weights[1] > weights[0]) == (later > 0)


# ---- memory


def memories_equal(a, b):
    same = [torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a if n in b]
    return a.keys() == b.keys() and all(same)


def remember(name, steps=3):
    rule = MAKERS[name]()
    for seed in range(steps):
        step(rule, gram_of(families(3, seed)["random"]), losses(3, seed))
    return rule


@learning_from_steps
def test_call_changes_nothing_until_it_is_committed(name):
    rule = remember(name)
    before = rule.state_dict()
    gram, values = gram_of(families(3, 9)["random"]), losses(3, 9)
    weights = rule(gram, values)
    assert torch.equal(rule(gram, values), weights)
    assert memories_equal(rule.state_dict(), before)
    rule.commit(NO)
    after = rule.state_dict()
    assert not memories_equal(after, before)
    rule.commit(NO)  # there is nothing left to take over
    assert memories_equal(rule.state_dict(), after)


@each_stateful
def test_skipped_step_leaves_the_memory(name):
    rule, other = remember(name), remember(name)
    gram, values = gram_of(families(3, 9)["random"]), losses(3, 9)
    for bad_gram, bad_values in ((gram * float("nan"), values), (gram, values * float("nan")), (gram, -values)):
        step(rule, bad_gram, bad_values, YES)
    assert memories_equal(rule.state_dict(), other.state_dict())
    assert torch.equal(step(rule, gram, values), step(other, gram, values))


@each_stateful
def test_memory_is_written_in_place(name):
    """A captured CUDA graph reads and writes the same tensors at each replay."""
    rule = remember(name)
    where = {key: value.data_ptr() for key, value in rule._memory.items()}
    step(rule, gram_of(families(3)["random"]), losses(3))
    assert {key: value.data_ptr() for key, value in rule._memory.items()} == where


@each_stateful
def test_memory_of_a_fresh_one_is_empty_and_loads(name):
    rule = MAKERS[name]()
    assert rule.state_dict() == {}
    used = remember(name)
    used.load_state_dict(rule.state_dict())
    gram = gram_of(families(3)["random"])
    assert torch.equal(step(used, gram, losses(3)), step(rule, gram, losses(3)))


@each_stateful
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies_go_on_to_the_bit(name, how):
    rule = remember(name)
    if how == "state_dict":
        other = MAKERS[name]()
        other.load_state_dict(rule.state_dict())
    else:
        other = copy.deepcopy(rule) if how == "deepcopy" else pickle.loads(pickle.dumps(rule))
    for seed in range(3, 6):
        gram, values = gram_of(families(3, seed)["random"]), losses(3, seed)
        assert torch.equal(step(rule, gram, values), step(other, gram, values))


@pytest.mark.parametrize("rule", ["DTOAdamW", "DTOSGD"])
@each_stateful
def test_optimizers_save_and_restore_the_memory(backend, rule, name):
    """Saved in the middle of a run, the other half goes on to the bit; torch's optimizers load the same state."""
    ours = getattr(dk, rule)
    theirs = {"DTOAdamW": torch.optim.AdamW, "DTOSGD": torch.optim.SGD}[rule]

    def run(optimizer, model, first, last):
        for i in range(first, last):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, batch(i)))
            optimizer.step()

    whole, model = Student(), Student()
    run(ours(whole.parameters(), lr=1e-2, weighting=MAKERS[name]()), whole, 0, 8)
    first = ours(model.parameters(), lr=1e-2, weighting=MAKERS[name]())
    run(first, model, 0, 4)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = ours(model.parameters(), lr=1e-2, weighting=MAKERS[name]())
    second.load_state_dict(state)
    run(second, model, 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))

    plain = theirs(model.parameters(), lr=1e-2)
    plain.load_state_dict(state)
    assert plain.state_dict().keys() == {"state", "param_groups"}
    memory = second.weighting.state_dict()
    second.load_state_dict(plain.state_dict())  # without a memory: it stays
    assert memories_equal(second.weighting.state_dict(), memory)


@learning_from_steps
def test_optimizers_and_backward_leave_the_memory_at_a_skipped_step(backend, name):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=MAKERS[name]())
    params = list(model.parameters())

    def losses_at(i):
        task, distill = losses_of(model, batch(i)).values()
        return [task + nothing_with_gradient(model.scale, float("nan") if i == 1 else 0.0), distill]

    for i in range(3):
        optimizer.zero_grad()
        before = optimizer.weighting.state_dict()
        optimizer.backward(losses_at(i))
        optimizer.step()
        assert optimizer.balance.skipped == (i == 1)
        assert memories_equal(optimizer.weighting.state_dict(), before) == (i == 1)

    rule = MAKERS[name]()
    for i in range(3):
        before = rule.state_dict()
        skipped = dk.backward(losses_at(i), params, rule).skipped
        assert skipped == (i == 1)
        assert memories_equal(rule.state_dict(), before) == (i == 1)


def test_memory_of_another_rule_is_refused_before_anything_changes(backend):
    model = Student()
    first = dk.DTOAdamW(model.parameters(), weighting=weighting.DWA())
    second = dk.DTOAdamW(model.parameters(), weighting=weighting.Amortized())
    for optimizer in (first, second):
        optimizer.backward(losses_of(model, batch()))
        optimizer.step()
    before = second.state_dict()
    state = first.state_dict()
    state["param_groups"][0]["lr"] = 123.0
    with pytest.raises(
        ValueError, match=r"Amortized famo: the state is of DWA and has \['count'.*expected \['exp_avg'.*'weighting'"
    ):
        second.load_state_dict(state)
    assert second.param_groups[0]["lr"] != 123.0
    assert memories_equal(second.state_dict()["weighting"], before["weighting"])
    del state["weighting"]
    second.load_state_dict(state)
    assert second.param_groups[0]["lr"] == 123.0


@pytest.mark.parametrize(("one", "other"), [("uncertainty", "gram"), ("rlw", "pcgrad"), ("gram", "famo")])
def test_memory_of_a_rule_with_the_same_names_is_refused(one, other):
    with pytest.raises(ValueError, match="belongs to another weighting"):
        MAKERS[other]().load_state_dict(remember(one).state_dict())


@pytest.mark.parametrize("source", ["exact", None])
def test_objectives_in_another_order_are_refused(source):
    """A memory knows its objectives by their places; also one that was loaded."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting.UncertaintyWeighting(), gram=source)
    for i in range(2):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(i)))
        optimizer.step()
    optimizer.zero_grad()
    other = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting.UncertaintyWeighting(), gram=source)
    other.load_state_dict(optimizer.state_dict())
    for refusing in (optimizer, other):
        swapped = dict(reversed(losses_of(model, batch()).items()))
        with pytest.raises(ValueError, match=r"the objectives so far were \['task', 'distill'\], but the losses are"):
            refusing.backward(swapped)
        refusing.backward(losses_of(model, batch()))


def test_a_call_that_no_step_follows_leaves_no_memory():
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting.DWA())
    optimizer.backward([*losses_of(model, batch()).values(), model.head.bias.square().sum()])
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, batch()))
    optimizer.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["uncertainty", "dwa", "rlw", "famo"])
def test_one_pass_remembers_the_whole_batch(name, scaled):
    """The parts of a batch, and losses that a GradScaler has multiplied: the memory is as that of the batch."""
    made = []
    for parts in (1, 4):
        model = Student()
        options = {"rescale": "sum", "weighting": MAKERS[name]()}
        optimizer = dk.DTOSGD(model.parameters(), lr=0.0, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled and parts > 1)
        for step in range(3):
            optimizer.zero_grad()
            for _ in range(parts):
                optimizer.backward(losses_of(model, batch(step)), share=1 / parts, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        made.append(optimizer.weighting.state_dict())
    for name, value in made[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(made[1][name], value, rtol=1e-6, atol=1e-9)  # float32 losses


@pytest.mark.parametrize("scaled", [False, True])
def test_nash_in_one_pass_is_of_the_mean_direction(scaled):
    """Its direction has length sqrt(K), of the parts of a batch and of scaled gradients too."""
    model = Student()
    optimizer = dk.DTOSGD(
        model.trunk.parameters(),
        lr=0.0,
        rescale="none",
        weighting=weighting.NashMTL(),
        gram=dk.sources.Probe(model.trunk),
    )
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(4):
        optimizer.backward(losses_of(model, batch()), share=1 / 4, scaler=scaler)
    scaler.step(optimizer)
    assert abs(optimizer.balance.norm - 2**0.5) < 1e-3


@pytest.mark.parametrize("parts", [1, 4])
def test_nash_kept_by_every_is_a_constant(parts):
    """Between measurements its weights multiply gradients like any constant, also under a GradScaler."""
    model = Student()
    every = dk.sources.Every(5)
    shared = model.trunk.parameters()
    optimizer = dk.DTOSGD(shared, lr=0.0, rescale="none", weighting=weighting.NashMTL(), gram=every)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=step == 2)
        for _ in range(parts):
            optimizer.backward(losses_of(model, batch()), share=1 / parts, scaler=scaler)
        scaler.step(optimizer)
        norms.append(optimizer.balance.norm)
    assert all(abs(norm / norms[0] - 1) < 1e-4 for norm in norms)


def test_memory_of_a_rule_that_every_did_not_ask():
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting.RLW(), gram=dk.sources.Every(5))
    for step in range(10):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()
    assert optimizer.weighting.state_dict()["step"] == 2


def test_famo_observes_by_name():
    model = Student()
    rules = []
    for reverse in (False, True):
        rule = weighting.Amortized("famo")
        optimizer = dk.DTOSGD(model.parameters(), lr=0.0, weighting=rule)
        optimizer.backward(losses_of(model, batch()))
        optimizer.step()
        after = {name: value.detach() for name, value in losses_of(model, batch(1)).items()}
        rule.observe(dict(reversed(after.items())) if reverse else after)
        rules.append(rule.state_dict())
    assert memories_equal(*rules)
    with pytest.raises(ValueError, match=r"losses are \['task', 'other'\], expected \['task', 'distill'\]"):
        rule.observe({"task": after["task"], "other": after["distill"]})


def test_a_weighting_that_writes_to_its_arguments(backend):
    def careless(gram, losses):
        gram.zero_()
        return losses.div_(losses.sum())

    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, rescale="none", weighting=careless)
    losses = losses_of(model, batch())
    values = torch.stack([v.detach() for v in losses.values()]).double()
    optimizer.backward(losses)
    optimizer.step()
    torch.testing.assert_close(optimizer.balance.coefficients, (1 / values.sum()).expand(2))
    assert optimizer.balance.gram.all()


def test_negative_weights_keep_the_length_of_a_step(backend):
    """`rescale="sum"` divides by the sum of their sizes."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    for second in (-0.99, -1.0, -1.01, 0.5):
        weights = torch.tensor([1.0, second], dtype=torch.float64)
        chosen = weighting.Fixed(weights.tolist())
        got = dk.balance(gram, torch.ones(2), chosen, rescale="sum").coefficients
        assert (got - weights / weights.abs().sum()).abs().max() <= 1e-15


def test_other_number_of_objectives_is_refused():
    rule = remember("famo")
    before = rule.state_dict()
    with pytest.raises(ValueError, match=r"Amortized: learned holds 3 objectives, but there are 2; make a new"):
        rule(torch.eye(2).double(), losses(2))
    assert memories_equal(rule.state_dict(), before)


def test_own_rule_with_a_memory(backend):
    """`Stateful` is for users too."""

    class Alternating(weighting.Stateful):
        def initial(self, gram):
            return {"turn": gram.new_zeros((), dtype=torch.int64)}

        def advance(self, memory, gram, losses):
            everyone = torch.arange(len(gram), device=gram.device)
            return (everyone == memory["turn"]).double(), {"turn": (memory["turn"] + 1) % len(gram)}

    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), weighting=Alternating())
    seen = []
    for i in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(i)))
        optimizer.step()
        seen.append(optimizer.balance.weights.tolist())
    assert seen == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    memory = optimizer.state_dict()["weighting"]
    assert memory == {"turn": 1, "rule": "Alternating", "objectives": ["task", "distill"]}


# ---- names and refusals


def test_from_name():
    assert weighting.from_name("dto") == weighting.DTO()
    assert weighting.from_name("mgda") == weighting.DTO(log_gradients=False)
    assert weighting.from_name("fixed", weights=(1.0, 2.0)) == weighting.Fixed((1.0, 2.0))
    assert weighting.from_name("eq18").reading == "eq18"
    assert weighting.from_name("amortized", reading="gram").reading == "gram"
    classes = {type(weighting.from_name(name)).__name__ for name in weighting.NAMES}
    assert classes == set(weighting.__all__) - {"LogSum", "NAMES", "Stateful", "from_name"}
    with pytest.raises(ValueError, match=r"no weighting is called 'mean'; choose one of alignedmtl, .*upgrad"):
        weighting.from_name("mean")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.Amortized("exact"), r"Amortized: reading is 'exact'; choose 'famo', 'gram' or 'eq18'"),
        (lambda: weighting.Amortized(lr=-1.0), r"Amortized: lr is -1.0; pass"),
        (lambda: weighting.Amortized(weight_decay=float("nan")), r"Amortized: weight_decay is nan; pass"),
        (lambda: weighting.UncertaintyWeighting(lr=-1.0), r"UncertaintyWeighting: lr is -1.0; pass"),
        (lambda: weighting.CAGrad(1.0), r"CAGrad: c is 1.0; pass a number with 0 <= c < 1"),
        (lambda: weighting.CAGrad(-0.1), r"CAGrad: c is -0.1; pass"),
        (lambda: weighting.DWA(0), r"DWA: period is 0; pass a number of steps"),
        (lambda: weighting.DWA(temperature=0.0), r"DWA: temperature is 0.0; pass a positive number"),
    ],
)
def test_options_without_a_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "weights",
    [[torch.tensor([0.25]), torch.tensor(0.75)], torch.tensor([0.25, 0.75]), iter([0.25, 0.75]), (0.25, 0.75)],
    ids=["tensors", "tensor", "iterator", "tuple"],
)
def test_fixed_weights_are_numbers_however_they_are_given(weights):
    rule = weighting.Fixed(weights)
    assert all(isinstance(weight, float) for weight in rule.weights)  # reading a tensor in a step would wait
    for _ in range(2):
        assert step(rule, torch.eye(2).double(), losses(2)).tolist() == [0.25, 0.75]


def test_observe_at_the_wrong_moment_is_refused():
    with pytest.raises(RuntimeError, match=r"observe: there was no step yet; call it after optimizer.step\(\)"):
        weighting.Amortized().observe(losses(2))
    rule = remember("eq18")
    with pytest.raises(RuntimeError, match=r"observe: reading 'eq18' uses no later losses"):
        rule.observe(losses(3))
    with pytest.raises(ValueError, match=r"observe: losses has shape \(2,\), expected \(3,\): one per objective"):
        remember("famo").observe(losses(2))
    for bad in (0.5, "abc", [torch.ones(2)] * 3, [None] * 3):
        with pytest.raises(TypeError, match=r"observe: losses is .*; pass one number for each objective"):
            remember("famo").observe(bad)
