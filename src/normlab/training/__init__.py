"""Training: recipes, and the engines that follow them."""

from normlab.training.choice import ENGINES, Choice
from normlab.training.engine import Event, run_replicas
from normlab.training.evaluation import evaluate
from normlab.training.fleet import Engine, Fleet
from normlab.training.networks import build
from normlab.training.recipe import Measurement, Outcome, Reading, Recipe, Replica, Setting
from normlab.training.trainer import Evaluation, Trainer, train

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "Evaluation",
    "Event",
    "Fleet",
    "Measurement",
    "Outcome",
    "Reading",
    "Recipe",
    "Replica",
    "Setting",
    "Trainer",
    "build",
    "evaluate",
    "run_replicas",
    "train",
]
