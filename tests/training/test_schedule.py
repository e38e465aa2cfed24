import pytest

from normlab.training import Recipe
from normlab.training.schedule import Schedule


@pytest.mark.parametrize("evaluate_every", [0, 1, 3, 4, 6, 7])
@pytest.mark.parametrize("probe_every", [0, 1, 4, 5, 6, 9, 100])
def test_it_stops_where_something_is_measured_and_nowhere_else(evaluate_every, probe_every):
    schedule = Schedule(6, evaluate_every, probe_every)
    steps = [0]
    while steps[-1] < 18:
        steps.append(schedule.next(steps[-1]))
    evaluated = {
        step
        for step in range(1, 19)
        if step % 6 == 0 or (evaluate_every and step % 6 % evaluate_every == 0)
    }
    probed = {step for step in range(19) if probe_every and step % probe_every == 0}
    assert steps == sorted({0} | evaluated | probed)
    assert {step for step in steps if schedule.evaluates(step)} == evaluated
    assert {step for step in steps if schedule.probes(step)} == probed


def test_it_is_what_a_recipe_says():
    assert Schedule.of(Recipe(evaluate_every=4), 6) == (6, 4, 0)
    assert Schedule.of(Recipe(probes="units"), 6) == (6, 0, 6)
    assert Schedule.of(Recipe(probes="units", probe_every=5), 6) == (6, 0, 5)
