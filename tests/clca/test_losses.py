"""Losses compared with the original, and the loss terms that a model reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from clca import loss_clca as losses
from clca import modeling_clca
from clca.configuration_clca import CLCAViTConfig
from tests.helpers import images, labels, tiny_config, tiny_model
from ufgir.training.teacher import Teacher


GOLDENS = Path(__file__).parents[1] / "goldens_misc"


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_equal(loss: torch.Tensor, expected: torch.Tensor) -> None:
    assert (loss - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1, 3])
def test_distillation(kind: str, temperature: int) -> None:
    """The loss is (1 - a) * cross-entropy + a * distillation, as in the original."""
    config, golden = load("loss_distillation")
    alpha = config[f"alpha_{kind}"]
    base = torch.nn.functional.cross_entropy(golden["outputs"], golden["labels"])
    term = losses.distillation_loss(golden["outputs_kd"], golden["teacher"], kind, temperature)
    assert_equal((1 - alpha) * base + alpha * term, golden[f"loss.{kind}_tau{temperature}"])


def test_distillation_refuses() -> None:
    with pytest.raises(ValueError, match="`kind`"):
        losses.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), "medium")
    with pytest.raises(ValueError, match="`temperature`"):
        losses.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), "soft", 0.0)


@pytest.mark.parametrize("case", ["noteacher", "noteacher_w", "teacher_mse", "teacher_kl", "teacher_emptymask"])
def test_dynamic_vit(case: str) -> None:
    """The loss consists of cross-entropy, the ratio term and, with a teacher, class and token distillation, with the
    original's weights."""
    config, golden = load("loss_dyvit")
    weights = {"ratio_weight": 2.0, "cls_weight": 1.0} | config.get(case, {})
    loss = weights["cls_weight"] * torch.nn.functional.cross_entropy(golden["outputs"], golden["labels"])
    decisions = [golden["score0"], golden["score1"]]
    loss = loss + weights["ratio_weight"] * losses.keep_ratio_loss(decisions, config["token_ratio"])
    if case.startswith("teacher"):
        kept = golden["mask"].squeeze(-1) * (case != "teacher_emptymask")
        kind = "kl" if case == "teacher_kl" else "mse"
        loss = loss + 0.5 * losses.kl_divergence(golden["outputs"], golden["teacher_logits"])
        tokens, teacher = golden["token_pred"], golden["teacher_tokens"]
        loss = loss + 0.5 * losses.token_distillation_loss(tokens, teacher, kept, kind)
    assert_equal(loss, golden[f"loss.{case}"])


@pytest.mark.parametrize("weight", ["linear", "conv"])
@pytest.mark.parametrize("dim", [0, 1])
def test_group_lasso(weight: str, dim: int) -> None:
    config, golden = load("loss_grouplasso")
    loss = torch.nn.functional.cross_entropy(golden["outputs"], golden["labels"])
    loss = loss + config[f"{weight}_w"] * losses.group_lasso(golden[weight], dim)
    assert_equal(loss, golden[f"loss.{weight}_dim{dim}"])


@pytest.mark.parametrize("case", ["sup", "simclr", "temp05", "sup_norm"])
def test_supervised_contrastive(case: str) -> None:
    config, golden = load("loss_multi_cont")
    classes = config["labels"].get(case.removesuffix("_norm"))
    classes = None if classes is None else torch.tensor(classes)
    temperature = 0.5 if case == "temp05" else 0.07
    assert_equal(losses.supervised_contrastive_loss(golden["features"], classes, temperature), golden[f"loss.{case}"])


def test_supervised_contrastive_leaves_out_anchors_without_a_positive() -> None:
    """There is one view per image, and the third image is the only one of its class. The original returns NaN in this
    case."""
    features = torch.randn(3, 1, 4)
    loss = losses.supervised_contrastive_loss(features, torch.tensor([0, 0, 1]))
    flat = torch.nn.functional.normalize(features[:, 0], dim=-1)
    logits = flat @ flat.T / 0.07
    expected = -torch.stack(
        [logits[0, 1] - logits[0, [1, 2]].logsumexp(0), logits[1, 0] - logits[1, [0, 2]].logsumexp(0)]
    )
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="`features`"):
        losses.supervised_contrastive_loss(features[:1])
    with pytest.raises(ValueError, match="`labels`"):
        losses.supervised_contrastive_loss(features, torch.tensor([0, 1]))


@pytest.mark.parametrize("case", ["default", "coco", "noclip"])
def test_asymmetric(case: str) -> None:
    config, golden = load("loss_asymmetric")
    logits = golden["logits"].clone().requires_grad_()
    options = config[case]
    loss = losses.asymmetric_loss(
        logits, golden["targets"], options["gamma_neg"], options["gamma_pos"], options["clip"]
    )
    assert_equal(loss, golden[f"loss.{case}"])
    loss.backward()
    assert_equal(logits.grad, golden[f"grad.{case}"])


