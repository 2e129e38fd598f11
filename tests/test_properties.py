"""Properties that hold for any input, searched for counterexamples."""

import pytest
import torch

import dtokd_kernels as dk

from . import tolerances
from .inputs import DTYPES, LAYOUTS, gradients, gram_of
from .test_gram import assert_gram
from .test_weights import U, kkt_gap

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@st.composite
def gradient_lists(draw):
    """K lists over 1 to 5 positions of any small shape, dtype, layout and presence."""
    K = draw(st.integers(1, 8))
    grads = [[] for _ in range(K)]
    for position in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        present = draw(st.lists(st.booleans(), min_size=K, max_size=K))
        for row, there, [value] in zip(grads, present, gradients(K, [shape], dtype, seed=position), strict=True):
            if len(shape) == 4 and value.numel() > 0:
                value = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](value)
            elif len(shape) >= 2 and draw(st.booleans()):
                value = value.transpose(0, -1).contiguous().transpose(0, -1)
            elif len(shape) >= 1 and draw(st.booleans()):
                value = value.repeat_interleave(2, 0)[::2]
            row.append(value if there else None)
    return grads


@settings(
    deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(grads=gradient_lists())
def test_gram_of_any_lists(backend, grads):
    if all(g is None for row in grads for g in row):
        with pytest.raises(ValueError, match=r"gram: grads holds no tensor"):
            dk.gram(grads)
        return
    assert_gram(dk.gram(grads), grads)


@settings(
    deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), K=st.integers(2, 6), n=st.integers(1, 6))
def test_weights_of_any_gradients(backend, data, K, n):
    """Any geometry at all, degenerate ones included: on the simplex, and optimal within what rounding leaves."""
    number = st.floats(-1e3, 1e3, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 1e-9])
    rows = data.draw(st.lists(st.lists(number, min_size=n, max_size=n), min_size=K, max_size=K))
    gram = gram_of(torch.tensor(rows, dtype=torch.float64))
    weights = dk.min_norm_weights(gram)
    assert (weights >= 0).all()
    assert abs(weights.sum().item() - 1) <= 2 * K * U
    assert kkt_gap(gram, weights) <= tolerances.kkt_gap_bound(gram, degenerate=True)
