"""A schedule is one entry of `SCHEDULES`, whose arguments and defaults are those of the options."""

from dataclasses import fields

from ufgir.training.optimization import CHOICES, OptimizationArguments
from ufgir.training.schedules import SCHEDULES, schedule_options


def test_every_argument_of_a_schedule_is_an_option():
    names = {field.name for field in fields(OptimizationArguments)}
    for name in SCHEDULES:
        assert set(schedule_options(name)) <= names
        assert OptimizationArguments(schedule=name).schedule_values() == schedule_options(name)
    assert set(CHOICES["schedule"]) == {"trainer", *SCHEDULES}
    assert OptimizationArguments().schedule_values() == {}


def test_what_was_given_takes_the_place_of_a_default():
    values = OptimizationArguments(schedule="step_epochs", decay_rate=0.5).schedule_values()
    assert values == schedule_options("step_epochs") | {"decay_rate": 0.5}
