"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import adaptation, dropout_shift, identity, precise_bn
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM for each in (identity, dropout_shift, precise_bn, adaptation)
}
"""By name, in the order in which they are best read."""
