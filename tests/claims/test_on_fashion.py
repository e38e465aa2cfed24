import pytest

from normlab.claims import check, page
from normlab.claims.setups import fashion_part, fashion_relu
from normlab.data import load, split

# What is trained for one is there for the other.
CLAIMS = [["max-learning-rate", "dead-relu"], ["covariate-shift", "smoothness"], ["noisy-bn"]]


@pytest.mark.slow
@pytest.mark.usefixtures("users_data")
@pytest.mark.parametrize("names", CLAIMS, ids="+".join)
def test_claims_have_verdicts_quickly(names, tmp_path):
    out = tmp_path / "out"
    results = [check(name, quick=True, out=out, workers=2) for name in names]
    for result in results:
        assert result.verdict in ("supported", "refuted", "inconclusive")
        assert result.frame()["value"].notna().mean() > 0.3
    page(results, tmp_path / "claims.md")
    again = [check(name, quick=True, out=out) for name in names]
    assert [each.kept for each in again] == [each.kept for each in results]


@pytest.mark.slow
@pytest.mark.usefixtures("users_data")
def test_the_part_of_the_images_is_the_first_ones_with_all_test_images():
    whole, part = load("fashion-mnist"), load(fashion_relu(quick=True).dataset)
    assert part.images.equal(whole.images[[*range(16_000), *range(60_000, 70_000)]])
    assert part.labels[16_000:].equal(whole.labels[60_000:])
    assert [len(each) for each in split(part, 1000).indices.values()] == [15_000, 1000, 10_000]
    assert [len(each) for each in fashion_part()] == [16_000, 16_000, 10_000, 10_000]
    assert int(part.labels[:16_000].bincount().min()) > 1_500