def test_terms_add_up_to_the_loss() -> None:
    """With DynamicViT and a teacher, every term has a name, and the loss is their sum."""
    model = tiny_model(reduction="dyvit", keep_rate=0.5).train()
    size = model.config.image_size
    vit = ViTForImageClassification(
        ViTConfig(
            image_size=size,
            patch_size=model.config.patch_size,
            hidden_size=model.config.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=model.config.num_labels,
        )
    )
    pixels = images()
    teacher = Teacher(vit, model.config.num_patches)
    output = model(pixels, labels=labels(len(pixels)), **teacher(pixels))
    assert set(output.loss_terms) == {"classification", "keep_ratio", "cls_distillation", "token_distillation"}
    assert sum(output.loss_terms.values()) == pytest.approx(output.loss.item(), rel=1e-6)
    assert not any(term.requires_grad for term in output.loss_terms.values())
    output.loss.backward()
    assert model.vit.layers[model.config.reduction_layers[0]].reduction.in_proj[1].weight.grad.abs().sum() > 0
    assert set(model.eval()(pixels, labels=labels(len(pixels))).loss_terms) == {"classification"}


def test_teacher_without_matching_tokens() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="patch tokens"):
        Teacher(model, num_patches=10_000)(images())
    assert set(Teacher(model, num_patches=10_000, use_tokens=False)(images())) == {"teacher_logits"}


def test_a_teacher_with_clr_gives_its_patches() -> None:
    """Its patches are the tokens after the prefix and before CLR, normalized like the input of its head."""
    teacher = tiny_model(num_clr_tokens=2, num_register_tokens=1)
    tokens = Teacher(teacher, 16)(images())["teacher_tokens"]
    assert torch.equal(tokens, teacher.vit(images()).last_hidden_state[:, 2:18])


def test_teachers_that_do_not_fit() -> None:
    student, pixels = tiny_model(reduction="dyvit").train(), images()
    wrong = {
        "`teacher_logits` must have the shape": {"teacher_logits": torch.zeros(3, 9)},
        "`teacher_tokens` must have the shape": {"teacher_tokens": torch.zeros(3, 16, 4)},
    }
    for message, teacher in wrong.items():
        with pytest.raises(ValueError, match=message):
            student(pixels, labels=labels(), **teacher)
    with pytest.raises(ValueError, match=r"`teacher_logits`.*`reduction`='topk'"):
        tiny_model(reduction="topk")(pixels, teacher_logits=torch.zeros(3, 3))


@pytest.mark.parametrize("head", ["linear", "cla", "ifa", "h2t"])
def test_group_lasso_acts_on_the_head_in_use(head: str) -> None:
    model = tiny_model(head=head, group_lasso_weight=0.1).train()
    output = model(images(), labels=labels(len(images())))
    weight = model.classifier.weight if head in ("linear", "h2t") else model.classifier.out_proj.weight
    expected = 0.1 * sum(weight[:, i].norm() for i in range(weight.shape[1]))
    assert output.loss_terms["group_lasso"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_label_needs_matching_shapes() -> None:
    config = CLCAViTConfig(**tiny_config().to_diff_dict() | {"problem_type": "multi_label_classification"})
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        losses.classification_loss(torch.zeros(2, 5), torch.zeros(2, 4), config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asymmetric_in_half_precision(dtype: torch.dtype) -> None:
    logits, targets = torch.tensor([[-20.0, 3.0, 20.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    half = logits.to(dtype).requires_grad_()
    loss = losses.asymmetric_loss(half, targets.to(dtype))
    loss.backward()
    assert torch.equal(loss, losses.asymmetric_loss(logits, targets)) and half.grad.isfinite().all()


def test_another_problem_is_refused() -> None:
    config = tiny_config()
    config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"`problem_type` must be one of regression, .*got 'ranking'"):
        losses.classification_loss(torch.zeros(2, 3), torch.zeros(2).long(), config)


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 1), (2,)])
def test_regression_needs_a_target_a_logit(shape: tuple[int, ...]) -> None:
    config = tiny_config()
    config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"`labels` must have the shape of the logits, \(3, 2\)"):
        losses.classification_loss(torch.zeros(3, 2), torch.zeros(shape), config)
    one = losses.classification_loss(torch.ones(3, 1), torch.zeros(3), config)
    assert one == losses.classification_loss(torch.ones(3, 2), torch.zeros(3, 2), config) == 1


def test_multi_label_loss_can_be_asymmetric() -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    fields = tiny_config().to_diff_dict() | {"problem_type": "multi_label_classification"}
    plain, asymmetric = (CLCAViTConfig(**fields | {"multi_label_loss": kind}) for kind in ("bce", "asymmetric"))
    expected = losses.asymmetric_loss(logits, targets) / 4
    torch.testing.assert_close(losses.classification_loss(logits, targets, asymmetric), expected)
    assert not torch.isclose(losses.classification_loss(logits, targets, plain), expected)
    with pytest.raises(ValueError, match=r"`multi_label_loss` must be one of bce, asymmetric, got 'focal'"):
        CLCAViTConfig(**fields | {"multi_label_loss": "focal"})


# What others compute their loss with.


