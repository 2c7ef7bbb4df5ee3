"""Frozen and trained parameters, by part and by name."""

from typing import Any

import pytest

from tests.helpers import CACHES, CASES, images, labels, tiny_model
from tests.training.optimizing import SIT, trains
from ufgir.training.freezing import NEW_PARTS, freeze, part_names


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens == "registers"], ids=str)
def test_a_linear_probe_trains_what_is_new(case: Any) -> None:
    """The original leaves parameters of reductions frozen at random values (F14); here they are trained, as are CLR and the head."""
    model = case.model()
    trained = trains(model)
    assert set(freeze(model, ["backbone"])) == trained - trains(model)
    new = (".reduction.", ".probe.", "classifier.", "embeddings.clr_")
    assert trains(model) == {name for name in trained if any(part in name for part in new)} != set()
    model.train()(images(), labels=labels()).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_queries_of_a_probing_head_train() -> None:
    model = tiny_model(head="vqt", reduction="dyvit", keep_rate=0.5)
    freeze(model, ["backbone"])
    assert {part_names(model)[name] for name in trains(model)} == {"head", "reductions", "query_tokens"}


@pytest.mark.parametrize(
    ("parts", "unfreeze", "expected"),
    [
        (["backbone"], ["cls_token"], {"embeddings.cls_token"}),
        (["backbone"], ["position_embeddings", "layer_scale"], {"embeddings.position_embeddings", "lambda1"}),
        (["backbone"], ["attention"], {"attention."}),  # the original's attn_only, with position_embeddings
        (["backbone"], ["layers.0"], {"layers.0."}),
        (["attention", "mlp", "cls_token", "position_embeddings", "patch_embeddings"], ["norms"], {"norm", "lambda1"}),
        (["backbone", "reductions"], [], set()),
    ],
)
def test_parts(parts: list[str], unfreeze: list[str], expected: set[str]) -> None:
    model = tiny_model(layerscale_value=0.1, use_qk_norm=True, **SIT)
    wanted = trains(model)
    freeze(model, parts, unfreeze)
    new = ("classifier.", "embeddings.clr_", *(() if "reductions" in parts else (".reduction.",)))
    assert trains(model) == {name for name in wanted if any(part in name for part in (*new, *expected))}


@pytest.mark.parametrize("as_original", [False, True])
@pytest.mark.parametrize(
    ("parts", "unfreeze", "positions_train"),
    [
        (["backbone"], [], False),
        (["position_embeddings"], [], False),
        (["backbone"], ["position_embeddings"], True),
        (["backbone"], ["clr_tokens"], False),
        (["attention"], [], True),
    ],
)
def test_positions_of_clr(parts: list[str], unfreeze: list[str], positions_train: bool, as_original: bool) -> None:
    """In the original they belong to the position embeddings and are frozen with them; CLR itself is trained."""
    model = tiny_model(**CACHES["clca"])
    freeze(model, parts, unfreeze, as_original=as_original)
    own = {name.removeprefix("vit.") for name in trains(model)}
    assert "embeddings.clr_tokens" in own
    assert ("embeddings.clr_position_embeddings" in own) == (positions_train or not as_original)
    if parts != ["attention"]:
        assert ("embeddings.position_embeddings" in own) == positions_train


def test_nothing_frozen_starts_to_train() -> None:
    model = tiny_model(**SIT)  # the final norm is frozen: the CLA head does not read it
    freeze(model, ["backbone"], ["norms"])
    assert not model.vit.layernorm.weight.requires_grad and model.vit.layers[0].layernorm_before.weight.requires_grad


def test_freeze_says_what_is_wrong() -> None:
    model = tiny_model()
    before = trains(model)
    with pytest.raises(ValueError, match=r"`freeze` must .*, got atention; did you mean attention"):
        freeze(model, ["atention"])
    with pytest.raises(ValueError, match="`freeze`: the model has no clr_tokens"):
        freeze(model, ["clr_tokens"])
    with pytest.raises(ValueError, match=r"`unfreeze`: the model has no layers\.7"):
        freeze(model, ["backbone"], ["layers.7"])
    with pytest.raises(ValueError, match="`freeze` backbone head"):
        freeze(model, ["backbone", "head"])
    assert trains(model) == before
    assert set(NEW_PARTS) & {"backbone"} == set() and freeze(model, []) == []
