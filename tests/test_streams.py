import torch

from normlab.streams import stream


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
