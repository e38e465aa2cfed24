"""Every threshold of the doctor, with its reason and where it is from."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["THRESHOLDS", "threshold"]


class Threshold(NamedTuple):
    """A number that a measurement is held against.

    Attributes:
        value: The number.
        reason: Why this one.
        source: Where it, or what it stands on, is from.
    """

    value: float
    reason: str
    source: str


_IOFFE = "Ioffe and Szegedy, Batch Normalization, 2015"
_WU = "Wu and Johnson, Rethinking 'Batch' in BatchNorm, 2021"
_GROUP = "Wu and He, Group Normalization, 2018"
_OURS = "normlab: chosen so that healthy networks are silent"

THRESHOLDS: dict[str, Threshold] = {
    "gap": Threshold(0.01, "a point of accuracy is what people retrain for", _WU),
    "gap error": Threshold(0.05, "nobody ships a model that lost five points by a switch", _OURS),
    "significance": Threshold(0.01, "of McNemar's exact test, samples paired", "McNemar, 1947"),
    "stale mean": Threshold(0.1, "a tenth of a standard deviation", _WU),
    "stale variance": Threshold(0.2, "of |ln ratio|: outputs scaled wrongly by a tenth", _WU),
    "stale errors": Threshold(4.0, "standard errors that chance may explain", _OURS),
    "stale warning mean": Threshold(0.3, "above what lags behind a constant learning rate", _OURS),
    "stale warning variance": Threshold(0.4, "likewise: outputs scaled wrongly by a fifth", _OURS),
    "stale error mean": Threshold(1.0, "off by a whole standard deviation", _OURS),
    "stale error variance": Threshold(1.386, "off by a factor of four", _OURS),
    "noise": Threshold(32.0, "below it the error of small batches grows fast", _GROUP),
    "noise error": Threshold(8.0, "there batch norm's error is points above group norm's", _GROUP),
    "noise confidence": Threshold(0.99, "of the upper limit of m_eff, from a χ² of batches", _OURS),
    "count": Threshold(16.0, "the deviation of so few is off by a sixth, 1/√(2·16)", _GROUP),
    "count error": Threshold(1.0, "one value has no variance: training raises", _IOFFE),
    "initial": Threshold(0.01, "what is left of the value that layers begin with", _IOFFE),
    "momentum": Threshold(
        0.9, "torch's momentum weighs the new batch", "pytorch docs, BatchNorm2d"
    ),
    "dead": Threshold(0.1, "healthy networks have nearly none after batch norm", _OURS),
    "dead error": Threshold(0.4, "the layer has lost half of its width", _OURS),
    "dead values": Threshold(1000.0, "by then a unit active once in 333 shows with 95%", _OURS),
    "saturated": Threshold(0.2, "a fifth of a layer does not learn", "Glorot and Bengio, 2010"),
    "saturated share": Threshold(0.95, "of a unit's values, with σ′ < .01", _OURS),
    "collapse": Threshold(0.3, "share of channels with |γ| < .01", _OURS),
    "collapse gamma": Threshold(0.01, "of |γ|: such a channel passes a hundredth on", _OURS),
    "variance": Threshold(10.0, "times ε: below, ε and not the data sets the scale", _IOFFE),
    "gain": Threshold(100.0, "of |γ|/√(σ²+ε): noise of a hundredth becomes the signal", _OURS),
    "dropout": Threshold(0.1, "of |ln ratio| of variances", "Li et al., Disharmony, 2019"),
    "part": Threshold(
        1e-4, "relative; far above what another batch size rounds differently", _OURS
    ),
    "order": Threshold(0.02, "points of accuracy that the order of samples is worth", _WU),
    "order p": Threshold(1e-6, "of χ² over batches and classes, before anything is run", _OURS),
    "shift": Threshold(
        0.99, "quantile of batches of the training domain", "Schneider et al., 2020"
    ),
    "shift batches": Threshold(8.0, "of the training domain, to have a quantile of", _OURS),
    "growth": Threshold(1.2, "of ‖δ‖² a layer", "Yang et al., A Mean Field Theory of BN, 2019"),
    "growth total": Threshold(1e6, "of ‖δ‖² in all", "Yang et al., 2019"),
    "shared": Threshold(0.5, "standard deviations between the means of two calls", _OURS),
}
"""What each number is, by name."""


def threshold(name: str) -> float:
    """Return a threshold's value.

    >>> threshold("noise")
    32.0
    """
    return THRESHOLDS[name].value
