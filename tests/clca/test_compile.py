"""torch.compile compiles every method into one graph for all batch sizes, without graph breaks, in evaluation and
training.
"""

import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from clca import CLCAViTForImageClassification
from tests.helpers import FIRST_OF_FAMILIES, METHODS, images, labels, slow_unless, tiny_model


CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
SMALL = {"num_hidden_layers": 2, "reduction_layers": [0]}
# ATS keeps as many tokens as the image asks for; padded to its bound its shapes are static, too. ToFu would only drop tokens.
OPTIONS = {"ats": {"pad_to_bound": True}, "tofu": {"merge_from": 0}}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "disabled", True
    )  # pytest would keep thousands of its records
    torch._dynamo.reset()
    counters.clear()


def make(method: str | None, **options: Any) -> CLCAViTForImageClassification:
    reduction = {"reduction": method, "keep_rate": 0.5, "reduction_kwargs": OPTIONS.get(method)} if method else {}
    return tiny_model(**SMALL | CLCA | reduction | options)


def compiled(model: torch.nn.Module, backend: str = "eager") -> Any:
    """Compile with `fullgraph=True` and the backend `eager`, which executes the traced graph unchanged: only tracing
    is tested."""
    return torch.compile(model, fullgraph=True, backend=backend)


def batch(count: int, seed: int = 1) -> torch.Tensor:
    """Return images whose number is not a constant for the compiler."""
    pixels = images(count, seed=seed)
    torch._dynamo.mark_dynamic(pixels, 0)
    return pixels


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", slow_unless(FIRST_OF_FAMILIES.__contains__, METHODS), ids=str)
def test_one_graph_for_every_batch_size(method: str | None) -> None:
    model = make(method)
    fast = compiled(model)
    with torch.no_grad():
        for count in (3, 5, 2):
            pixels = batch(count, seed=count)
            assert (fast(pixels).logits - model(pixels).logits).abs().max() <= 1e-10
            assert graphs() == 1


# The other methods' graphs are those of evaluation, and autograd through their operations is that of every training.
@pytest.mark.parametrize("method", slow_unless([None, "ats", "dyvit", "sit", "tome"].__contains__, METHODS), ids=str)
def test_one_graph_for_a_training_step(method: str | None) -> None:
    """Loss and gradients are equal, including ahead-of-time autograd."""
    model = make(method).train()
    fast = compiled(model, "aot_eager")
    results = []
    for forward in (fast, model):
        model.zero_grad()
        torch.manual_seed(3)  # DynamicViT draws
        for norm in (model.classifier.norm_in, model.classifier.norm_out):
            norm.reset_running_stats()
        loss = forward(pixel_values=images(4), labels=labels(4)).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert graphs() == 1
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", slow_unless(["topk", "heuristic"].__contains__, ["topk", "ats", "heuristic"]))
def test_a_graph_for_every_budget(method: str) -> None:
    """Shapes and masks depend on the keep rate, so each new rate compiles one more graph. A previous rate compiles
    none."""
    model = make(method, train_keep_rates=[0.25, 0.5, 1.0])
    fast = compiled(model)
    with torch.no_grad():
        for number, rate in enumerate((0.25, 1.0), start=1):
            assert (
                fast(batch(3), keep_rate=rate).logits - model(images(), keep_rate=rate).logits
            ).abs().max() <= 1e-10
            assert graphs() == number
        fast(batch(2), keep_rate=0.25)
        assert graphs() == 2


def test_the_default_compiler_says_the_same() -> None:
    """The default backend of `torch.compile(model)` returns the same logits."""
    model = make("evit").float()
    with torch.no_grad():
        pixels = images(2).float()
        assert (torch.compile(model, fullgraph=True)(pixels).logits - model(pixels).logits).abs().max() <= 1e-4


def test_shortcuts_are_compiled_too() -> None:
    """Skipped computations are not in the graph. Hooks, which the compiler does not trace, do not bring them back."""
    model, seen = make("evit"), []
    fc2 = model.vit.layers[-1].mlp.fc2
    forward = fc2.forward
    fc2.forward = lambda tokens: seen.append(tokens.shape[1]) or forward(tokens)
    with torch.no_grad():
        compiled(model)(images())
    assert seen == [1]


def test_clusters_are_one_operator() -> None:
    """ATC would otherwise have 40 operators for each token it merges: at 448 px too many to compile."""
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = make("atc", keep_rate=0.1)
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend=backend)(images(2)).logits
        assert (logits - model(images(2)).logits).abs().max() <= 1e-10
    assert sum("first_members" in name for name in operators) == 1


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch does not tell strict export and compiling apart")
def test_strict_export_has_no_operator_of_this_package() -> None:
    program = torch.export.export(make("atc"), (), {"pixel_values": images(2)}, strict=True)
    assert not [node for node in program.graph.nodes if "first_members" in str(node.target)]
