"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import (
    adaptation,
    covariate_shift,
    dead_relu,
    dropout_shift,
    identity,
    max_learning_rate,
    noisy_bn,
    precise_bn,
    smoothness,
)
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM
    for each in (
        *(identity, dropout_shift, precise_bn, adaptation),
        *(max_learning_rate, covariate_shift, noisy_bn, smoothness, dead_relu),
    )
}
"""By name, in the order in which they are best read."""
