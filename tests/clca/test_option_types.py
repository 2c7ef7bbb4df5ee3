"""Types of a method's options are checked in any annotation style. In this file all annotations are strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Optional

import pytest

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, TokenReduction, register_reduction
from clca.reduction_base import AttentionPruning
from tests.helpers import images, tiny_config


if TYPE_CHECKING:
    from nowhere import Unknown


class Strings(AttentionPruning):
    name = "strings_of_a_test"

    def __init__(
        self,
        config: CLCAViTConfig,
        stage: int,
        *,
        count: int = 1,
        share: float = 0.5,
        flag: bool = False,
        names: list[str] | None = None,
        old: Optional[int] = None,  # noqa: UP045
        kind: Literal["a", "b"] = "a",
        anything: Any = None,
        unknown: Unknown | None = None,
        bare=None,
    ) -> None:
        super().__init__(config, stage)
        self.count_option = count


@pytest.fixture(autouse=True)
def registered():
    register_reduction(Strings)
    yield
    del REDUCTIONS[Strings.name]


def make(**options: Any) -> CLCAViTConfig:
    return tiny_config(reduction=Strings.name, keep_rate=0.5, reduction_kwargs=options)


def test_the_annotations_are_strings() -> None:
    assert Strings.__init__.__annotations__["count"] == "int"
    assert Strings.option_types["count"] is int
    assert Strings.option_types["names"] == list[str] | None


@pytest.mark.parametrize(
    "options",
    [
        {"count": 2},
        {"share": 1},
        {"share": 0.25, "flag": True},
        {"names": ["a"]},
        {"names": None, "old": None},
        {"old": 3},
        {"kind": "b"},
        {"anything": 1.5},
        {"unknown": "whatever"},
        {"bare": [1]},
    ],
    ids=str,
)
def test_values_of_the_right_type_pass(options: dict[str, Any]) -> None:
    model = CLCAViTForImageClassification(make(**options)).eval()
    stage = model.vit.layers[1].reduction
    assert stage.count_option == options.get("count", 1)
    assert model.double()(images()).logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("count", 1.5),
        ("count", "1"),
        ("count", True),
        ("share", "0.5"),
        ("share", float("nan")),
        ("flag", 1),
        ("names", "a"),
        ("old", 1.5),
        ("kind", "c"),
        ("other", 1),
    ],
)
def test_others_are_refused_when_the_configuration_is_made(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`reduction_kwargs`.*`{option}`"):
        make(**{option: value})


def test_flags_follow_from_what_is_overridden() -> None:
    """The override may be in the class itself or in another of its bases."""

    class Loss:
        @classmethod
        def loss_terms(cls, config: CLCAViTConfig, inputs: Any) -> dict[str, Any]:
            return {}

    class Late(Strings):
        def before_mlp(self, hidden_states, state, context):
            return super().before_mlp(hidden_states, state, context)

    class Both(Loss, Late):
        pass

    flags = [(cls.merges_early, cls.adds_to_loss) for cls in (TokenReduction, Strings, Late, Both)]
    assert flags == [(True, False), (True, False), (False, False), (False, True)]
    assert [name for name, method in REDUCTIONS.items() if method.adds_to_loss] == ["dyvit"]


def test_layers_call_the_hooks_that_are_overridden() -> None:
    class Early(TokenReduction):
        def before_layer(self, hidden_states, state):
            return super().before_layer(hidden_states, state)

    class Late(Early):
        def before_mlp(self, hidden_states, state, context):
            return super().before_mlp(hidden_states, state, context)

    hooks = [cls.layer_hooks for cls in (TokenReduction, Early, Late, Strings)]
    assert hooks == [set(), {"before_layer"}, {"before_layer", "before_mlp"}, {"merge_tokens", "before_mlp"}]
