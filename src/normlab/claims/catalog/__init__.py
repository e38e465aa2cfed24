"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import gradient_explosion, identity, linear_explosion
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM for each in (identity, gradient_explosion, linear_explosion)
}
"""By name, in the order in which they are best read."""
