"""Exported files give the same results as the model, for every method, with cache and CLA head."""

import json
import logging
import math

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from clca import CLCAViTForImageClassification
from tests.export.helpers import small_model
from tests.helpers import METHODS, images, slow_unless
from tests.limits import small_files
from ufgir.cli import entry as cli
from ufgir.export import FORMATS, PRECISIONS, TENSORRT_OPERATORS, Check, Exporter, export_model
from ufgir.export.checks import Logits, compare
from ufgir.utils.files import DiskFull


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
def test_onnx_says_what_the_model_says(method, tmp_path, caplog):
    """For other images and batch sizes than those compared by the export."""
    model, path = small_model(method), tmp_path / "model.onnx"
    caplog.set_level(logging.INFO, logger="torch.onnx")  # as a program may do
    exported = export_model(model, path, {"source": "here"})
    assert logging.getLogger("torch.onnx").level == logging.INFO
    session = onnxruntime.InferenceSession(path)
    for count in (1, 2, 5):
        pixels = images(count, seed=count + 10).float()
        (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(pixels).logits, atol=1e-5, rtol=1e-4)
    assert exported.difference < 1e-5 and exported.not_in_tensorrt == []
    assert exported.doubtful_in_tensorrt == SCATTERS.get(method, [])
    assert_lean(onnx.load(path), model.config)
    facts = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props if p.key in ("keep_rate", "source")}
    assert facts == {"keep_rate": model.config.keep_rate, "source": "here"}
    stored = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    assert Check(**stored["check"]) == exported.check and exported.check.images == 4 and not exported.check.given
    assert b"site-packages" not in path.read_bytes()  # paths of this machine
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # nothing half-written beside it


