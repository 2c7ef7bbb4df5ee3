"""OpenVINO files: the same answers, int8 where it should be, and a sentence where a package is missing."""

import json
import logging
import re
import sys

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from tests.export.helpers import small_model
from tests.helpers import images
from ufgir.cli import entry as cli
from ufgir.export import Exporter, export_model
from ufgir.utils.extras import install_command


WIDE = {"hidden_size": 64, "intermediate_size": 256}


def installed():
    """OpenVINO and NNCF, or skip."""
    pytest.importorskip("nncf", reason="NNCF is not installed: make openvino", exc_type=ImportError)
    return pytest.importorskip("openvino", reason="OpenVINO is not installed: make openvino", exc_type=ImportError)


def run(openvino, path, pixels):
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([pixels.numpy()])[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "evit", "tome"], ids=str)
def test_openvino_gives_the_logits_of_the_model(method, tmp_path):
    """In float32, for other images and batch sizes than the export compared; the files hold facts about the model."""
    openvino = installed()
    model, path = small_model(method), tmp_path / "model.xml"
    exported = export_model(model, path, {"source": "here"})
    for count in (1, 2, 5):
        pixels = images(count, seed=count + 10).float()
        torch.testing.assert_close(run(openvino, path, pixels), model(pixels).logits, atol=1e-5, rtol=1e-4)
    assert exported.difference < 1e-5 and exported.not_in_tensorrt == [] and exported.operators["Convolution"] > 0
    stored = openvino.Core().read_model(path)
    facts = {name: json.loads(stored.get_rt_info(["clca", name]).value) for name in ("keep_rate", "source", "check")}
    assert facts == {"keep_rate": model.config.keep_rate, "source": "here", "check": exported.check._asdict()}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "evit"], ids=str)
def test_int8_of_openvino(method, tmp_path):
    """Linear layers in int8; patch embedding, reductions and head not."""
    openvino = installed()
    exporter = Exporter(small_model(method, **WIDE))
    batches = [images(4, seed=3).float(), images(4, seed=4).float()]
    logger, handler = logging.getLogger("nncf"), logging.NullHandler()
    logger.addHandler(handler)  # as a program may have added
    try:
        made = exporter.write(tmp_path / "int8.xml", precision="int8", calibration=batches)
        assert handler.level == logging.NOTSET and logger.level != logging.ERROR
    finally:
        logger.removeHandler(handler)
    whole = exporter.write(tmp_path / "float32.xml", images=batches)
    spread = float(torch.cat([exporter.program(pixels) for pixels in batches]).std())
    assert made.check.images == whole.check.images == 8
    assert whole.difference < 1e-4 * spread < made.difference < spread  # rounding may drop other tokens
    assert made.int8_operators["FullyConnected"] >= 10 and "Convolution" not in made.int8_operators
    assert made.float_operators["Convolution"] >= 1
    sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("int8", "float32")]
    assert sizes[0] < 0.5 * sizes[1]
    torch.testing.assert_close(
        run(openvino, tmp_path / "float32.xml", batches[0]), exporter.program(batches[0]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """`ufgir export --precision int8` with images; what is printed says what was compared and what stayed in float."""
    installed()
    small_model("evit", **WIDE).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    (tmp_path / "leaves").mkdir()
    for index in range(6):
        Image.new("RGB", (40, 40), (40 * index, 90, 30)).save(tmp_path / "leaves" / f"{index}.png")
    argv = ["export", str(tmp_path / "model"), "--precision", "int8", "--calibration", str(tmp_path / "leaves")]
    for name, kept in (("model.xml", "MVN"), ("model.onnx", "Softmax")):
        path = tmp_path / name
        assert cli.main([*argv, "--calibration-images", "4", "--output", str(path)]) == 0
        said = capsys.readouterr().out
        assert str(path) in said and "of 4" in said and "the given images" in said
        assert kept in said[said.index("stayed in floating point") :]


@pytest.mark.parametrize(
    "package, suffix, precision, extra",
    [
        ("openvino", ".xml", "float32", "openvino"),
        ("nncf", ".xml", "int8", "openvino"),
        ("onnx", ".onnx", "float32", "export"),
    ],
)
def test_a_missing_package_is_named(package, suffix, precision, extra, tmp_path, monkeypatch):
    if precision == "int8":
        installed()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=re.escape(f"package {package}: {install_command(extra)}")):
        export_model(
            small_model(None), tmp_path / f"model{suffix}", precision=precision, calibration=[images().float()]
        )
    assert list(tmp_path.iterdir()) == []


def test_int8_of_openvino_needs_images(tmp_path, monkeypatch):
    for package in ("openvino", "nncf"):
        monkeypatch.setitem(sys.modules, package, sys)  # any module will do
    with pytest.raises(ValueError, match=r"`precision`='int8' of an \.xml file requires `calibration`"):
        export_model(small_model(None), tmp_path / "model.xml", precision="int8")
