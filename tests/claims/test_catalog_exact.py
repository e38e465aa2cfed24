"""The claims of no training, or of little, as they are run quick."""

import pytest

from normlab import claims

NAMES = (
    *("redundant-bias", "batch-independence", "scale-invariance", "decay-is-rate"),
    *("gradient-explosion", "linear-explosion", "identity-bias", "rank"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_decided_in_a_quick_run(name, tmp_path):
    result = claims.check(name, quick=True, out=tmp_path)
    assert result.quick == ("quick: " in claims.CLAIMS[name].setup)
    assert result.verdict == "supported"
    assert [each.part for each in result.evidence] == list(claims.CLAIMS[name].parts)
    assert result.chart().to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_it_is_there(name):
    claim = claims.CLAIMS[name]
    assert claim.name == name
    assert claim.statement.endswith(".")
    assert claim.published.endswith(".")
    assert "quick" in claim.setup
    assert len({part.name for part in claim.parts}) == len(claim.parts)


@pytest.mark.parametrize("claim", claims.CLAIMS.values(), ids=claims.CLAIMS)
def test_a_quick_run_is_one_only_where_it_has_fewer_steps(claim):
    assert claim.is_cheap != ("quick: " in claim.setup.lower())
