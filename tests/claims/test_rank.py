import math

import numpy as np
import pandas as pd
import pytest
import torch

from normlab.claims.catalog import rank
from normlab.claims.catalog.rank import mean_cosine, numerical_rank


def test_the_rank_counts_what_is_above_a_hundredth_of_the_largest():
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.standard_normal((9, 5)))
    right, _ = np.linalg.qr(generator.standard_normal((7, 5)))
    values = torch.from_numpy(left @ np.diag([200.0, 3.0, 2.1, 1.9, 0.0]) @ right.T)
    assert numerical_rank(values) == 3
    assert numerical_rank(1e-9 * values) == 3


def test_the_cosine_is_the_mean_over_pairs():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [
        float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert mean_cosine(x) == pytest.approx(sum(pairs) / 30)
    assert mean_cosine(torch.ones(4, 2)) == pytest.approx(1.0)


def test_effects_compare_the_last_layer():
    ranks = {
        "plain, linear": (9, 4),
        "batch, linear": (40, 32),
        "plain, ReLU": (9, 2),
        "batch, ReLU": (100, 100),
    }
    rows = [
        (seed, arm, "numerical rank", layer, value * (1 + seed * (arm == "batch, linear")))
        for seed in (1, 0)
        for arm, values in ranks.items()
        for layer, value in zip((32, 64), values, strict=True)
    ]
    cosines = [("plain, ReLU", 0.98), ("batch, ReLU", 0.32)]
    rows += [
        (seed, arm, "mean cosine", 64, c + seed / 100) for seed in (1, 0) for arm, c in cosines
    ]
    effects = rank.CLAIM.effects(
        pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])
    )
    expected = {
        "linear: rank, batch / plain": (3.0, 4.0),
        "ReLU: rank, batch / plain": (math.log2(50),) * 2,
        "linear: rank with batch norm, layer 64 / layer 32": (math.log2(0.8),) * 2,
        "ReLU: rank with batch norm, layer 64 / layer 32": (0.0, 0.0),
        "ReLU: cosine, plain − batch": (0.66, 0.66),
    }
    assert [part.name for part in rank.CLAIM.parts] == list(expected)
    assert effects.keys() == expected.keys()
    for name, wanted in expected.items():
        assert effects[name] == pytest.approx(list(wanted))
