"""Training: recipes, and the engines that follow them."""

from normlab.training.engine import run_replicas
from normlab.training.loop import evaluate, train
from normlab.training.recipe import Measurement, Outcome, Recipe, Replica

__all__ = ["Measurement", "Outcome", "Recipe", "Replica", "evaluate", "run_replicas", "train"]
