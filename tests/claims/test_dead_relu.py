import math

import pandas as pd
import pytest
import torch
from torch import nn

from normlab.claims import CLAIMS
from normlab.claims.catalog import dead_relu
from normlab.layers import BatchNorm1d
from normlab.training import Recipe

CLAIM = CLAIMS["dead-relu"]
DIFFERENCE, LEVEL, RISE = CLAIM.parts
FIRST, SHARE = "share of dead units before training", "share of dead units after training"


def frame(rows):
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_a_unit_is_dead_if_it_is_zero_on_every_image_of_every_batch():
    images = torch.zeros(4100, 1, 1, 1, dtype=torch.uint8)
    images[4099] = 255  # In the last of three batches.
    first, second = nn.Linear(1, 4), nn.Linear(4, 2)
    with torch.no_grad():
        # It is 1 on one image alone; always; never; and never, as 0 is not above 0.
        first.weight.copy_(torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
        first.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.0]))
        second.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
        second.bias.zero_()
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())
    assert dead_relu.dead_share(network, images) == 3 / 6


def test_the_network_is_looked_at_in_eval_mode():
    norm = BatchNorm1d(1)
    norm.running_mean.fill_(10.0)
    network = nn.Sequential(nn.Flatten(), norm, nn.ReLU()).train()
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert dead_relu.dead_share(network, images) == 1.0  # In training mode one would be above zero.


def test_units_are_counted_at_the_rate_and_at_a_sixteenth_after_all_steps(monkeypatch):
    study = Recipe(network="mlp:8", optimizer="sgd", batch_size=16, validation=59_968, epochs=3)
    steps = []

    class Fleet(dead_relu.Fleet):
        def advance(self, stop):
            steps.append(stop)
            super().advance(stop)

    monkeypatch.setattr(dead_relu, "Fleet", Fleet)
    rows = dead_relu._shares(0, study, {0: 8.0})
    places = [(FIRST, 0), (SHARE, 0.5), (SHARE, 8.0)]
    assert [row[:3] for row in rows] == [(a, *p) for a in ("plain", "batch") for p in places]
    assert steps == [6, 6]
    assert rows == dead_relu._shares(0, study, {0: 8.0})
    assert rows[2].value > rows[1].value  # At the rate 8 the plain network's units do die.


def test_a_seed_without_a_common_rate_has_failed():
    rows = dead_relu._shares(0, Recipe(), {0: math.nan})
    assert [row.arm for row in rows] == ["plain", "batch"]
    assert all(math.isnan(row.value) for row in rows)


def test_effects_are_points_at_the_larger_rate_and_beside_the_smaller():
    found = CLAIM.effects(
        frame(
            [
                *((1, "plain", SHARE, 0.5, 0.4), (1, "plain", SHARE, 8.0, 0.75)),
                *((1, "batch", SHARE, 0.5, 0.3), (1, "batch", SHARE, 8.0, 0.25)),
                *((0, "plain", SHARE, 0.25, 0.1), (0, "plain", SHARE, 4.0, 0.5)),
                *((0, "plain", FIRST, 99.0, 0.9), (0, "batch", FIRST, 99.0, 0.9)),
                *((0, "batch", SHARE, 0.25, 0.1), (0, "batch", SHARE, 4.0, 0.125)),
            ]
        )
    )
    assert found == {
        DIFFERENCE.name: [37.5, 50.0],
        LEVEL.name: [12.5, 25.0],
        RISE.name: pytest.approx([40.0, 35.0]),
    }


def test_effects_of_a_failed_seed_are_no_numbers():
    found = CLAIM.effects(
        frame(
            [
                *((0, "plain", SHARE, math.nan, math.nan), (0, "batch", SHARE, math.nan, math.nan)),
                *((1, "plain", SHARE, 8.0, 0.5), (1, "batch", SHARE, 8.0, 0.25)),
                *((2, "plain", SHARE, 8.0, math.nan), (2, "batch", SHARE, 8.0, 0.25)),
                *((2, "plain", SHARE, 0.5, 0.5), (2, "batch", SHARE, 0.5, 0.25)),
            ]
        )
    )
    assert len(found[LEVEL.name]) == 3
    assert math.isnan(found[DIFFERENCE.name][0])
    assert found[DIFFERENCE.name][1:] == [25.0, -math.inf]
    assert found[RISE.name][1:] == [0.0, -math.inf]
