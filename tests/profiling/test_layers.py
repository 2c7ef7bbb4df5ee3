"""`ufgir profile --layers`: the parts sum to the model, and times are assigned to the correct parts."""

import csv
import gzip
import json

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from clca import CLCAViTForImageClassification, token_schedule
from tests.helpers import CACHES, FIRST_OF_FAMILIES, METHODS, images, slow_unless, tiny_config
from ufgir.cli import entry as cli
from ufgir.profiling.layers import (
    layer_table,
    macs_by_part,
    parameters_by_part,
    parts_of,
    profile_layers,
    time_parts,
    write_trace,
)
from ufgir.profiling.macs import count_macs, dense_config


OPTIONS = (
    "--image-size 32 --patch-size 8 --hidden-size 16 --num-hidden-layers 5 --num-attention-heads 2 --num-labels 3"
)
REDUCED = "--reduction topk --keep-rate 0.5 --reduction-layers 1 2 --clca"
ARGV = ["profile", *OPTIONS.split(), *REDUCED.split()]


def model_of(**changes):
    torch.manual_seed(0)
    return CLCAViTForImageClassification(tiny_config(**changes)).eval()


def reduced(method, cache="clca", **changes):
    options = {"reduction": method, "keep_rate": 0.5} if method else {}
    return model_of(**CACHES[cache] | options | changes)


@pytest.fixture(scope="module")
def topk():
    return reduced("topk")


@pytest.fixture(scope="module")
def dense(topk):
    return CLCAViTForImageClassification(dense_config(topk.config)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "h2t"},
        {"head": "ifa"},
        {"pooling": "map"},
        {"pooling": "map", "reduction": "ats", "keep_rate": 0.9},
        {"pooling": "mean", "use_class_token": False},
        {"use_swiglu_ffn": True, "num_register_tokens": 2, "layerscale_value": 0.1},
    ],
)
def test_everything_adds_up_for_other_networks(changes):
    model = model_of(**changes)
    assert sum(macs_by_part(model).values()) == count_macs(model)
    parameters = parameters_by_part(model)
    assert sum(parameters.values()) == model.num_parameters()
    pooling = model.vit.attention_pooling
    assert parameters["rest"] == (0 if pooling is None else sum(p.numel() for p in pooling.parameters()))


def test_a_layer_of_the_dense_model_by_hand():
    model = ViTForImageClassification(ViTConfig(**{k: getattr(tiny_config(), k) for k in SHAPE}, num_labels=3))
    tokens, width, inner = 17, 16, 32
    one = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * inner
    counts = macs_by_part(model)
    assert [counts[f"layer {index}"] for index in range(5)] == [one] * 5
    assert counts["head"] == 3 * width and counts["final norm"] == counts["rest"] == 0


SHAPE = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@pytest.mark.parametrize("method", slow_unless(FIRST_OF_FAMILIES.__contains__, METHODS))
def test_parts_add_up_and_have_the_tokens_of_the_forward_pass(method, dense):
    model = reduced(method)
    parts = profile_layers(model, dense, model.config)
    assert [part.name for part in parts] == [*parts_of(model), "rest"]
    assert sum(part.macs for part in parts) == count_macs(model)
    assert sum(part.macs_executed for part in parts) == count_macs(model, as_executed=True)
    assert sum(part.parameters for part in parts) == model.num_parameters()
    patches, width, values = 16, 16, 3 * 8 * 8  # of a patch
    assert parts[0].macs == patches * width * values and parts[-1].macs == 0

    layers = [part for part in parts if part.name.startswith("layer")]
    assert all(0 < part.macs_executed <= part.macs for part in layers)
    schedule = token_schedule(model.config)
    assert [part.tokens_in for part in layers] == schedule.before[:-1]
    assert [part.tokens_out + part.retrieved for part in layers] == schedule.before[1:]
    if method != "ats":  # which keeps at most that many
        with torch.no_grad():
            counts = model(torch.zeros(1, 3, 32, 32), output_hidden_states=True).token_counts
        assert list(counts) == schedule.before
    assert {part.dense_tokens for part in layers} == {17}


def test_times_are_of_the_parts(topk, dense, monkeypatch):
    """With a clock that advances by one at each call, a part takes one, and the rest is the time between parts."""
    from ufgir.profiling import layers as layer_profile

    ticks = iter(range(10**6))
    monkeypatch.setattr(layer_profile.time, "perf_counter", lambda: next(ticks))
    ours, theirs = time_parts([topk, dense], torch.zeros(2, 3, 32, 32), threads=1, repetitions=3)
    parts = len(parts_of(topk))
    assert ours == theirs == {**dict.fromkeys(parts_of(topk), 1.0), "rest": parts + 1.0}


