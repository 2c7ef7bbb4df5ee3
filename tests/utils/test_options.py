"""Conflicting options and options without effect, `ufgir.utils.options`."""

import logging
from dataclasses import dataclass

import pytest

from ufgir.utils.options import (
    OptionGroup,
    Requirement,
    argument,
    called,
    changed_fields,
    check_options,
    collected,
    warn_without_effect,
)


WARMUP = Requirement(("ema_warmup", "ema_as_final"), "`ema_decay`", lambda values: values.get("ema_decay"))
DRAWN = Requirement(("synthetic_",), "`dataset` synthetic_leaves", lambda values: False)
EXCLUDED = Requirement(("shots",), "`all` false", lambda values: not values.get("all"), refused=True)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_one_warning_names_all_options_without_effect(caplog):
    given = ["ema_warmup", "seed", "synthetic_seed", "ema_as_final", "synthetic_size"]
    found = check_options({}, given, [WARMUP, DRAWN, EXCLUDED])
    assert list(found) == ["ema_warmup", "ema_as_final", "synthetic_seed", "synthetic_size"]
    assert found["ema_warmup"] == "`ema_decay`" and found["synthetic_seed"] == "`dataset` synthetic_leaves"
    (warning,) = warnings(caplog)
    assert all(f"`{name}`" in warning for name in found) and "`seed`" not in warning


def test_nothing_is_said_where_everything_has_an_effect(caplog):
    assert check_options({"ema_decay": 0.9}, ["ema_warmup"], [WARMUP]) == {}
    assert check_options({}, [], [WARMUP, DRAWN]) == {} and warnings(caplog) == []


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match=r"`shots`.*`all`"):
        check_options({"all": True}, ["shots"], [EXCLUDED])
    assert check_options({"all": False}, ["shots"], [EXCLUDED]) == {}


def test_several_checks_make_one_warning(caplog):
    with collected() as found:
        check_options({}, ["ema_warmup"], [WARMUP])
        with collected() as own:
            check_options({}, ["ema_as_final"], [WARMUP])
        check_options({}, ["synthetic_seed"], [DRAWN])
    assert list(found) == ["ema_warmup", "synthetic_seed"] and list(own) == ["ema_as_final"] and warnings(caplog) == []
    warn_without_effect(found)
    warn_without_effect({})
    assert len(warnings(caplog)) == 1
    check_options({}, ["ema_warmup"], [WARMUP])  # as before again
    assert len(warnings(caplog)) == 2


def test_a_group_of_options_checks_what_differs_from_its_defaults(caplog):
    @dataclass
    class Group(OptionGroup):
        rank: int | None = None
        targets: list[str] | None = None
        alpha: float = 1.0
        requirements = (Requirement(("targets", "alpha"), "a `rank`", lambda group: group.rank),)

    group = Group(targets=["mlp"], alpha=1.0)
    assert changed_fields(group) == ["targets"]
    (warning,) = warnings(caplog)
    assert "`targets`" in warning and "`rank`" in warning and "`alpha`" not in warning
    Group(rank=2, targets=["mlp"])
    assert len(warnings(caplog)) == 1


def test_messages_use_the_names_of_the_caller(caplog):
    with called({"revision": "dataset_revision"}):
        assert argument("revision") == "`dataset_revision`" and argument("seed") == "`seed`"
        check_options({}, ["revision"], [Requirement(("revision",), "the Hub", lambda values: False)])
    assert argument("revision") == "`revision`"
    assert "`dataset_revision`" in caplog.text
