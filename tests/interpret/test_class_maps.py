"""Tools that hook into layers: the hook points, and Grad-CAM on a model whose tokens move."""

import re

import pytest
import torch

from clca import CLCAViTBackbone, token_schedule
from tests.helpers import METHODS, Case, images, tiny_model
from tests.interpret.helpers import table
from ufgir.interpret import LogitsOnly, PatchGrid, class_activation_maps
from ufgir.interpret.tracing import trace_patches, unmerge


HOOKED = [Case(method, "clca", "cls") for method in METHODS] + [
    Case("evit", "plain", "no_cls"),
    Case("ats", "cache", "registers"),
]


@pytest.mark.parametrize("case", table(HOOKED), ids=str)
def test_hook_points_have_the_tokens_that_leave_their_layers(case) -> None:
    """One tensor each, the recorded hidden states; what a hook returns takes its place; no logit moves."""
    model = case.model()
    plain = model(images()).logits
    seen = []
    hooks = [layer.tokens.register_forward_hook(lambda *call: seen.append(call[2])) for layer in model.vit.layers]
    output = model(images(), output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(seen, output.hidden_states[1:], strict=True))
    assert torch.allclose(output.logits, plain, atol=1e-9)
    seen.clear()
    assert torch.allclose(model(images()).logits, plain, atol=1e-9)
    assert seen[-1].shape[1] == output.token_counts[-1]  # nothing is left out in the last layer while somebody looks
    for hook in hooks:
        hook.remove()
    model.vit.layers[3].tokens.register_forward_hook(lambda *call: 2 * call[2])
    assert not torch.allclose(model(images()).logits, plain, atol=1e-4)


def test_hook_points_add_no_weights() -> None:
    assert not any("tokens" in name.split(".")[2:] for name in tiny_model().state_dict() if ".layers." in name)


def test_a_hook_point_of_the_original_vqt_has_the_tokens_alone() -> None:
    model = tiny_model(head="vqt", vqt_original_slicing=True)
    seen = []
    model.vit.layers[1].tokens.register_forward_hook(lambda *call: seen.append(call[2].shape))
    model(images())
    assert seen == [(3, 17, 16)]


class Gatherer:
    """Calls a transform as pytorch-grad-cam does: on the output of each target in the forward, and on its gradient."""

    def __init__(self, targets, transform) -> None:
        self.activations, self.gradients = [], []
        self.transform = transform
        for target in targets:
            target.register_forward_hook(self.look)

    def look(self, module, args, output) -> None:
        self.activations.append(self.transform(output).detach())
        output.register_hook(lambda gradient: self.gradients.insert(0, self.transform(gradient)))


@pytest.mark.parametrize("case", table(HOOKED), ids=str)
def test_tokens_and_gradients_lie_on_the_grid(case) -> None:
    """According to the shares of a trace, in every layer, also if several layers have the same number of tokens."""
    model = case.model()
    layers, kept = [0, 2, 3], {}
    grid = PatchGrid(model)
    gatherer = Gatherer([model.vit.layers[index].tokens for index in layers], grid)
    for index in layers:
        model.vit.layers[index].tokens.register_forward_hook(
            lambda *call, index=index: kept.setdefault(index, call[2])
        )
    output = model(images(2, 24, 40), interpolate_pos_encoding=True)
    logits = output.logits[:, 1].sum()
    slopes = torch.autograd.grad(logits, [kept[index] for index in layers], retain_graph=True)
    gatherer.gradients.clear()
    logits.backward()
    if case.method is None:
        shares = [torch.eye(15).expand(2, -1, -1)] * 5
        shares = [torch.nn.functional.pad(s, (0, 0, 1, kept[0].shape[1] - 16)) for s in shares]
        shares = [
            torch.nn.functional.pad(s, (0, 0, 0, kept[i].shape[1] - s.shape[1])) if i in kept else s
            for i, s in enumerate(shares)
        ]
    else:
        shares = trace_patches(output.assignments or (), model.config, 15, retrieve=False).left
    for index, activation, gradient, slope in zip(
        layers, gatherer.activations, gatherer.gradients, slopes, strict=True
    ):
        for found, tensor in ((activation, kept[index]), (gradient, slope)):
            expected = unmerge(tensor, shares[index]).transpose(1, 2).unflatten(2, (3, 5))
            assert torch.allclose(found, expected, atol=1e-9)


def test_close_removes_the_hooks() -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5)
    with PatchGrid(model) as grid:
        assert model(images()).assignments is not None
        assert grid(torch.ones(3, token_schedule(model.config).after[-1], 2)).shape == (3, 2, 4, 4)
    assert model(images()).assignments is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.vit.layers.modules())
    with pytest.raises(ValueError, match="`PatchGrid`"):
        grid(torch.ones(3, 17, 2))