@pytest.mark.parametrize("method", [None, "topk"])
def test_what_is_measured_is_the_model_as_it_runs(method, tmp_path, monkeypatch):
    """The hooks of the clock and of the trace do not enable computations that the model skips: the last MLP processes one token."""
    model = reduced(method, "plain")
    rows, forward = [], model.vit.layers[-1].mlp.fc2.forward
    monkeypatch.setattr(model.vit.layers[-1].mlp.fc2, "forward", lambda x: rows.append(x.shape[1]) or forward(x))
    time_parts([model], images(2).float(), repetitions=1)
    write_trace(model, images(2).float(), tmp_path / "trace.json")
    assert set(rows) == {1}


def test_hooks_leave_nothing(topk, dense):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in topk.modules())

    before, threads = hooks(), torch.get_num_threads()
    times = time_parts([topk, dense], torch.zeros(1, 3, 32, 32), threads=1, repetitions=1)
    assert hooks() == before and torch.get_num_threads() == threads
    assert all(seconds > 0 for name, seconds in times[0].items())
    with pytest.raises(ValueError, match="pixel_values"):
        time_parts([topk], torch.zeros(1, 3, 16, 16), repetitions=1)
    assert hooks() == before


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_trace_names_the_parts(topk, tmp_path, suffix):
    path = write_trace(topk, torch.zeros(1, 3, 32, 32), tmp_path / "new" / f"trace{suffix}")
    text = gzip.decompress(path.read_bytes()).decode() if suffix.endswith("gz") else path.read_text()
    names = [event.get("name") for event in json.loads(text)["traceEvents"]]
    for part in parts_of(topk):
        if part != "final norm":  # may be computed for the rows of the head alone, or not at all
            assert names.count(part) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_table(topk, dense):
    seconds = tuple(dict.fromkeys([*parts_of(topk), "rest"], value) for value in (0.001, 0.002))
    table = layer_table(profile_layers(topk, dense, topk.config, seconds))
    assert table[0][-3:] == ["ms", "dense", "share"] and all(len(row) == len(table[0]) for row in table)
    assert table[1][0] == "embeddings" and table[-1][0] == "sum"
    assert table[2][-3:] == ["1.00", "2.00", "50.0%"]
    assert table[-1][table[0].index("parameters")] == f"{topk.num_parameters():,}"
    assert table[-1][-3:] == ["9.00", "18.00", "50.0%"]  # embeddings, five layers, norm, head, rest


class TestCommand:
    def test_layers(self, capsys, tmp_path):
        assert cli.main([*ARGV, "--layers", "--output", str(tmp_path / "new")]) == 0
        text = capsys.readouterr().out
        assert "tokens in  tokens out  retrieved" in text  # what it said without --layers is still there
        (line,) = [line for line in text.splitlines() if line.startswith("layer 1 ")]
        assert line.split()[2:5] == ["18", "10", "+2"]
        assert {f.name for f in (tmp_path / "new").iterdir()} == {f"layers.{s}" for s in ("csv", "md", "json", "png")}
        with (tmp_path / "new" / "layers.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[-1]["name"] == "rest" and rows[1]["seconds"] == ""
        macs = sum(int(row["macs"]) for row in rows)
        (line,) = [line for line in text.splitlines() if line.startswith("GMACs, one image")]
        assert line.split()[3] == f"{macs / 1e9:.3f}"

    def test_time_trace_and_document(self, capsys, tmp_path):
        document = tmp_path / "page.md"
        document.write_text("<!-- table: layers -->\n<!-- end: layers -->\n")
        how = ["--time", "--threads", "1", "--repetitions", "1", "--batch-size", "2", "--device", "cpu"]
        files = ["--trace", str(tmp_path / "trace.json"), "--into", str(document)]
        ats = [*ARGV, "--reduction", "ats"]
        assert cli.main([*ats, "--layers", *how, *files]) == 0
        text = capsys.readouterr().out
        assert (
            "Token counts depend on the image" in text and "medians of 1 rounds" in text and "(transformers')" in text
        )
        assert (tmp_path / "trace.json").is_file() and (tmp_path / "figures" / "profile_layers.png").is_file()
        assert "| layer 1 |" in document.read_text() and "figures/profile_layers.png" in document.read_text()

    def test_of_a_checkpoint(self, capsys, tmp_path, topk):
        topk.save_pretrained(tmp_path)
        argv = ["profile", str(tmp_path), "--layers", "--time", "--repetitions", "1", "--threads", "1"]
        assert cli.main([*argv, "--num-register-tokens", "2", "--image-size", "48"]) == 0
        assert "(ours)" in capsys.readouterr().out  # transformers' has no registers

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--time"], "`--time` requires `--layers`"),
            (["--output", "x"], "`--output` requires `--layers`"),
            (["--layers", "--repetitions", "3"], "`--repetitions` requires `--time`, `--trace`"),
            (["--layers", "--time", "--batch-size", "0"], "`--batch-size` must be at least 1, got 0"),
            (["--trace", "trace.txt"], "`--trace` must end in .json or .json.gz"),
            (["--layers", "--into", "no.md"], "`--into`: no.md"),
            (["--paper", "--layers"], "--paper"),
        ],
    )
    def test_mistakes(self, capsys, argv, words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["profile", *argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and words in error
