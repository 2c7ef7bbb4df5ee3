"""Load checkpoints: missing weights are reported in Python and by every command; models for several keep rates are loaded at one of them."""

import json

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, TINY, images
from ufgir.checkpoints.keep_rates import at_one_rate, rate_of
from ufgir.checkpoints.loading import EVERYTHING, HEAD, load_config, load_model, load_pretrained
from ufgir.cli import entry as cli
from ufgir.transforms.preprocessing import make_image_processor


STOCK = {k: v for k, v in TINY.items() if k not in ("num_labels", "reduction_layers")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Save models with EViT, with SiT and for several keep rates, a stock ViT without head, and images."""
    folder = tmp_path_factory.mktemp("loading")
    names = {"id2label": dict(enumerate(("ash", "beech", "cedar")))}
    variants = {"evit": {}, "sit": {"reduction": "sit"}, "variable": {"train_keep_rates": [0.25, 0.5]}}
    for name, changes in variants.items():
        torch.manual_seed(0)
        options = TINY | CACHES["clca"] | {"reduction": "evit", "keep_rate": 0.5} | names | changes
        del options["num_labels"]
        model = CLCAViTForImageClassification(CLCAViTConfig(**options))
        for buffer in dict(model.named_buffers()).values():
            if buffer.dim() == 2:  # statistics of the rates
                buffer.data = torch.rand_like(buffer) + 0.5
        model.save_pretrained(folder / name)
    ViTModel(ViTConfig(**STOCK)).save_pretrained(folder / "headless")
    for name in (*variants, "headless"):
        make_image_processor(32, resize_size=32).save_pretrained(folder / name)
    for i in range(6):
        place = folder / "leaves" / "test" / ("ash", "beech", "cedar")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 60 + i).convert("RGB").save(place / f"{i}.png")
    return folder


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


def test_weights_that_are_lacking_are_named(checkpoints):
    evit, headless = str(checkpoints / "evit"), str(checkpoints / "headless")
    assert load_model(evit, load_config(evit, {})).untrained == []
    dyvit = load_config(evit, {"reduction": "dyvit"})
    with pytest.raises(ValueError, match=r"evit does not contain vit.* and 17 more of dyvit"):
        load_model(evit, dyvit)
    with pytest.raises(ValueError, match=r"does not contain classifier\.bias, classifier\.weight"):
        load_model(headless, load_config(headless, {}))
    assert load_model(headless, load_config(headless, {}), unused=HEAD).untrained == [
        "classifier.bias",
        "classifier.weight",
    ]


def test_what_is_lacking_is_the_same_each_time_and_leaves_chance_alone(checkpoints):
    evit = str(checkpoints / "evit")
    config = load_config(evit, {"reduction": "dyvit"})
    state = torch.get_rng_state()
    first = load_model(evit, config, unused=EVERYTHING)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    second = load_model(evit, config, unused=EVERYTHING).model.state_dict()
    assert len(first.untrained) == 20
    assert all(torch.equal(value, second[name]) for name, value in first.model.state_dict().items())


def test_weights_of_other_shapes_are_named(checkpoints):
    sit = str(checkpoints / "sit")
    config = load_config(sit, {"keep_rate": [0.25]})
    with pytest.raises(ValueError, match=r"slot_logits.*\(8,\), not \(4,\)") as caught:
        load_model(sit, config)
    assert "report" not in str(caught.value)
    with pytest.raises(ValueError, match="`ignore_mismatched_sizes`"):
        load_pretrained(sit, config)
    assert load_pretrained(sit, config, ignore_mismatched_sizes=True).config.keep_rate == [0.25]
    with pytest.raises(ValueError, match=r"do not fit .*`image_size`"):
        load_model(sit, load_config(sit, {"image_size": 64}))


def test_a_file_that_was_cut_off_is_told_in_a_sentence(checkpoints, tmp_path, capsys):
    for file in (checkpoints / "evit").iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    leaf = checkpoints / "leaves" / "test" / "ash" / "0.png"
    for command in ("predict", "visualize"):
        assert f"the weights of {tmp_path} cannot be read" in refused(capsys, command, tmp_path, leaf)


def test_every_command_refuses_weights_that_were_not_trained(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evit, leaves = checkpoints / "evit", ["--dataset", checkpoints / "leaves", "--output", tmp_path / "out"]
    leaf = checkpoints / "leaves" / "test" / "ash" / "0.png"
    dyvit = ["--reduction", "dyvit"]
    for argv in (
        ["predict", evit, leaf, *dyvit],
        ["export", evit, *dyvit],
        ["analyze", evit, *leaves, *dyvit],
        ["embed", evit, *leaves, *dyvit],
        ["compare", evit, evit, "--changes-b", '{"reduction": "dyvit"}', *leaves],
        ["predict", checkpoints / "headless", leaf],
        ["analyze", checkpoints / "headless", *leaves],
    ):
        assert "train the model first" in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []
    error = refused(capsys, "export", checkpoints / "sit", "--keep-rate", "0.25")
    assert "do not fit the model" in error


def test_a_look_at_the_tokens_needs_no_head(checkpoints, tmp_path, capsys):
    headless, leaves = checkpoints / "headless", ["--dataset", checkpoints / "leaves", "--output"]
    assert cli.main([str(a) for a in ("embed", headless, *leaves, tmp_path / "points", "--method", "pca")]) == 0
    assert "classifier.bias, classifier.weight are random" in capsys.readouterr().out
    assert cli.main([str(a) for a in ("compare", headless, *leaves, tmp_path / "layers")]) == 0
    for name in ("points/embedding.json", "layers/comparison.json"):
        (model,) = json.loads((tmp_path / name).read_text())["models"]
        assert model["untrained"] == ["classifier.bias", "classifier.weight"]


# One of several keep rates


def test_options_of_a_method_stay_with_it(checkpoints, tmp_path):
    config = CLCAViTConfig.from_pretrained(checkpoints / "evit")
    config.reduction_kwargs = {"score_by": "received"}
    config.save_pretrained(tmp_path)
    kept = [load_config(str(tmp_path), {"reduction": name}).reduction_kwargs for name in ("evit", "topk", None)]
    assert kept == [{"score_by": "received"}, None, None]


@pytest.mark.parametrize("reduction", [None, "topk"])
def test_a_model_for_several_keep_rates_runs_with_another_method_or_none(checkpoints, reduction):
    variable = str(checkpoints / "variable")
    model, untrained = load_model(variable, load_config(variable, {"reduction": reduction}))
    assert untrained == [] and (model.config.train_keep_rates is None) == (reduction is None)
    whole = CLCAViTForImageClassification.from_pretrained(variable).eval()
    pixels = images().float()
    with torch.no_grad():
        cls = model.vit(pixels).cls_tokens
        expected = whole.classifier(cls, 1.0 if reduction is None else 0.5)  # of rates above all the highest
        torch.testing.assert_close(model(pixels).logits, expected)


def test_one_rate_of_several(checkpoints):
    whole = CLCAViTForImageClassification.from_pretrained(checkpoints / "variable").eval()
    cls = torch.randn(4, 3, 16)
    settled = at_one_rate(whole.state_dict(), [0.25, 0.5], 0.3)
    single = CLCAViTForImageClassification(
        CLCAViTConfig.from_dict(whole.config.to_dict() | {"train_keep_rates": None})
    )
    single.load_state_dict(settled)
    torch.testing.assert_close(single.eval().classifier(cls), whole.classifier(cls, 0.3))


def test_the_rate_that_stands_for_all_stages():
    evit = TINY | {"reduction": "evit"}
    assert rate_of(CLCAViTConfig(**TINY)) == 1
    assert rate_of(CLCAViTConfig(**evit, keep_rate=[0.5, 0.32])) == pytest.approx(0.4)
    assert rate_of(CLCAViTConfig(**evit, keep_tokens=[8, 4])) == pytest.approx(0.5)  # 4 of 16 patches after two stages


@pytest.mark.parametrize(
    "options", [["--reduction", "none"], ["--reduction", "sit"], ["--keep-tokens", "8", "4"]], ids=str
)
def test_profile_of_a_model_for_several_keep_rates(checkpoints, options, capsys):
    assert cli.main(["profile", str(checkpoints / "variable"), *options]) == 0
    assert "GMACs" in capsys.readouterr().out


def test_a_broken_config_says_what_is_wrong_with_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert f"the config.json of {tmp_path} cannot be read" in refused(capsys, "profile", tmp_path)


def test_stock_models_are_loaded(tmp_path):
    ViTForImageClassification(ViTConfig(**STOCK)).save_pretrained(tmp_path)
    assert (
        load_model(str(tmp_path), load_config(str(tmp_path), {"reduction": "topk", "reduction_layers": [1]})).untrained
        == []
    )


def test_an_interrupted_prediction_says_that_it_goes_on(checkpoints, tmp_path, capsys, monkeypatch):
    def stop(self, image, generator=None):
        raise KeyboardInterrupt

    arguments = [
        "predict",
        str(checkpoints / "evit"),
        str(checkpoints / "leaves"),
        "--output",
        str(tmp_path / "p.csv"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("ufgir.transforms.preprocessing.EvalTransform.__call__", stop)
        assert cli.main(arguments) == 130
    assert "run the same command again" in capsys.readouterr().out and not (tmp_path / "p.csv").exists()
    assert cli.main(arguments) == 0