LOSING = [
    ("dyvit", {}),
    ("dyvit", {"head": "cla"}),
    ("evit", {"group_lasso_weight": 0.1}),
    ("dyvit", {"group_lasso_weight": 0.1}),
]


@pytest.mark.parametrize(("method", "options"), LOSING)
def test_auxiliary_loss(method: str, options: dict[str, Any]) -> None:
    """In training it is returned with and without labels, and has gradients. Added to a loss of the logits it gives
    the model's loss."""
    model = tiny_model(reduction=method, keep_rate=0.5, **options).train()
    gradients = {}
    for given in (True, False):
        torch.manual_seed(7)
        model.zero_grad()
        output = model(images(), labels=labels() if given else None)
        names = {"keep_ratio"} if method == "dyvit" else set()
        names |= {"group_lasso"} if "group_lasso_weight" in options else set()
        assert set(output.loss_terms) - {"classification"} == names
        assert output.auxiliary_loss.item() == pytest.approx(
            sum(output.loss_terms[name].item() for name in names), rel=1e-12
        )
        loss = output.loss if given else nn.functional.cross_entropy(output.logits, labels()) + output.auxiliary_loss
        assert (output.loss is None) != given
        loss.backward()
        gradients[given] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[True].items():
        assert (gradient - gradients[False][name]).abs().max() <= 1e-12, name


def test_no_auxiliary_loss() -> None:
    """It is None in evaluation, and if no term is added to the classification loss."""
    model = tiny_model(reduction="dyvit", keep_rate=0.5)
    assert model(images(), labels=labels()).auxiliary_loss is None
    plain = tiny_model(reduction="evit", keep_rate=0.5).train()
    assert plain(images(), labels=labels()).auxiliary_loss is None
    assert plain(images()).loss_terms is None


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that lists the warnings about lost terms, in a process without earlier warnings."""
    type(modeling_clca.logger).warning_once.cache_clear()
    return lambda: [r.message for r in caplog.records if "`auxiliary_loss`" in r.message]


def test_lost_terms_are_logged_once(logged: Callable[[], list[str]]) -> None:
    model = tiny_model(reduction="dyvit", keep_rate=0.5).train()
    model(images(), labels=labels())
    with torch.no_grad():
        model(images())
    tiny_model(reduction="evit", keep_rate=0.5).train()(images())
    model.eval()(images())
    assert logged() == []
    model.train()
    for _ in range(3):
        model(images())
    (message,) = logged()
    assert "keep_ratio would be lost" in message and "`label_smoothing`" in message


def test_label_smoothing_of_trainer(logged: Callable[[], list[str]], tmp_path: Path) -> None:
    """The user is warned that this loss lacks the term of the method. With `label_smoothing` of the configuration the
    loss has both terms."""
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(8).float())]
    said, losses_of = {}, {}
    for own in (False, True):
        model = tiny_model(reduction="dyvit", keep_rate=0.5, label_smoothing=0.2 if own else 0.0).float()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=8, use_cpu=True, report_to=[]
        )
        arguments.label_smoothing_factor, arguments.logging_steps, arguments.disable_tqdm = (
            0.0 if own else 0.2,
            1,
            True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        terms = []
        model.register_forward_hook(lambda module, args, output, terms=terms: terms.append(output.loss_terms))
        torch.manual_seed(0)
        trainer.train()
        losses_of[own] = {**{k: v.item() for k, v in terms[0].items()}, "loss": trainer.state.log_history[0]["loss"]}
        said[own] = len(logged())
    assert said == {False: 1, True: 1}  # none more
    without, whole = losses_of[False], losses_of[True]
    assert whole["classification"] == pytest.approx(without["loss"], abs=1e-4)
    assert whole["loss"] == pytest.approx(without["loss"] + without["keep_ratio"], abs=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing(soft: bool) -> None:
    """The training loss uses smoothed labels, the evaluation loss does not."""
    model = tiny_model(label_smoothing=0.3, problem_type="single_label_classification")
    targets = nn.functional.one_hot(labels(), 3).double()
    given = targets if soft else labels()
    plain = nn.functional.cross_entropy(model(images()).logits, labels())
    assert (model(images(), labels=given).loss - plain).abs() <= 1e-9
    output = model.train()(images(), labels=given)
    expected = nn.functional.cross_entropy(output.logits, 0.7 * targets + 0.1)
    assert (output.loss - expected).abs() <= 1e-9


def test_label_smoothing_of_other_problems() -> None:
    """Multi-label targets are smoothed per class, as in `run_ufgir.py`. Regression refuses smoothing."""
    targets = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).double()
    model = tiny_model(label_smoothing=0.2, problem_type="multi_label_classification").train()
    output = model(images(), labels=targets)
    expected = nn.functional.binary_cross_entropy_with_logits(output.logits, 0.8 * targets + 0.1)
    assert (output.loss - expected).abs() <= 1e-9
    model = tiny_model(label_smoothing=0.2, problem_type="regression").train()
    with pytest.raises(ValueError, match="`label_smoothing` must be 0 for regression"):
        model(images(), labels=targets)
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"`label_smoothing` must be in \[0, 1\), got {value}"):
            tiny_model(label_smoothing=value)
