"""Times of operators, from the profilers of the runtimes."""

import pytest
import torch

from tests.export.helpers import small_model
from tests.helpers import images
from ufgir.cli import entry as cli
from ufgir.profiling.operators import RUNTIMES, Operator, operator_table, operator_times


def test_the_table_adds_up():
    ours = {"Gemm": Operator(3, 0.002), "TopK": Operator(1, 0.0005)}
    dense = {"Gemm": Operator(2, 0.004), "Softmax": Operator(1, 0.003)}
    _, *rows, total = operator_table(ours, dense)
    assert rows == [
        ["Gemm", "3", "2.00", "2", "4.00"],
        ["Softmax", "-", "-", "1", "3.00"],
        ["TopK", "1", "0.50", "-", "-"],
    ]
    assert total == ["all", "4", "2.50", "3", "7.00"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_operator_has_a_time(runtime):
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime), exc_type=ImportError)
    model = small_model("evit")
    found = operator_times(model, images(2).float(), runtime, threads=torch.get_num_threads(), repetitions=2)
    linear, norm = {"onnx": ("Gemm", "LayerNormalization"), "openvino": ("FullyConnected", "MVN")}[runtime]
    assert found[linear].count >= 5 * model.config.num_hidden_layers and found[norm].count >= 6, found
    assert found["TopK"].count == 1 and all(one.seconds > 0 for one in [found[linear], found[norm]])


@pytest.mark.slow
def test_command(tmp_path, capsys):
    small_model("evit").save_pretrained(tmp_path)
    argv = ["profile", str(tmp_path), "--operators", "onnx", "--repetitions", "2", "--threads", "1"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert {"Softmax", "LayerNormalization"} <= set(said.split())