def assert_lean(graph, config):
    """One attention per layer, linear layers on matrices, and no operators that compute the shapes of attention."""
    nodes = graph.graph.node
    makers = {name: node for node in nodes for name in node.output}
    dims = {tensor.name: len(tensor.dims) for tensor in graph.graph.initializer}
    shapes = onnx.shape_inference.infer_shapes(graph).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in shapes}
    products = [
        node for node in nodes if node.op_type == "MatMul" and ranks[node.output[0]] == 4
    ]  # PatchMerger has others
    attention = [node for node in products if makers[node.input[0]].op_type == "Softmax"]
    assert len(attention) == config.num_hidden_layers
    for node in attention:  # from its input on: softmax, mask, logits
        softmax = makers[node.input[0]]
        logits = makers[softmax.input[0]]
        masked = logits.op_type == "Add"
        assert (makers[logits.input[0]] if masked else logits).op_type == "MatMul"
    biases = [n for n in nodes if n.op_type == "Add" and {dims.get(name) for name in n.input} == {None, 1}]
    linear = [makers[n.input[0]] for n in biases if makers[n.input[0]].op_type == "MatMul"]
    assert len(linear) >= 6 * config.num_hidden_layers
    assert {ranks[node.output[0]] for node in linear} == {2}
    assert not any(makers.get(n.input[1], n).op_type == "Concat" for n in nodes if n.op_type == "Reshape")


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
    """One sentence names the file; torch itself would end the process with a C++ stack trace."""
    path = tmp_path / f"model{suffix}"
    path.write_text("of an earlier model")
    with small_files(20_000), pytest.raises(DiskFull) as refused:
        export_model(small_model("evit"), path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "of an earlier model"


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch):
    model = small_model(None)
    wrong = FORMATS[".pt2"]._replace(
        write=lambda exporter, path, precision, calibration: path.write_bytes(b"nonsense"),
        run=lambda path: lambda pixels: model(pixels).logits + 0.1,
    )
    monkeypatch.setitem(FORMATS, ".pt2", wrong)
    (tmp_path / "model.pt2").write_text("the one from yesterday")
    with pytest.raises(ValueError, match=r"differs from the model by 1\.0e-01 .* not written"):
        export_model(model, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "the one from yesterday"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "method, changes, name, words",
    [
        ("ats", {"reduction_kwargs": None}, "model.onnx", '{"pad_to_bound": true}'),
        ("atc", {"image_size": 136}, "model.onnx", "289"),
        (None, {}, "model.tflite", "must end in .onnx, .xml or .pt2"),
    ],
)
def test_what_cannot_be_exported_is_refused(method, changes, name, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        export_model(small_model(method, **changes), tmp_path / name)
    assert words in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix, precision", [(s, p) for s in FORMATS for p in PRECISIONS])
def test_a_format_has_a_precision_or_says_why_not(suffix, precision, tmp_path):
    kind = FORMATS[suffix]
    if precision not in kind.precisions:
        with pytest.raises(ValueError, match=f"`precision` of {suffix} files .*{precision}.*: "):
            export_model(small_model(None), tmp_path / f"model{suffix}", precision=precision)
    assert "float32" in kind.precisions and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lower_precisions_are_smaller_and_near(tmp_path):
    """Stored with their check, which counts the given images."""
    exporter = Exporter(small_model("evit", hidden_size=64, intermediate_size=256))
    batches = [images(4, seed=3).float(), images(2, seed=4).float()]
    spread = float(torch.cat([exporter.program(pixels) for pixels in batches]).std())
    sizes = {}
    for name, precision, calibration in (
        ("float32.onnx", "float32", None),
        ("float16.onnx", "float16", None),
        ("dynamic.onnx", "int8", None),
        ("static.onnx", "int8", batches),
        ("float32.pt2", "float32", None),
        ("float16.pt2", "float16", None),
        ("bfloat16.pt2", "bfloat16", None),
    ):
        made = exporter.write(tmp_path / name, precision=precision, calibration=calibration, images=batches)
        sizes[name] = made.path.stat().st_size
        assert made.check.images == 6 and made.check.given and made.precision == precision
        assert (made.difference < 1e-4 * spread) == (precision == "float32")
        assert made.difference < {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5, "int8": 1.0}[precision] * spread
        assert bool(made.int8_operators) == bool(made.float_operators) == (precision == "int8")
        assert (
            "Gemm" not in made.float_operators
        )  # no linear layer, not even the queries that the stage computes first
    assert sizes["float16.onnx"] < 0.65 * sizes["float32.onnx"] and sizes["dynamic.onnx"] < 0.6 * sizes["float32.onnx"]
    assert sizes["bfloat16.pt2"] < 0.75 * sizes["float32.pt2"] > sizes["float16.pt2"]
    stored = {
        p.key: json.loads(p.value) for p in onnx.load(tmp_path / "static.onnx").metadata_props if p.value[0] in '{"'
    }
    assert stored["precision"] == "int8" and stored["check"]["images"] == 6 and stored["float_operators"]["Softmax"]


class TestCheck:
    """The comparison sees what differs."""

    def check(self, run, **options):
        program = Logits(small_model(None))
        return compare(program, lambda pixels: run(program(pixels)), **options)

    def test_equal(self):
        assert self.check(lambda logits: logits) == Check(0.0, 1.0, 4)

    def test_other_classes(self):
        batches = [images(5, seed=1).float()]
        found = self.check(lambda logits: -logits, images=batches, drawn=())
        assert found.agreement == 0.0 and found.images == 5 and found.given and found.difference > 0

    def test_not_finite(self):
        found = self.check(lambda logits: logits / torch.zeros(()))
        assert not math.isfinite(found.difference)

    def test_accuracy(self):
        """Of labels that the model gives, and one that it does not, the file is right for the others."""
        batches = [images(3, seed=1).float(), images(2, seed=2).float()]
        program = Logits(small_model(None))
        labels = [int(label) for pixels in batches for label in program(pixels).argmax(dim=1)]
        wrong = [*labels[:-1], (labels[-1] + 1) % program.model.config.num_labels]
        found = compare(program, program, batches, drawn=(), labels=wrong)
        assert (found.accuracy, found.model_accuracy, found.agreement) == (0.8, 0.8, 1.0)
        found = compare(program, lambda pixels: -program(pixels), batches, drawn=(), labels=labels)
        assert (found.accuracy, found.model_accuracy) == (0.0, 1.0)
        with pytest.raises(ValueError, match=r"`labels`.* 4 for 5"):
            compare(program, program, batches, labels=labels[:-1])

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match=r"`drawn`.*`images`"):
            self.check(lambda logits: logits, drawn=())

    def test_random_images_beside_given_ones(self):
        """Logits of another batch size are compared, but only given images count."""
        found = self.check(lambda logits: logits + (len(logits) == 3), images=[images(2).float()])
        assert found.difference == pytest.approx(1.0) and found.images == 2


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
        (["--output", "model.bin"], "`--output` must end in"),
        (["--output", "model.xml", "--precision", "bfloat16"], "INFERENCE_PRECISION_HINT"),
        (["--output", "model.xml", "--precision", "int8"], "needs `--calibration`"),
        (["--calibration", "leaves"], "`--calibration` has no effect"),
        (["--check", "leaves", "--check-images", "0"], "`--check-images` must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*argv, *mistake])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["class", "other"])
def test_command_shows_top1_in_class_folders(folder, tmp_path, capsys):
    """Folders that are not all named after classes say nothing about the right class."""
    model = small_model("evit")
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    for name in (model.config.id2label[0], model.config.id2label[1] if folder == "class" else folder):
        (tmp_path / "leaves" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (len(name), 200, 0)).save(tmp_path / "leaves" / name / "1.png")
    argv = ["export", str(tmp_path / "model"), "--output", str(tmp_path / "model.pt2")]
    assert cli.main([*argv, "--check", str(tmp_path / "leaves")]) == 0
    facts = {"check": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=facts)
    check = Check(**json.loads(facts["check"]))
    assert check.images == 2 and ("top-1" in capsys.readouterr().out) == (folder == "class")
    assert check.accuracy == check.model_accuracy and (check.accuracy is None) == (folder == "other")


def test_the_list_of_operators_has_no_typing_mistakes():
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert known >= TENSORRT_OPERATORS
