"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import (
    batch_independence,
    decay_is_rate,
    gradient_explosion,
    identity,
    identity_bias,
    linear_explosion,
    rank,
    redundant_bias,
    scale_invariance,
)
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM
    for each in (
        identity,
        redundant_bias,
        batch_independence,
        scale_invariance,
        decay_is_rate,
        gradient_explosion,
        linear_explosion,
        identity_bias,
        rank,
    )
}
"""By name, in the order in which they are best read."""
