"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import dead_relu, identity, max_learning_rate
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM for each in (identity, max_learning_rate, dead_relu)
}
"""By name, in the order in which they are best read."""
