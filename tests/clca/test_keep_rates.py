"""One model at several keep rates: set permanently, for one forward pass, and drawn in training."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, token_schedule
from clca.heads_clca import SwitchableBatchNorm
from tests.helpers import checkpoint_activations, images, labels, tiny_config, tiny_model
from ufgir.profiling.macs import count_macs, dense_config
from ufgir.training.keep_rates import draw_keep_rate


CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
FIXED = ("patchmerger", "sinkhorn", "sit")  # their slots are parameters
VARIABLE = sorted(set(REDUCTIONS) - set(FIXED))
RATES = [0.25, 0.5, 1.0]


def make(method: str | None = "evit", **options: Any) -> CLCAViTForImageClassification:
    return tiny_model(**CLCA | {"reduction": method} | options)


def logits_of(model: CLCAViTForImageClassification, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(images(), **options).logits


def twin_at(model: CLCAViTForImageClassification, **budget: Any) -> CLCAViTForImageClassification:
    """Return a model made for another budget, with the same weights."""
    values = model.config.to_dict() | {"keep_rate": [1.0], "keep_tokens": None} | budget
    twin = CLCAViTForImageClassification(CLCAViTConfig.from_dict(values)).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


# Changing the budget of a trained model.


@pytest.mark.parametrize("rate", [0.25, 1.0, [0.75, 0.5]], ids=str)
@pytest.mark.parametrize("method", VARIABLE)
def test_a_model_at_another_rate_is_one_made_for_it(method: str, rate: float | list[float]) -> None:
    """`set_keep_rate` and the argument of `forward` give the logits, counts and schedule of a model made for that
    rate, whatever its previous rate."""
    model = make(method, keep_rate=0.5)
    before = model.config.to_dict()
    expected = twin_at(model, keep_rate=rate)
    with torch.no_grad():
        output, wanted = model(images(), keep_rate=rate), expected(images())
    assert torch.equal(output.logits, wanted.logits)
    assert output.token_counts == wanted.token_counts
    assert token_schedule(model.config, keep_rate=rate) == token_schedule(expected.config)
    assert model.config.to_dict() == before  # of this forward alone
    for part in (model, model.vit):  # the backbone has both, too
        part.set_keep_rate(rate)
        assert model.config.keep_rate == expected.config.keep_rate
        assert torch.equal(logits_of(model), wanted.logits)
        model.set_keep_rate(0.5)
    assert model.config.to_dict() == before


def test_counts_give_way_to_a_rate() -> None:
    model = make("topk", keep_tokens=[9, 4])
    expected = logits_of(twin_at(model, keep_rate=0.25))
    assert torch.equal(logits_of(model, keep_rate=0.25), expected)
    model.set_keep_rate(0.25)
    assert model.config.keep_tokens is None
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("method", ["ats", "evit", "heuristic"])
def test_the_rate_that_was_set_is_saved(method: str, tmp_path: Path) -> None:
    model = make(method, keep_rate=0.5)
    model.set_keep_rate(0.25)
    model.save_pretrained(tmp_path)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.keep_rate == [0.25]
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("size", [(48, 48), (24, 56)], ids=str)
@pytest.mark.parametrize("method", ["ats", "heuristic", "dpcknn"])
def test_with_another_image_size(method: str, size: tuple[int, int]) -> None:
    model = make(method, keep_rate=0.5)
    twin = twin_at(model, keep_rate=0.25)
    pixels = images(2, *size)
    with torch.no_grad():
        output = model(pixels, interpolate_pos_encoding=True, keep_rate=0.25)
        assert torch.equal(output.logits, twin(pixels, interpolate_pos_encoding=True).logits)


def test_macs_follow() -> None:
    model = make("topk", keep_rate=0.5)
    macs = count_macs(model)
    model.set_keep_rate(0.25)
    assert count_macs(model) == count_macs(twin_at(model, keep_rate=0.25)) < macs


def test_threads_do_not_meet() -> None:
    """Forward passes in several threads can use different rates, because no state of a rate is stored on the model."""
    model = make("topk", keep_rate=0.5)
    expected = {rate: logits_of(model, keep_rate=rate) for rate in RATES}
    wrong: list[float] = []

    def run(rate: float) -> None:
        for _ in range(10):
            if not torch.equal(logits_of(model, keep_rate=rate), expected[rate]):
                wrong.append(rate)

    threads = [threading.Thread(target=run, args=(rate,)) for rate in RATES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("method", "options", "rate", "message"),
    [
        *((method, {"keep_rate": 0.5}, 0.25, "8, 4 slots") for method in FIXED),
        (None, {}, 0.5, "without a `reduction`"),
        ("heuristic", {"reduction_kwargs": {"contiguous": True}}, 0.5, "`contiguous`"),
        ("evit", {}, 0.0, r"in \(0, 1\]"),
        ("evit", {}, 1.5, r"in \(0, 1\]"),
        ("evit", {}, float("nan"), r"in \(0, 1\]"),
        ("evit", {}, True, r"in \(0, 1\]"),
        ("evit", {}, "0.5", r"in \(0, 1\]"),
        ("evit", {}, [], "at least one"),
        ("evit", {}, [0.5, 0.5, 0.5], "one per stage, 2 of them"),
    ],
)
def test_what_cannot_be_is_refused(method: str | None, options: dict, rate: Any, message: str) -> None:
    """All three ways raise an error with the reason and leave the model unchanged."""
    model = make(method, **options)
    before = model.config.to_dict()
    for call in (
        lambda: model.set_keep_rate(rate),
        lambda: model(images(), keep_rate=rate),
        lambda: model.vit(images(), keep_rate=rate),
        lambda: token_schedule(model.config, keep_rate=rate),
    ):
        with pytest.raises(ValueError, match=f"`keep_rate`.*{message}"):
            call()
    assert model.config.to_dict() == before


# Training one model for several.


def test_draws_are_even_and_repeat() -> None:
    """Each rate is drawn once in every three steps, in an order that depends only on seed and step."""
    draws = [draw_keep_rate(RATES, seed=1, step=step) for step in range(300)]
    assert draws == [draw_keep_rate(RATES, seed=1, step=step) for step in range(300)]
    assert all(sorted(draws[i : i + 3]) == RATES for i in range(0, 300, 3))
    assert len({tuple(draws[i : i + 3]) for i in range(0, 300, 3)}) == 6  # every order
    assert draws != [draw_keep_rate(RATES, seed=2, step=step) for step in range(300)]
    with pytest.raises(ValueError, match="`rates`"):
        draw_keep_rate([], 1, 1)


def train(model: CLCAViTForImageClassification, rates: list[float], steps: int = 12) -> None:
    """Run training steps on new images without changing weights: only the statistics of BatchNorm change."""
    model.train()
    for step in range(steps):
        with torch.no_grad():
            model(images(8, seed=step), labels=labels(8), keep_rate=draw_keep_rate(rates, 0, step))
    model.eval()


def test_statistics_are_kept_apart() -> None:
    """After steps at alternating rates, the statistics of a rate equal those of a plain BatchNorm trained at that rate
    only."""
    model = make(keep_rate=1.0, train_keep_rates=RATES)
    train(model, RATES)
    head = model.classifier
    for row, rate in enumerate(RATES):
        single = make(keep_rate=rate)
        weights = {k: v for k, v in model.state_dict().items() if "rate_" not in k}
        single.load_state_dict(weights, strict=False)
        single.train()
        with torch.no_grad():
            for step in range(12):
                if draw_keep_rate(RATES, 0, step) == rate:
                    single(images(8, seed=step), labels=labels(8))
        for ours, plain in ((head.norm_in, single.classifier.norm_in), (head.norm_out, single.classifier.norm_out)):
            assert torch.allclose(ours.rate_mean[row], plain.running_mean, atol=1e-9)
            assert torch.allclose(ours.rate_var[row], plain.running_var, atol=1e-9)
        assert torch.allclose(logits_of(model, keep_rate=rate), logits_of(single.eval()), atol=1e-9)
    assert not torch.allclose(head.norm_in.rate_mean[0], head.norm_in.rate_mean[2])


def test_statistics_between_rates() -> None:
    """They are interpolated linearly in the logarithm of the rate; outside the range the nearest are used. For rates
    per stage, their geometric mean is used."""
    norm = SwitchableBatchNorm(2, [0.25, 1.0]).double().eval()
    norm.rate_mean.copy_(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    norm.rate_var.copy_(torch.tensor([[1.0, 1.0], [3.0, 9.0]]))
    assert torch.equal(norm.at(0.5, norm.rate_mean), torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert torch.equal(norm.at(0.25, norm.rate_mean), norm.rate_mean[0])
    assert torch.equal(norm.at(1.0, norm.rate_mean), norm.rate_mean[1])
    assert torch.equal(norm.at(0.1, norm.rate_mean), norm.rate_mean[0])
    tokens = torch.randn(4, 2, dtype=torch.float64)
    expected = (tokens - torch.tensor([1.0, 3.0])) / (torch.tensor([2.0, 5.0]) + norm.eps).sqrt()
    assert torch.allclose(norm(tokens, 0.5), expected)
    model = make(keep_rate=1.0, train_keep_rates=[0.25, 1.0])
    train(model, [0.25, 1.0])
    seen: list[float] = []
    model.classifier.norm_in.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    logits_of(model, keep_rate=[1.0, 0.25])
    assert seen == pytest.approx([0.5])


def test_at_one_rate_it_is_a_batch_norm() -> None:
    """Outputs, gradients and statistics equal those of `nn.BatchNorm1d`."""
    own, plain = SwitchableBatchNorm(6, [0.5]), nn.BatchNorm1d(6)
    assert (own.eps, own.momentum) == (plain.eps, plain.momentum)
    results = []
    for norm, arguments in ((own, (0.5,)), (plain, ())):
        tokens = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        norm(tokens, *arguments).square().sum().backward()
        results.append((tokens.grad, norm.weight.grad, norm.bias.grad, norm.eval()(tokens, *arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(own.rate_mean[0], plain.running_mean)
    assert torch.equal(own.rate_var[0], plain.running_var)


def test_it_learns_all_budgets() -> None:
    """After sixty steps at drawn rates, four images are classified correctly at each of these rates and in between."""
    model = make(train_keep_rates=RATES, initializer_range=0.05).float().train()
    pixels, targets = images(4).float(), labels(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        loss = model(pixels, labels=targets, keep_rate=draw_keep_rate(RATES, 0, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():  # the last weights have been seen twenty times fewer than the first
        if isinstance(module, SwitchableBatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        for rate in RATES:
            model(pixels, keep_rate=rate)
    model.eval()
    for rate in (*RATES, 0.7):
        assert torch.equal(model(pixels, keep_rate=rate).logits.argmax(dim=1), targets), rate


def test_training_at_a_rate_without_statistics_is_refused() -> None:
    model = make(train_keep_rates=[0.25, 0.5]).train()
    with pytest.raises(ValueError, match=r"`train_keep_rates` \[0\.25, 0\.5\].*got 1\.0"):
        model(images())
    model.eval()
    assert model(images()).logits.isfinite().all()


def test_a_model_for_several_keep_rates_is_saved_completely(tmp_path: Path) -> None:
    model = make(keep_rate=0.5, train_keep_rates=RATES)
    train(model, RATES)
    model.save_pretrained(tmp_path)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.train_keep_rates == RATES
    for rate in (*RATES, 0.4):
        assert torch.equal(logits_of(loaded, keep_rate=rate), logits_of(model, keep_rate=rate))


def test_from_a_model_of_one_rate(tmp_path: Path) -> None:
    """Its weights are loaded. The statistics start as in a new BatchNorm and must be collected again."""
    model = make(keep_rate=0.5)
    train(model, [0.5])
    model.save_pretrained(tmp_path)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, train_keep_rates=RATES, dtype=torch.float64)
    assert torch.equal(loaded.classifier.out_proj.weight, model.classifier.out_proj.weight)
    norm = loaded.classifier.norm_in
    assert torch.equal(norm.weight, model.classifier.norm_in.weight)
    assert not norm.rate_mean.any()
    assert (norm.rate_var == 1).all()


@pytest.mark.parametrize("head", ["linear", "cla", "h2t"])
def test_checkpointing_recomputes_at_the_same_rate(head: str) -> None:
    model = make("topk", head=head, train_keep_rates=RATES, drop_path_rate=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": False})
        model.zero_grad()
        model(images(4), labels=labels(4), keep_rate=0.25).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(*gradients, strict=True))


def test_dynamic_vit_aims_at_the_rate_it_is_given() -> None:
    """The targets of its ratio loss follow the rate of the forward pass. Explicit targets only apply to the
    configuration's own rate."""
    model = make("dyvit", keep_rate=0.5, reduction_kwargs={"ratio_targets": [0.9, 0.8]}).train()
    losses = {}
    for rate in (None, 0.5, 0.25):
        torch.manual_seed(0)
        output = model(images(4), labels=labels(4), keep_rate=rate)
        shares = torch.stack([decision.mean(dim=1) for decision in output.reports["decision"]])
        targets = {None: [0.9, 0.8], 0.5: [0.9, 0.8], 0.25: [0.25, 0.0625]}[rate]
        expected = 2 * (shares - torch.tensor(targets)[:, None]).square().mean()
        assert output.loss_terms["keep_ratio"].item() == pytest.approx(expected.item())
        losses[rate] = output.loss_terms["keep_ratio"]
    assert losses[0.25] != losses[0.5]
    model.set_keep_rate(0.25)
    assert model.config.reduction_kwargs is None


# The configuration.


def test_rates_are_stored_in_order() -> None:
    assert tiny_config(reduction="topk", train_keep_rates=(1.0, 0.25, 0.5, 0.25)).train_keep_rates == RATES
    assert dense_config(tiny_config(reduction="topk", train_keep_rates=RATES)).train_keep_rates is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_keep_rates": RATES}, "without a `reduction`"),
        ({"reduction": "sit", "train_keep_rates": RATES}, "are parameters"),
        ({"reduction": "topk", "train_keep_rates": []}, "at least one"),
        ({"reduction": "topk", "train_keep_rates": [0.5, 2.0]}, r"in \(0, 1\]"),
        ({"reduction": "topk", "train_keep_rates": [0.5], "keep_tokens": [4, 2]}, "`keep_tokens`"),
        ({"reduction": "topk", "train_keep_rates": ["a"]}, "must be"),
    ],
)
def test_rates_to_train_for_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(**options)
    assert "`train_keep_rates`" in str(error.value)
