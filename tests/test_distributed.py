"""Balanced steps on several ranks: the same bits on all of them, and the step of one process on the whole batch."""

import pytest
import torch

from .ranks import ddp
from .ranks.pool import Pool


@pytest.fixture(scope="module")
def pools():
    made = {size: Pool(size) for size in (2, 3)}
    yield made
    for pool in made.values():
        pool.close()


def assert_same_bits(answers) -> None:
    first = answers[0]
    for other in answers[1:]:
        for mine, theirs in zip(first, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)


def assert_as_one(answers, options, steps=4) -> None:
    """To rounding: float64, a few hundred additions; AdamW's division of small by small magnifies."""
    alone = ddp.train(0, 1, options, steps)
    for mine, theirs in zip(answers[0], alone, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


CASES = {
    "adamw": {},
    "sgd": {"rule": "sgd", "rescale": "sum"},
    "three": {"size": 3},
    "one_bucket": {"bucket_bytes": 25 << 20},
    "clipped": {"max_norm": 0.1},
    "balanced": {"private": "balanced"},
    "plain_head": {"balance_head": False},
    "static": {"static": True},
    "unwrapped": {"wrapped": False, "other_start": True, "size": 3},
    "find_unused": {"find_unused": True},
    "kept_memory": {"to_none": False},
    "parts": {"parts": 2},
    "parts_unwrapped": {"parts": 2, "wrapped": False},
    "parts_feature": {"parts": 2, "source": "feature"},
    "one_rank_reaches": {"sometimes": 2},
    "two_ranks_reach": {"sometimes": 3, "size": 3},
    "overlap": {"source": "overlap"},
    "overlap_parts": {"source": "overlap", "parts": 2, "size": 3},
    "lag": {"source": "lag"},
    "probe": {"source": "probe"},
    "found_probe": {"source": "found", "size": 3},
    "feature": {"source": "feature"},
    "every": {"source": "every"},
    "ema": {"source": "ema", "size": 3},
    "amortized": {"source": "none", "weighting": "amortized", "size": 3},
    "random": {"source": "none", "weighting": "rlw"},
    "pcgrad": {"weighting": "pcgrad"},
}


@pytest.mark.parametrize("name", CASES)
def test_ddp_is_one_process_on_the_whole_batch(pools, name):
    options = dict(CASES[name])
    answers = pools[options.pop("size", 2)].run(ddp.train, options)
    assert_same_bits(answers)
    assert_as_one(answers, options)
