import contextlib
import random

import numpy as np
import pytest
import torch

from normlab.streams import generators_kept, stream


def draw(*key):
    return torch.rand(4, generator=stream(*key)).tolist()


def test_a_stream_is_the_same_on_every_machine():
    assert stream(0, "order").initial_seed() == 1152760118607444429
    assert draw(3, "init", "hidden0") == draw(3, "init", "hidden0")


def test_streams_differ_by_seed_and_by_every_part_of_their_purpose():
    draws = [draw(0, "order"), draw(1, "order"), draw(0, "dropout"), draw(0, "order", "x")]
    assert len({tuple(values) for values in draws}) == len(draws)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(0, "order")
    assert torch.get_rng_state().equal(before)


GLOBAL = {
    "python": random.random,
    "numpy": np.random.rand,
    "torch": lambda: torch.rand(()).item(),
}


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
@pytest.mark.parametrize("name", GLOBAL)
def test_each_global_generator_is_kept_whatever_happens(name, error):
    draw_one = GLOBAL[name]
    with generators_kept():
        expected = draw_one()
    with contextlib.suppress(ZeroDivisionError), generators_kept():
        assert draw_one() == expected
        if error:
            raise error
    with generators_kept():
        assert draw_one() == expected


def test_those_of_devices_are_kept_where_they_were_used(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.random,
        "fork_rng",
        lambda devices: kept.append(list(devices)) or contextlib.nullcontext(),
    )
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        with generators_kept():
            pass
    assert kept == [[], [0, 1]]
