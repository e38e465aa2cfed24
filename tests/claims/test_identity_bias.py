import numpy as np
import pandas as pd
import pytest
import torch

from normlab.claims.catalog import identity_bias
from normlab.claims.catalog.identity_bias import variance_ratios
from normlab.streams import stream


@pytest.mark.parametrize("norm", [True, False])
def test_the_ratios_are_those_of_a_network_written_out(norm):
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = stream(4, "claims", "residual")

    def draw(fan_in):
        return (
            torch.randn(8, fan_in, generator=generator).numpy().astype(float) * (2 / fan_in) ** 0.5
        )

    skip = x.numpy() @ draw(5).T
    skip /= skip.std()
    expected = []
    for _ in range(3):
        branch = skip
        for _ in range(2):
            if norm:
                branch = (branch - branch.mean(0)) / np.sqrt(branch.var(0) + 1e-5)
            branch = np.maximum(branch, 0) @ draw(8).T
        expected.append(branch.var() / skip.var())
        skip = skip + branch
    found = list(variance_ratios(x, 4, width=8, depth=3, norm=norm))
    assert found == pytest.approx(expected, rel=1e-6)


def test_effects_hold_the_branches_to_one_over_l():
    rows = [
        (seed, arm, "", block, value)
        for seed, extra in ((1, 0.2), (0, 0.0))
        for block in (1, 2, 4)
        for arm, value in (("batch", (1 + extra) / block), ("plain", 1 + 2 * extra))
    ]
    frame = pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])
    batch, plain = identity_bias.CLAIM.effects(frame).values()
    assert batch == pytest.approx([0.0, 0.2])
    assert plain == pytest.approx([0.0, 0.4])
