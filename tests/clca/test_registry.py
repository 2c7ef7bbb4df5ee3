"""User-defined methods: registration, saving, errors."""

from pathlib import Path

import pytest
import torch

from clca import (
    REDUCTIONS,
    CLCAViTConfig,
    CLCAViTForImageClassification,
    TokenReduction,
    reductions_clca,
)
from clca.reduction_base import ScoredPruning
from clca.reductions_clca import register_reduction
from tests.helpers import CACHES, images, tiny_config, tiny_model


class EverySecond(ScoredPruning):
    """Keep tokens at regular distances, as a user-defined method."""

    name = "every_second"

    def __init__(self, config: CLCAViTConfig, stage: int, *, step: int = 2) -> None:
        super().__init__(config, stage)
        self.step = step

    def before_layer(self, hidden_states, state):
        position = torch.arange(hidden_states.shape[1] - 1, device=hidden_states.device)
        scores = (position % self.step == 0).to(hidden_states.dtype).expand(hidden_states.shape[0], -1)
        return self.prune(hidden_states, state, scores)


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is registered, used with cache and head, saved and loaded. Loading without registration raises a
    clear error."""
    monkeypatch.setattr("clca.reductions_clca.REDUCTIONS", REDUCTIONS.copy())
    with pytest.raises(ValueError, match="register_reduction"):
        tiny_config(reduction="every_second")
    register_reduction(EverySecond)
    register_reduction(EverySecond)  # the same again
    model = tiny_model(reduction="every_second", keep_rate=0.5, reduction_kwargs={"step": 3}, **CACHES["clca"])
    warnings = []
    monkeypatch.setattr("clca.modeling_clca.logger.warning", lambda text, *args: warnings.append(text % args))
    model.save_pretrained(tmp_path)
    assert "'every_second' is not saved" in warnings[0]
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="register_reduction"):
        CLCAViTForImageClassification.from_pretrained(tmp_path)


def test_scores_of_another_number_of_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 has no score; a score for it would shift all others."""
    prune = EverySecond.prune

    def with_token_0(self, hidden_states, state, scores):
        return prune(self, hidden_states, state, torch.nn.functional.pad(scores, (1, 0)))

    monkeypatch.setattr(EverySecond, "prune", with_token_0)
    reduction = EverySecond(tiny_config(reduction="topk", keep_rate=0.5), stage=0)
    with pytest.raises(ValueError, match=r"`scores`.*\(B, 9\).*\(2, 10\)"):
        reduction.before_layer(torch.zeros(2, 10, 4), None)


def test_hooks_under_the_names_of_release_0_1_0() -> None:
    """Hooks with their names of 0.1.0 are called, with a warning."""
    with pytest.warns(FutureWarning, match="visible.*key_mask"):

        class Masked(TokenReduction):
            @classmethod
            def visible(cls, state):
                return torch.ones(2, 5, dtype=torch.bool)

    assert Masked.attention_mask(None).shape == (2, 1, 1, 5)  # which asks `key_mask`
    with pytest.warns(FutureWarning, match="merge_rows.*merge_tokens"):

        class Merged(TokenReduction):
            def merge_rows(self, context, state):
                return len, state

    assert Merged(tiny_config(), 0)("before_mlp", (1, 2, 3), None, None) == (3, None)


def test_a_cell_of_a_notebook_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the second run has the same name and replaces the first."""
    monkeypatch.setattr(reductions_clca, "REDUCTIONS", dict(REDUCTIONS))
    cell = "class Mine(TokenReduction):\n    name = 'mine'\nregister_reduction(Mine)"
    spaces = [{"TokenReduction": TokenReduction, "register_reduction": register_reduction, "__name__": "cell"}] * 2
    classes = [exec(cell, space) or space["Mine"] for space in spaces]
    assert classes[0] is not classes[1]
    assert reductions_clca.get_reduction("mine") is classes[1]
    with pytest.raises(ValueError, match="taken"):
        register_reduction(type("Other", (TokenReduction,), {"name": "mine"}))


def test_register_refuses() -> None:
    class Nameless(TokenReduction):
        pass

    class Taken(TokenReduction):
        name = "evit"

    class Shouting(TokenReduction):
        name = "LOUD"

    for cls, message in ((Nameless, "`name`"), (Taken, "taken"), (Shouting, "`name`"), (dict, "`cls`")):
        with pytest.raises(ValueError, match=message):
            register_reduction(cls)
