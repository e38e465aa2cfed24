"""The claims that normlab tests, one file each."""

from normlab.claims.catalog import (
    accuracy,
    adaptation,
    batch_independence,
    covariate_shift,
    dead_relu,
    decay_is_rate,
    deep_sigmoid,
    dropout_rival,
    dropout_shift,
    faster,
    gradient_explosion,
    identity,
    identity_bias,
    linear_explosion,
    max_learning_rate,
    noisy_bn,
    precise_bn,
    rank,
    redundant_bias,
    scale_invariance,
    smoothness,
    stable_inputs,
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
        dropout_shift,
        precise_bn,
        adaptation,
        faster,
        stable_inputs,
        max_learning_rate,
        accuracy,
        dropout_rival,
        dead_relu,
        deep_sigmoid,
        covariate_shift,
        noisy_bn,
        smoothness,
    )
}
"""By name, in the order in which they are best read."""
