"""Networks with a slot for a norm, and the arms that fill it."""

from normlab.networks.arms import Arm, parse_arm
from normlab.networks.blocks import ACTIVATIONS
from normlab.networks.build import INITS, build_network, check_network

__all__ = ["ACTIVATIONS", "INITS", "Arm", "build_network", "check_network", "parse_arm"]
