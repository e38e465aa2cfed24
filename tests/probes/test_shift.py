import pytest
import torch
from torch import nn

from normlab.probes.shift import covariate_shift

LAYERS = ["hidden0", "hidden1"]


def expected(state, by_hand, x, y, lr, arm):
    """Layer after layer, in explicit loops."""

    def gradient(values):
        leaves = {name: each.clone().requires_grad_() for name, each in values.items()}
        by_hand(leaves, x, y)["loss"].backward()
        return {name: each.grad for name, each in leaves.items()}

    order = []
    for block in LAYERS:
        order.append(f"{block}.linear")
        if arm != "plain":
            order.append(f"{block}.norm")
    before, found = gradient(state), {}
    for layer in ("hidden1.linear", "output"):
        moved = dict(state)
        for earlier in order[: order.index(layer)] if layer in order else order:
            for name in ("weight", "bias"):
                moved[f"{earlier}.{name}"] = (
                    state[f"{earlier}.{name}"] - lr * before[f"{earlier}.{name}"]
                )
        one = before[f"{layer}.weight"].flatten().tolist()
        other = gradient(moved)[f"{layer}.weight"].flatten().tolist()
        shift = dot = first = second = 0.0
        for a, b in zip(one, other, strict=True):
            shift += (a - b) ** 2
            dot += a * b
            first += a * a
            second += b * b
        found[layer] = {"shift": shift**0.5, "cosine": dot / (first * second) ** 0.5}
    return found


@pytest.mark.parametrize("arm", ["batch", "plain", "batch+dropout:0.5"])
@pytest.mark.parametrize("lr", [1.0, 0.01])
def test_it_is_that_of_the_pass_written_out(case, by_hand, arm, lr):
    network, state, x, y = case(arm)
    found = covariate_shift(network, state, x, y, lr)
    wanted = expected(state, by_hand, x, y, lr, arm)
    assert list(found) == list(wanted)
    for layer, seen in found.items():
        assert seen == pytest.approx(wanted[layer], rel=1e-9, abs=1e-12)


def test_the_order_is_that_of_the_calls_not_of_the_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.last(self.first(x))

    found = covariate_shift(Net(), {}, torch.ones(4, 2), torch.zeros(4).long(), 0.1)
    assert list(found) == ["last"]


def test_parameters_of_modules_that_are_never_called_belong_to_those_around_them():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.attention = nn.Linear(4, 4), attention

        def forward(self, x):
            y = self.before(x)
            return self.attention(y, y, y)[0].mean(1)

    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = covariate_shift(Net(), {}, x, torch.tensor([0, 1, 2, 3, 0]), 0.1)
    assert list(found) == ["attention"]


def test_a_gradient_of_zeros_has_no_direction():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    state = {"0.weight": -torch.ones(2, 2), "0.bias": torch.zeros(2)}
    found = covariate_shift(network, state, torch.ones(4, 2), torch.zeros(4).long(), 0.1)["2"]
    assert found["shift"] == 0
    assert found["cosine"] != found["cosine"]
