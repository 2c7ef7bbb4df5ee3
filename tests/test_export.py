"""Exported files say what the model says, for every method, with cache and CLA head."""

import json

import onnx
import onnxruntime
import pytest
import torch
from transformers import ViTImageProcessorPil

from clca import CLCAViTForImageClassification
from tests.helpers import CACHES, METHODS, TINY, build, images, slow_unless, tiny_config
from tests.limits import small_files
from ufgir import export
from ufgir.cli import entry as cli
from ufgir.export import TENSORRT_OPERATORS, export_model
from ufgir.utils.files import DiskFull


SHORT = TINY | {"num_hidden_layers": 3, "reduction_layers": [1]}  # an export takes seconds, most of them per layer


# ATS keeps as many rows as the image asks for; padded to its bound its shapes are static, too. ToFu would only drop tokens.
OPTIONS = {"ats": {"pad_to_bound": True}, "tofu": {"merge_from": 0}}


def small_model(method, **changes):
    options = SHORT | CACHES["clca"]
    if method is not None:
        options |= {"reduction": method, "keep_rate": 0.5}
    options |= {"reduction_kwargs": OPTIONS.get(method)}
    return build(tiny_config(**options | changes)).float()


SCATTERS = {
    "tome": ["ScatterElements (add)"],
    "atc": ["ScatterElements (add)"],
    "mctf": ["ScatterElements (add)"],
    "pitome": ["ScatterElements (add)"],
    "tofu": ["ScatterElements (add)", "ScatterElements (max)"],
    "dpcknn": ["ScatterElements (add)", "ScatterElements (max)"],
    "kmedoids": ["ScatterElements (min)"],
}


# Pads, and a method with scatters and gathers. The others use the same operators.
@pytest.mark.parametrize("method", slow_unless(["ats", "dpcknn"].__contains__, METHODS), ids=str)
def test_onnx_says_what_the_model_says(method, tmp_path):
    """Other images and batch sizes than those that the export itself compared."""
    model, path = small_model(method), tmp_path / "model.onnx"
    exported = export_model(model, path, {"source": "here"})
    session = onnxruntime.InferenceSession(path)
    for count in (1, 2, 5):
        pixels = images(count, seed=count + 10).float()
        (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(pixels).logits, atol=1e-5, rtol=1e-4)
    assert exported.difference < 1e-5 and exported.not_in_tensorrt == []
    assert exported.doubtful_in_tensorrt == SCATTERS.get(method, [])
    facts = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props if p.key in ("keep_rate", "source")}
    assert facts == {"keep_rate": model.config.keep_rate, "source": "here"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # nothing half-written beside it


@pytest.mark.parametrize("method", slow_unless("tome".__eq__, ["evit", "tome"]))  # evit is the command's, below
def test_torch_program_says_what_the_model_says(method, tmp_path):
    model, path = small_model(method), tmp_path / "model.pt2"
    export_model(model, path)
    facts = {"class_names": "", "reduction": ""}
    program = torch.export.load(path, extra_files=facts).module()
    pixels = images(4).float()
    torch.testing.assert_close(program(pixels), model(pixels).logits)
    assert json.loads(facts["reduction"]) == method and len(json.loads(facts["class_names"])) == 3


def test_the_model_stays_as_it_was(tmp_path):
    model = small_model("topk").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, tmp_path / "model.pt2")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_full_disk(tmp_path, suffix):
    """One sentence that names the file; torch itself would end the process, with a trace of C++."""
    path = tmp_path / f"model{suffix}"
    path.write_text("of an earlier model")
    with small_files(20_000), pytest.raises(DiskFull) as refused:
        export_model(small_model("evit"), path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "of an earlier model"


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch):
    def write(program, path, facts):
        path.write_bytes(b"nonsense")
        return lambda pixels: program(pixels) + 0.1, {}

    monkeypatch.setattr(export, "_write_torch", write)
    (tmp_path / "model.pt2").write_text("the one from yesterday")
    with pytest.raises(ValueError, match=r"differs from the model by 1\.0e-01 .* not written"):
        export_model(small_model(None), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "the one from yesterday"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "method, changes, name, words",
    [
        ("ats", {"reduction_kwargs": None}, "model.onnx", '{"pad_to_bound": true}'),
        ("atc", {"image_size": 136}, "model.onnx", "289"),
        (None, {}, "model.tflite", "must end in .onnx or .pt2"),
    ],
)
def test_what_cannot_be_exported_is_refused(method, changes, name, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        export_model(small_model(method, **changes), tmp_path / name)
    assert words in str(caught.value) and list(tmp_path.iterdir()) == []


def test_command_writes_a_file_per_budget(tmp_path, capsys):
    model = small_model("evit")
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    output = tmp_path / "files" / "leaves.pt2"
    argv = ["export", str(tmp_path / "model"), "--output", str(output)]
    assert cli.main([*argv, "--keep-rates", "0.25", "0.75"]) == 0
    said = capsys.readouterr().out
    for rate in (0.25, 0.75):
        path = output.with_name(f"leaves-keep{rate}.pt2")
        facts = {"keep_rate": "", "resize_size": "", "source": ""}
        program = torch.export.load(path, extra_files=facts).module()
        other = CLCAViTForImageClassification.from_pretrained(tmp_path / "model", keep_rate=[rate])
        torch.testing.assert_close(program(images(2).float()), other(images(2).float()).logits)
        assert path.name in said and json.loads(facts["keep_rate"]) == [rate]
        assert json.loads(facts["resize_size"]) == [32, 32]
    for mistake, words in (
        (["--keep-rates", "0.5", "--keep-rate", "0.5"], "`--keep-rates`"),
        (["--keep-rates", "1.5"], "1.5"),
        (["--output", "model.bin"], "must end in"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*argv, *mistake])
        assert words in capsys.readouterr().err


def test_the_list_of_operators_has_no_typing_mistakes():
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert known >= TENSORRT_OPERATORS
