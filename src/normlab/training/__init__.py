"""Training: recipes, and the engines that follow them."""

from normlab.training.choice import ENGINES, Choice
from normlab.training.engine import Event, run_replicas
from normlab.training.evaluation import evaluate
from normlab.training.fleet import Engine, Fleet, train
from normlab.training.recipe import Measurement, Outcome, Recipe, Replica, Setting

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "Event",
    "Fleet",
    "Measurement",
    "Outcome",
    "Recipe",
    "Replica",
    "Setting",
    "evaluate",
    "run_replicas",
    "train",
]
