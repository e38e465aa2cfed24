from pathlib import Path

import pytest
import torch

from normlab.claims import Row, Work
from normlab.claims.parallel import share_out


def job(seed, factor):
    return [Row("arm", "threads", torch.get_num_threads(), float(seed * factor))]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("workers", [1, 2])
def test_every_seed_is_done_once_on_one_thread(workers):
    found = dict(share_out(Work((3, 5, 8), True, Path(), workers), job, 10))
    assert found == {seed: [Row("arm", "threads", 1, 10.0 * seed)] for seed in (3, 5, 8)}
    assert torch.get_num_threads() == 2


def fails(seed):
    raise ValueError(f"seed {seed}")


def test_what_a_job_raises_comes_through():
    with pytest.raises(ValueError, match="seed 3"):
        list(share_out(Work((3, 5), True, Path()), fails))
