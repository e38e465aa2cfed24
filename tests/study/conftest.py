import pytest

from normlab.study import Study, run


@pytest.fixture(scope="session")
def tiny():
    """A study of a few seconds: real images, a thousand of them to train on."""
    return Study(
        name="tiny", network="mlp:16", arms=["plain", "batch"], validation=59_000, seeds=2, epochs=2
    )


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of a run of `tiny` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny, folder)
    return folder
