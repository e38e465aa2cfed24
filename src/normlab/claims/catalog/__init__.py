"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import (
    accuracy,
    adaptation,
    deep_sigmoid,
    dropout_rival,
    dropout_shift,
    faster,
    identity,
    precise_bn,
    stable_inputs,
)
from normlab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM
    for each in (
        identity,
        dropout_shift,
        precise_bn,
        adaptation,
        faster,
        stable_inputs,
        accuracy,
        dropout_rival,
        deep_sigmoid,
    )
}
"""By name, in the order in which they are best read."""