def test_other_tensors_are_refused() -> None:
    model = CLCAViTBackbone(tiny_model(reduction="evit", keep_rate=0.5).config).double()
    with PatchGrid(model) as grid:
        model(images())
        for wrong in (torch.ones(3, 17, 2), torch.ones(3, 2)):
            with pytest.raises(ValueError, match=re.escape("`tensor` must hold the tokens of layer 4, (3, ")):
                grid(wrong)


def test_a_class_activation_map_by_hand() -> None:
    """Without a reduction, channels are weighted by their mean gradient over the patches."""
    model = tiny_model(pooling="mean")
    kept = []
    hook = model.vit.layers[2].tokens.register_forward_hook(lambda *call: kept.append(call[2]))
    logits = model(images()).logits
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept)
    hook.remove()
    patches, slopes = kept[0][:, 1:], gradient[:, 1:]
    expected = (patches * slopes.mean(dim=1, keepdim=True)).sum(dim=-1).clamp(min=0)
    maps = class_activation_maps(model.requires_grad_(False).train(), images(), 1, [2])
    assert torch.allclose(maps, expected.unsqueeze(1), atol=1e-9) and (maps > 0).any()
    assert model.training and not any(layer.tokens._forward_hooks for layer in model.vit.layers)
    predicted = class_activation_maps(model, images(), layers=[2, 4])
    assert torch.equal(predicted, class_activation_maps(model, images(), logits.argmax(dim=1).tolist(), [2, 4]))
    for wrong in (3, [0, 1]):
        with pytest.raises(ValueError, match=r"`target` must be a class in 0 \.\. 2"):
            class_activation_maps(model, images(), wrong)


def test_dropped_patches_are_zero() -> None:
    model = tiny_model(reduction="topk", keep_rate=0.5)
    maps = class_activation_maps(model, images())
    assignments = model(images(), output_assignments=True).assignments
    held = trace_patches(assignments, model.config).left[3].sum(dim=1) > 0
    assert (maps[:, 0][~held] == 0).all() and (maps[:, 0][held] > 0).any() and not held.all()


def test_logits_only() -> None:
    model = tiny_model()
    assert torch.equal(LogitsOnly(model)(images()), model(images()).logits)


def test_pytorch_grad_cam_agrees() -> None:
    """Its maps, before scaling to the image size, are equal to ours."""
    package = pytest.importorskip("pytorch_grad_cam")
    model = tiny_model(reduction="tome", keep_rate=0.5, cross_layer_cache=True)
    layers = [1, 3]
    with (
        PatchGrid(model) as grid,
        package.GradCAM(
            LogitsOnly(model), [model.vit.layers[i].tokens for i in layers], reshape_transform=grid
        ) as cam,
    ):
        cam(images(), None)
        seen, slopes = cam.activations_and_grads.activations, cam.activations_and_grads.gradients
        theirs = [
            torch.as_tensor(cam.get_cam_image(None, None, None, a.numpy(), g.numpy()))
            for a, g in zip(seen, slopes, strict=True)
        ]
    ours = class_activation_maps(model, images(), layers=layers).unflatten(2, (4, 4))
    for index, heat in enumerate(theirs):
        assert torch.allclose(ours[:, index], heat.clamp(min=0), atol=1e-9)


def test_captum_attributions_add_up() -> None:
    """Integrated gradients of the tokens after all stages, relative to a black image, sum to the change of the logit. The tokens in captum
    are those that leave the layer."""
    attr = pytest.importorskip("captum.attr")
    model = tiny_model(reduction="evit", keep_rate=0.5, reduction_layers=[0, 1], cross_layer_cache=True)
    point, classifier = model.vit.layers[3].tokens, LogitsOnly(model)
    found = attr.LayerIntegratedGradients(classifier, point).attribute(images(), target=1, n_steps=100)
    activation = attr.LayerActivation(classifier, point)
    with torch.no_grad():
        recorded = model(images(), output_hidden_states=True).hidden_states[4]
        assert torch.allclose(activation.attribute(images()), recorded, atol=1e-9)
        start = activation.attribute(torch.zeros_like(images()))
        hook = point.register_forward_hook(lambda *call: start)
        change = classifier(images())[:, 1]
        hook.remove()
        change = classifier(images())[:, 1] - change
    assert found.shape == start.shape
    assert torch.allclose(found.sum(dim=(1, 2)), change, atol=1e-3) and change.abs().max() > 0.1
