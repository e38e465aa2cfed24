import pytest

from normlab.layers import fused


@pytest.fixture(scope="module", params=["normlab's kernels", "torch's kernels"])
def kernels(request):
    """Run a module's tests once by each: tests are small, where torch's would do all the work."""
    small = fused.SMALL
    fused.SMALL = 0 if request.param == "normlab's kernels" else 2**62
    yield
    fused.SMALL = small
