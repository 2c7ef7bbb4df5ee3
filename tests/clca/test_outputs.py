"""Outputs as used by clients that do not know this model: pipelines, exporters, tracers, replicas."""

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from PIL import Image
from torch.nn.parallel import scatter_gather
from transformers import ViTImageProcessorPil, pipeline

from clca import CLCAViTForImageClassification, CLCAViTModel, token_schedule
from tests.helpers import METHODS, VARIANTS, images, slow_unless, tiny_model, variant_model


BATCH = 40  # more images than layers
MODELS = [*VARIANTS, "keep_rates"]
STATIC = {"ats": {"reduction_kwargs": {"pad_to_bound": True}}}  # ATS keeps another number of tokens of each image


def model_of(name: str) -> CLCAViTForImageClassification:
    if name == "keep_rates":
        return tiny_model(reduction="evit", keep_rate=0.5, head="cla", train_keep_rates=[0.25, 0.5]).float()
    return variant_model(name)


def fields_of(output: Any) -> dict[str, Any]:
    return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_fields_have_the_batch_first(name: str, training: bool) -> None:
    """Without labels, every field of the classifier's and the backbone's output is None or a tensor with the batch
    first."""
    model = model_of(name).train(training)
    for part in (model, model.vit):
        with torch.no_grad():
            output = part(images(4).float())
        for field, value in fields_of(output).items():
            if training and field in ("loss_terms", "auxiliary_loss", "reports"):
                continue
            assert value is None or (isinstance(value, torch.Tensor) and value.shape[0] == 4), field
        assert "token_counts" not in output and "token_counts" not in fields_of(output)
        assert len(output.token_counts) == model.config.num_hidden_layers + 1


def test_what_was_asked_for_is_there() -> None:
    model = model_of("evit")
    output = model(images().float(), output_assignments=True, output_hidden_states=True)
    assert len(output.assignments) == 2 and len(output.hidden_states) == 6
    quiet = model(images().float())
    assert quiet.assignments is None and quiet.reports is None and quiet.hidden_states is None


# `token_counts`


def test_token_counts_are_kept() -> None:
    """Copies, pickles and the compiler preserve them."""
    model = model_of("evit")
    with torch.no_grad():
        output = model(images().float())
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images().float())
    expected = tuple(token_schedule(model.config).before)
    kept = [output, copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output)), compiled]
    assert [other.token_counts for other in kept] == [expected] * len(kept)
    assert model(images().float(), return_dict=True).token_counts == expected


def test_moved() -> None:
    """Tensors at any depth are moved, and additional attributes are kept."""
    model = model_of("dyvit").train().requires_grad_(False)
    output = model(images().float(), labels=torch.tensor([0, 1, 2]), output_assignments=True)
    moved = output.to(torch.float64)
    assert type(moved) is type(output) and list(moved) == list(output)
    assert moved.token_counts == output.token_counts
    assert moved.logits.dtype == moved["logits"].dtype == moved.assignments[0].dtype == torch.float64
    assert moved.reports["decision"][0].dtype == moved.loss_terms["keep_ratio"].dtype == torch.float64
    assert output.logits.dtype == output.reports["decision"][0].dtype == torch.float32


def test_token_counts_are_lost() -> None:
    """If an output is rebuilt from its fields, they are None and there is no error. `TokenCounts` documents these
    cases."""
    model = model_of("evit").requires_grad_(False)
    assert convert_outputs_to_fp32(model.forward)(images().float()).token_counts is None
    assert torch.utils._pytree.tree_map(lambda x: x, model(images().float())).token_counts is None
    assert isinstance(model(images().float(), return_dict=False), tuple)


def test_no_dictionaries_by_configuration() -> None:
    """`return_dict=False` in the configuration only affects the output of the outermost model."""
    model = model_of("evit")
    expected = model(images().float()).logits
    model.config.return_dict = False
    (logits,) = model(images().float())
    assert torch.equal(logits, expected)


