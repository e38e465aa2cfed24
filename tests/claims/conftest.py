from pathlib import Path

import platformdirs
import pytest

_USERS = Path(platformdirs.user_cache_path("normlab", appauthor=False)) / "data"


@pytest.fixture
def users_data(tmp_path, monkeypatch):
    """The data sets that the user has fetched; all else that is cached stays out of there."""
    if not (_USERS / "fashion-mnist.safetensors").exists():
        pytest.skip("fashion-mnist is not here: normlab data fetch fashion-mnist")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").symlink_to(_USERS)
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
