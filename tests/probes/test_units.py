import torch

from normlab.probes import Units


def test_a_unit_is_silent_if_every_batch_has_it_at_zero():
    units = Units("relu")
    units.see(torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]))
    assert units.silent.tolist() == [True, False, True]
    units.see(torch.tensor([[[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]]))
    units.see(torch.zeros(1, 3, 2))
    assert units.silent.tolist() == [True, False, False]
    assert units.values == 6


def test_flat_values_are_those_with_a_small_derivative():
    x = torch.tensor([[-5.0, 0.0], [4.7, 4.5]])  # σ′ is 0.0066, ¼, 0.0089, 0.0109.
    sigmoid, tanh = Units("sigmoid"), Units("tanh")
    sigmoid.see(torch.sigmoid(x))
    tanh.see(torch.tanh(x / 2))
    assert sigmoid.flat.tolist() == tanh.flat.tolist() == [2, 0]


def test_scalars_and_empty_batches_are_passed_over():
    units = Units("relu")
    units.see(torch.ones(()))
    units.see(torch.ones(0, 3))
    assert units.values == 0