# Clients.


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    torch.manual_seed(0)
    return [Image.effect_noise((36, 40), 40 + i).convert("RGB") for i in range(BATCH)]


@pytest.mark.parametrize("name", MODELS)
def test_pipelines(name: str, photos: list[Image.Image]) -> None:
    """Both tasks give the same results for a batch, larger than the number of layers, as for single images."""
    model, processor = model_of(name), ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=model, image_processor=processor)
    together = classify(photos, batch_size=BATCH, top_k=3)
    assert len(together) == BATCH
    for index in (0, BATCH - 1):
        alone = {row["label"]: row["score"] for row in classify(photos[index], top_k=3)}
        assert {row["label"]: row["score"] for row in together[index]} == pytest.approx(alone, abs=1e-5)
    embed = pipeline("image-feature-extraction", model=model.vit, image_processor=processor)
    features = embed(photos, batch_size=BATCH)
    assert len(features) == BATCH
    alone = torch.tensor(embed(photos[-1]))
    tokens = torch.tensor(features[-1])[:, : alone.shape[1]]  # ATS pads to the longest of the batch
    assert torch.allclose(tokens[:, 0], alone[:, 0], atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    "name", slow_unless({"evit", "tome"}.__contains__, [name for name in MODELS if name != "ats"])
)
def test_traced(name: str, grad: bool) -> None:
    """`torch.jit.trace` of the unwrapped model passes its own check and works on other images."""
    model, pixels, others = model_of(name), images(2).float(), images(2, seed=5).float()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants
        traced = torch.jit.trace(model, pixels, strict=False)
        assert torch.allclose(traced(others)["logits"], model(others).logits, atol=1e-5)
        assert "gelu_(" not in str(traced.inlined_graph)
        model.config.return_dict = False
        (logits,) = torch.jit.trace(model, pixels)(others)
        model.config.return_dict = True
        assert torch.allclose(logits, model(others).logits, atol=1e-5)


def in_place_is_used(model: CLCAViTForImageClassification) -> bool:
    with torch.profiler.profile() as profile, torch.no_grad():
        model(images(2).float())
    return any(event.name == "aten::gelu_" for event in profile.events())


def test_in_place_functions_come_back_after_a_trace() -> None:
    model = model_of("evit")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, images(2).float(), strict=False)
    assert in_place_is_used(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "tome", METHODS), ids=str)
def test_exported_to_onnx(name: str | None, tmp_path: Path) -> None:
    """`torch.onnx.export` of the unwrapped model works; the graph has one output, the logits."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = VARIANTS[str(name)] | STATIC.get(str(name), {})
    model, pixels = tiny_model(**options).float(), images(2).float()
    torch.onnx.export(model, (pixels,), tmp_path / "model.onnx", input_names=["pixel_values"], verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (logits,) = session.run(None, {"pixel_values": images(2, seed=5).float().numpy()})
    with torch.no_grad():
        expected = model(images(2, seed=5).float()).logits
    assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "ats"])
def test_data_parallel(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.DataParallel` gathers the outputs of its replicas, including the loss. (torch's own gathering
    needs GPUs.)"""

    class Gather:
        @staticmethod
        def apply(device: Any, dim: int, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([t[None] if t.dim() == 0 else t for t in tensors], dim)

    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    model = model_of(name).train(training)
    halves = [model(half, labels=torch.tensor([0, 1])) for half in images(4).float().split(2)]
    whole = scatter_gather.gather(halves, "cpu")
    assert type(whole) is type(halves[0])
    assert whole.logits.shape == (4, 3) and whole.loss.shape == (2,)
    assert whole.token_counts is None
    backbone = scatter_gather.gather([model.vit(half) for half in images(4).float().split(2)], "cpu")
    assert isinstance(model.vit, CLCAViTModel) and len(backbone.last_hidden_state) == 4
