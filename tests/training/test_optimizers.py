import pytest
import torch

from normlab.training import Recipe, Setting, optimizers

SHAPES = [(33, 7), (5,), (4, 3, 2, 2)]
SETTINGS = [Setting(0.1), Setting(0.02, 0.01), Setting(0.1, 0.03), Setting(0.1)]
FIELDS = [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}]


def torchs(recipe, parameters, setting):
    lr, decay = setting
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=decay, fused=True)


@pytest.mark.parametrize("settings", [SETTINGS, [Setting(0.1)] * 4], ids=["several", "one"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_step_is_that_of_torch_optim_bit_for_bit(fields, together, settings):
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe(**fields)
    stacked = [torch.randn(4, *shape, generator=generator) for shape in SHAPES]
    single = [[each[r].clone() for each in stacked] for r in range(4)]
    ours = optimizers.make(recipe, stacked, settings)
    theirs = [torchs(recipe, single[r], settings[r]) for r in range(4)]
    for _ in range(7):
        gradients = [torch.randn(each.shape, generator=generator) for each in stacked]
        if together:
            ours.step_all(gradients)
        for r in range(4):
            if not together:
                ours.step(r, [each[r] for each in gradients])
            for parameter, gradient in zip(single[r], gradients, strict=True):
                parameter.grad = gradient[r].clone()
            theirs[r].step()
    for r in range(4):
        assert all(a[r].equal(b) for a, b in zip(stacked, single[r], strict=True))


def test_a_replica_moves_alone():
    stacked = [torch.ones(2, 4)]
    optimizers.make(Recipe(), stacked, [Setting(0.1)] * 2).step(1, [torch.ones(4)])
    assert stacked[0][0].equal(torch.ones(4))
    assert not stacked[0][1].equal(torch.ones(4))
