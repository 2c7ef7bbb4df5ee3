"""Settings of the page: other options with the same weights."""

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
)

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification
from tests.app.helpers import save_checkpoint
from tests.helpers import TINY
from ufgir.app import page as app
from ufgir.app.viewer import (
    Setting,
    Viewer,
    drawn_examples,
    load_checkpoint,
    own_setting,
    setting_config,
    with_weights,
)
from ufgir.checkpoints.loading import load_config, load_model


OWN_PARAMETERS = {"dpcknn", "dyvit", "patchmerger", "sinkhorn", "sit"}


# Settings


def test_the_own_setting_leaves_the_configuration_as_it_is():
    config = CLCAViTConfig(**TINY, reduction="evit", keep_rate=[0.5, 0.32], cross_layer_cache=True)
    own = own_setting(config)
    assert own == Setting("evit", 0.4, True)  # 0.5 * 0.32 = 0.4 * 0.4
    assert setting_config(config, own).keep_rate == [0.5, 0.32]
    assert setting_config(config, own._replace(cache=False)).keep_rate == [0.5, 0.32]
    assert setting_config(config, own._replace(keep_rate=0.3)).keep_rate == [0.3]
    config = CLCAViTConfig(**TINY, reduction="evit", keep_tokens=[8, 4])
    own = own_setting(config)
    assert own == Setting("evit", 0.5, False)  # 4 of 16 patches after two stages
    changed = setting_config(config, own._replace(keep_rate=0.25))
    assert changed.keep_rate == [0.25] and changed.keep_tokens is None


def test_options_of_a_method_stay_with_it():
    config = CLCAViTConfig(**TINY, reduction="topk", keep_rate=0.5, reduction_kwargs={"score_by": "received"})
    assert setting_config(config, Setting("topk", 0.3, False)).reduction_kwargs == {"score_by": "received"}
    assert not setting_config(config, Setting("evit", 0.3, False)).reduction_kwargs


def test_a_plain_vit_gets_stages_that_fit_its_depth():
    config = CLCAViTConfig(num_hidden_layers=12)
    assert setting_config(config, Setting("evit", 0.5, False)).reduction_layers == [3, 6, 9]
    config = CLCAViTConfig(num_hidden_layers=4)
    assert setting_config(config, Setting("evit", 0.5, True)).reduction_layers == [1, 2, 3]


@pytest.mark.parametrize(
    "setting", [Setting("tome", 0.3, True), Setting("evit", 0.25, False), Setting(None, 1.0, True)]
)
def test_a_setting_is_the_checkpoint_with_other_options(checkpoint, setting):
    model = load_checkpoint(checkpoint).model
    config = setting_config(model.config, setting)
    other = with_weights(model, config)
    pixels = torch.randn(2, 3, 32, 32)
    loaded = CLCAViTForImageClassification.from_pretrained(
        checkpoint,
        reduction=setting.method,
        keep_rate=setting.keep_rate,
        cross_layer_cache=setting.cache,
    )
    with torch.no_grad():
        torch.testing.assert_close(other(pixels).logits, loaded.eval()(pixels).logits, rtol=0, atol=0)
        assert other(pixels).token_counts == loaded(pixels).token_counts
    theirs = dict(model.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in other.named_parameters())  # nothing is copied
    assert model.config.reduction == "evit"  # and the checkpoint is as before


def test_only_methods_without_lacking_parameters_are_offered(checkpoint, tmp_path):
    found = load_checkpoint(checkpoint)
    assert set(found.methods) == {None} | (set(REDUCTIONS) - OWN_PARAMETERS) and found.methods[0] is None
    assert set(found.reasons) == OWN_PARAMETERS and not found.fixed_rate and found.cache
    assert "sit has parameters that this checkpoint does not contain" in found.reasons["sit"]
    with pytest.raises(ValueError, match="dyvit has parameters that this checkpoint does not contain"):
        with_weights(found.model, setting_config(found.config, Setting("dyvit", 0.5, True)))
    slots = load_checkpoint(save_checkpoint(tmp_path, reduction="sit"))
    assert "sit" in slots.methods and "patchmerger" in slots.reasons
    assert slots.fixed_rate == {"sit"}  # its slots are parameters
    with pytest.raises(
        ValueError, match=r"sit has parameters that this checkpoint does not contain at keep rate 0.25"
    ):
        with_weights(slots.model, setting_config(slots.config, Setting("sit", 0.25, True)))


@pytest.mark.parametrize("method", [None, "topk"])
def test_a_model_for_several_keep_rates_serves_other_settings(tmp_path, leaf, method):
    name = save_checkpoint(tmp_path, train_keep_rates=[0.25, 0.5])
    viewer, setting = Viewer(), Setting(method, 0.5 if method else 1.0, True)
    assert method in viewer.checkpoint(name).methods
    prediction = viewer.predict(name, leaf, setting)
    config = load_config(name, {"reduction": method} | ({"keep_rate": [0.5]} if method else {}))
    with torch.no_grad():
        logits = load_model(name, config).model(viewer.view(name, leaf).pixels).logits[0]
    assert [share for _, share in prediction.classes] == pytest.approx(
        sorted(logits.softmax(0).tolist(), reverse=True)
    )


def test_a_processor_that_resizes_the_shorter_side(tmp_path, leaf):
    name = save_checkpoint(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert [len(drawn_examples(load_checkpoint(name).config)), Viewer().view(name, leaf).grid] == [3, (4, 4)]
    assert app.make_page(name)


def test_a_method_of_one_rate_shows_it_and_latency_is_measured(tmp_path, leaf):
    name = save_checkpoint(tmp_path, reduction="sit")
    viewer = Viewer()
    page = app._Page(app.import_gradio(), viewer, name, [("a leaf", leaf)])
    assert page._method(name, "sit") == page.gr.update(value=0.5, interactive=False)
    assert page._method(name, "topk") == page.gr.update(interactive=True)
    assert page._method(name, app._DENSE) == page.gr.update(interactive=False)
    functions = list(page.blocks.fns.values())
    for first in ("_upload", "example", "_load"):  # each is followed by a look and by a measurement
        index = next(i for i, one in enumerate(functions) if one.fn.__name__ == first)
        assert [one.fn.__name__ for one in functions[index + 1 : index + 3]] == ["_show", "_measure"]
