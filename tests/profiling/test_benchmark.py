"""`ufgir benchmark`: compared models, counted operations, and partial results if something fails."""

import json
import math
import os
import signal
import time

import pytest
import torch
from transformers import ViTForImageClassification

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import tiny_config
from ufgir.cli import benchmark as command
from ufgir.cli import entry as cli
from ufgir.export import Exporter
from ufgir.profiling import backends, benchmark, scaling, timing
from ufgir.profiling.benchmark import Benchmark, Report, Result, make_dense
from ufgir.profiling.benchmark_cases import (
    BACKENDS,
    DTYPES,
    MODEL_SIZES,
    PRESETS,
    Case,
    Goal,
    Setting,
    by_table,
    case_config,
    chunks,
    cross,
    quarters,
)
from ufgir.profiling.benchmark_report import (
    NEEDED,
    NEEDED_ROW,
    check_place,
    csv_rows,
    fill_in,
    setting_table,
    summary_table,
    tables,
    throughput_panels,
    unfinished,
)
from ufgir.profiling.benchmark_report import record as record_of
from ufgir.profiling.macs import count_macs
from ufgir.profiling.timing import InterleavedTiming, check_idle
from ufgir.utils.provenance import as_read


CPU = torch.device("cpu")
AT = Setting(32, 2)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_labels": 3}
OPTIONS = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
OPTIONS += ["--patch-size", "8", "--threads", "1", "--repetitions", "2"]
TINY = [*OPTIONS, "--image-sizes", "32"]
PLAIN = ["--dense-backends", "none"]  # an export takes seconds


@pytest.fixture(scope="module")
def base():
    return tiny_config(reduction_layers=[1, 2, 3])


@pytest.fixture(scope="module")
def report(base):
    """Measure no reduction, EViT, ATS and a training step, with three rounds each."""
    cases = cross([None, "evit", "ats"], ["base", "CLCA"], [0.5], [AT])
    cases += cross(["evit"], ["CLCA"], [0.5], [Setting(32, 2, mode="training"), Setting(32, 1, mode="training")])
    return Benchmark(base, CPU, threads=1, repetitions=3).run(cases)


def result(seconds=(1.0,), case=None, **values):
    return Result(AT, case, "x", seconds=list(seconds), **values)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


class TestCases:
    def test_every_combination_once(self):
        cases = cross([None, "evit"], ["base", "CLCA"], [0.1, 0.5], [AT, AT._replace(batch_size=8)])
        assert len(cases) == len(set(cases)) == 2 * (2 + 2 * 2)
        assert [len(group) for group in by_table(cases).values()] == [6, 6]

    def test_layers_that_reduce(self):
        assert quarters(12) == [3, 6, 9] and quarters(24) == [6, 12, 18] and quarters(4) == [1, 2, 3]

    def test_only_static_backends_pad(self, base):
        for backend, kwargs in (
            ("eager", None),
            ("compiled", {"pad_to_bound": True}),
            ("onnx", {"pad_to_bound": True}),
        ):
            config = case_config(base, Case(AT._replace(backend=backend), "ats", "CLCA", 0.5))
            assert config.reduction_kwargs == kwargs and config.keep_rate == [0.5] and config.head == "cla"

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_are_possible(self, name):
        width, layers, heads = MODEL_SIZES[PRESETS[name].model_size]
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        base = CLCAViTConfig(**shape | dict(PRESETS[name].network))
        for case in PRESETS[name].cases:
            assert case_config(base, case).reduction == case.method

    def test_presets_hold_the_goals(self):
        def goals(name, **values):
            (case,) = [
                c
                for c in PRESETS[name].cases
                if all(getattr(c, k, getattr(c.setting, k, None)) == v for k, v in values.items())
            ]
            return {goal.measure: goal.value for goal in case.goals}

        at448 = [c for c in PRESETS["cpu448"].cases if c.method is not None]
        assert {c.method for c in at448} == set(REDUCTIONS) and all(c.goals for c in at448)
        assert goals("cpu448", method="evit", keep_rate=0.1) == {"speedup": 3.0}
        assert goals("cpu448", method="evit", keep_rate=0.7) == {"speedup": 1.5}
        assert goals("cpu448", method="topk") == {"speedup": 3.2}
        assert goals("cpu448", method="ats") == {"speedup": 3.1}
        assert goals("cpu448", method="tome") == {"realised": 0.95}
        assert goals("cpu448", method=None, variant="base") == {"speedup": 1.05}
        assert goals("cpu448", method=None, variant="CLCA") == {"speedup": 1.0}
        assert goals("cpu224", method="evit", batch_size=1) == {"speedup": 2.6}
        assert goals("training", method="evit", dtype="float32") == {
            "speedup": 2.8,
            "activations": 0.35,
            "same_kernels": 0.95,
        }
        assert goals("training", method="evit", dtype="bfloat16") == {"same_kernels": 0.95}
        assert goals("gpu", mode="training") == {"speedup": 2.6, "peak": 0.5}
        static = {name for name in REDUCTIONS if REDUCTIONS[name].static_shapes}
        assert {c.method for c in PRESETS["gpu"].cases if c.setting.batch_size == 1} == static

    @pytest.mark.parametrize(
        ("goal", "met", "missed"), [(Goal("speedup", 3.0), 3.0, 2.99), (Goal("activations", 0.45), 0.45, 0.46)]
    )
    def test_goals(self, goal, met, missed):
        assert goal.met(met) and not goal.met(missed)

    def test_every_goal_is_told_and_measured(self):
        for goal in {goal for preset in PRESETS.values() for case in preset.cases for goal in case.goals}:
            assert f"{goal.value:g}" in str(goal)
            assert result([]).measured(goal.measure) is None

    def test_important_deployments_come_first(self):
        """The time limit leaves out what comes last; compiling takes longest and is done for batch 1 only."""
        preset = PRESETS["deployments"]
        order = [(s.image_size, s.batch_size, s.dtype) for s in by_table(preset.cases)]
        half = [(size, 1, dtype) for dtype in ("float32", "bfloat16", "int8") for size in (448, 224)]
        assert order[:6] == half and {batch for _, batch, _ in order[6:]} == {4, 8}
        assert {c.setting.batch_size for c in preset.cases if c.setting.backend in ("compiled", "aoti")} == {1}
        assert {c.setting.backend for c in preset.cases} == set(BACKENDS) and preset.time_limit <= 28 * 60
        sizes = [s.image_size for s in by_table(PRESETS["sizes"].cases)]
        assert sizes == sorted(sizes) and sizes[-1] == 2048 and PRESETS["sizes"].time_limit <= 600


class TestBenchmark:
    def test_each_case_is_beside_the_dense_model_of_its_setting(self, report, base):
        assert [r.name for r in report.results[:7]] == [
            "dense (transformers)",
            "dense (ours)",
            "no reduction + CLCA",
            "evit, 0.5",
            "evit + CLCA, 0.5",
            "ats, 0.5",
            "ats + CLCA, 0.5",
        ]
        dense = report.results[0]
        for r in report.results[1:7]:
            assert r.dense is dense and len(r.seconds) == len(dense.seconds) == 3 and r.error is None
            config = case_config(base, r.case)
            torch.manual_seed(0)
            model = CLCAViTForImageClassification(config)
            assert r.parameters == model.num_parameters()
            if r.case.method != "ats":  # whose tokens depend on the weights
                assert r.macs == count_macs(model) and r.macs_executed == count_macs(model, as_executed=True)
        assert report.results[1].macs == dense.macs == dense.macs_executed

    def test_the_dense_model_is_that_of_transformers(self, base):
        assert type(make_dense(base, AT)) is ViTForImageClassification
        assert make_dense(base, AT).config._attn_implementation == "sdpa"
        ours = CLCAViTConfig.from_dict(base.to_dict() | {"num_register_tokens": 2})
        assert type(make_dense(ours, AT)) is CLCAViTForImageClassification
        pooled = CLCAViTConfig.from_dict(base.to_dict() | {"pooling": "mean"})
        assert type(make_dense(pooled, AT)) is CLCAViTForImageClassification

    @pytest.mark.parametrize("mode", ["inference", "training"])
    def test_all_have_the_same_weights(self, base, mode):
        runner = Benchmark(base, CPU)
        setting = AT._replace(mode=mode)
        with torch.no_grad():
            dense, ours, again = (
                runner._model(Result(setting, case, "")) for case in (None, Case(setting, None), Case(setting, "evit"))
            )
            pixels = torch.randn(2, 3, 32, 32)
            torch.testing.assert_close(dense(pixels).logits, ours(pixels).logits, atol=1e-5, rtol=1e-5)
        tables = [m.vit.embeddings.position_embeddings for m in (ours, again)]
        assert torch.equal(*tables)
        # one copy serves all in inference; each trains its own
        assert (tables[0].data_ptr() == tables[1].data_ptr()) == (mode == "inference")

    def test_attention_is_uneven(self, base):
        """The std of the attention logits is about two, so that patches get different attention and none gets all."""
        model = Benchmark(base, CPU)._model(Result(AT, None, ""))
        with torch.no_grad():
            hidden = model.vit.layers[0].layernorm_before(model.vit.embeddings(torch.randn(2, 3, 32, 32)))
            attention = model.vit.layers[0].attention
            query, key = (
                p(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
            )
        std = (query @ key.transpose(-1, -2) * 8**-0.5).std()
        assert 1.0 < std < 4.0

    def test_ratios(self):
        dense = result([4.0, 2.0, 3.0], macs=300, macs_executed=300)
        reduced = result([1.0, 1.5, 1.25], Case(AT, "evit"), dense=dense, macs=120, macs_executed=100)
        assert reduced.speedup == 3.0 / 1.25 and reduced.macs_ratio == 2.5 and reduced.possible is None
        assert reduced.realised == pytest.approx(0.8) and reduced.images_per_second == 2 / 1.25
        assert dense.speedup is None and dense.realised is None

    def test_a_case_that_fails_says_why(self, report):
        dense, reduced = (r for r in report.results if r.setting == Setting(32, 1, mode="training"))
        assert "BatchNorm" in reduced.error and reduced.seconds == [] and reduced.speedup is None
        assert dense.error is None and dense.seconds
        table = setting_table([dense, reduced])
        assert table[2][:3] == [reduced.name, "eager", reduced.error]

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            (Setting(32, 2, backend="onnx", mode="training"), "ONNX Runtime does not train"),
            (Setting(32, 2, "float16", "onnx"), "float32, int8 only"),
            (Setting(32, 2, "int8"), "float32, bfloat16, float16 only"),
            (Setting(30, 2), "multiple of `patch_size`"),
        ],
    )
    def test_impossible_settings(self, base, setting, words):
        report = Benchmark(base, CPU, repetitions=1).run([Case(setting, None)])
        assert words in report.results[1].error

    def test_compiled(self, base, monkeypatch):
        asked, packed = [], []

        def compile(function, **options):
            asked.append(options)

            def run(*args):
                packed.append(torch._inductor.config.freezing and not torch.is_grad_enabled())
                return function(*args)

            return run

        monkeypatch.setattr(torch, "compile", compile)
        cases = [
            Case(AT._replace(backend="compiled", mode=mode), "ats", "CLCA", 0.5) for mode in ("inference", "training")
        ]
        report = Benchmark(base, CPU, threads=1, repetitions=1).run(cases)
        assert len(asked) == 2 and all(options["fullgraph"] for options in asked)
        assert packed[0] and packed.count(True) == 1  # when the first call of inference compiles
        for r in report.results:
            assert r.error is None and r.seconds
            assert r.case is None or (r.setup_seconds > 0 and r.peak_memory is None)

    @pytest.mark.parametrize("freezing", [False, True])
    def test_weights_are_packed_on_a_cpu_alone(self, freezing):
        with torch._inductor.config.patch(freezing=freezing):
            with backends.packed_weights(torch.device("cuda")):
                assert torch._inductor.config.freezing == freezing
            with backends.packed_weights(CPU):
                assert torch._inductor.config.freezing
            assert torch._inductor.config.freezing == freezing

    def test_compiled_on_a_gpu_is_a_cuda_graph_or_an_error(self, monkeypatch):
        """torch would only log that it cannot use one, and measure something else. (The options are those of this torch version.)"""
        asked = {}
        monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
        assert backends.compiled(lambda x: x + 1, torch.device("cuda"))(1) == 2
        known = torch._inductor.config.get_config_copy()
        assert asked["fullgraph"] and all(known[name] != value for name, value in asked["options"].items())
        assert asked["options"]["triton.cudagraphs"] and asked["options"]["triton.cudagraph_or_error"]

    def test_onnx(self, base, monkeypatch):
        helper = pytest.importorskip("onnx").helper
        pytest.importorskip("onnxruntime")
        exported, exporters = [], []

        def write(exporter, path, precision, drawn):
            exported.append((exporter.config.reduction, precision))
            exporters.append(exporter)
            value = helper.make_tensor_value_info
            graph = helper.make_graph(
                [helper.make_node("ReduceMean", ["pixel_values"], ["logits"], axes=[2, 3], keepdims=0)],
                "g",
                [value("pixel_values", 1, ["n", 3, 32, 32])],
                [value("logits", 1, ["n", 3])],
            )
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
            path.write_bytes(model.SerializeToString())

        monkeypatch.setattr(Exporter, "write", write)
        settings = [Setting(32, batch, dtype, "onnx") for dtype in ("float32", "int8") for batch in (1, 2)]
        cases = [Case(setting, "evit") for setting in settings]
        report = Benchmark(base, CPU, threads=1, repetitions=1, dense_backends=()).run(cases)
        assert all(r.error is None and r.seconds for r in report.results)
        names = ["dense (transformers)", "dense (ours)", "evit, 1"]
        assert [[r.name for r in report.results[i : i + 3]] for i in (0, 3)] == [names, names]
        # one file serves both batch sizes
        assert exported == [(None, "float32"), ("evit", "float32"), (None, "int8"), ("evit", "int8")]
        assert exporters[0] is exporters[2] and exporters[1] is exporters[3]  # and one graph both precisions

    def test_an_export_counts_once(self, base, monkeypatch):
        """In the time of the call that makes the file, and as that of an earlier export afterwards."""
        monkeypatch.setattr(Exporter, "write", lambda exporter, path, **options: None)
        files = backends.Files(lambda size: [])
        model = CLCAViTForImageClassification(case_config(base, Case(AT, None)))
        settings = [AT._replace(backend="openvino", dtype=dtype) for dtype in ("float32", "bfloat16")]
        (path, first), (again, second) = (files.get("model", model, setting) for setting in settings)
        files.close()
        assert first == 0.0 < second and path == again

    @pytest.mark.parametrize(("dtype", "mode"), [("bfloat16", "inference"), ("float16", "training")])
    def test_half_precision(self, base, dtype, mode):
        report = Benchmark(base, CPU, threads=1, repetitions=1).run([Case(Setting(32, 2, dtype, mode=mode), "evit")])
        assert [r.error for r in report.results] == [None, None] and all(r.seconds for r in report.results)

    def test_too_many_for_one_group(self, base, monkeypatch):
        monkeypatch.setitem(benchmark.AT_ONCE, "inference", 1)
        report = Benchmark(base, CPU, threads=1, repetitions=1).run(cross(["topk"], ["base"], [0.2, 0.4], [AT]))
        dense = [r for r in report.results if r.case is None]
        assert [r.dense for r in report.results] == [None, dense[0], None, dense[1]]

    def test_every_group_is_restored_with_its_dense_model(self, base, monkeypatch):
        monkeypatch.setitem(benchmark.AT_ONCE, "inference", 1)
        cases = cross(["topk"], ["base"], [0.2, 0.4], [AT])
        runner = Benchmark(base, CPU, threads=1, repetitions=1)
        report = runner.run(cases)
        for index, one in enumerate(report.results):
            one.seconds = [1.0 + index]
        earlier = as_read(record_of(report, {}, {}))
        again = runner.run(cases, earlier=earlier)
        assert [r.seconds for r in again.results] == [[1.0], [2.0], [3.0], [4.0]] and again.missing == []
        assert [r.speedup for r in again.results if r.case] == [0.5, 0.75]

    def test_time_limit(self, base):
        report = Benchmark(base, CPU, time_limit=-1.0).run([Case(AT, None)])
        assert report.results == []
        assert report.over_time and not report.interrupted and report.missing == [str(AT.table)]
        assert str(AT.table) in report.warnings[-1]

    def test_a_signal_waits_for_the_call(self, base, monkeypatch):
        """An exception within a native library that calls Python can crash the process."""
        ended = []

        def call(run, device, calls=1):
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(time.sleep(0))
            return 1.0

        saved = []
        monkeypatch.setattr(timing, "time_call", call)
        report = Benchmark(base, CPU, repetitions=2).run([Case(AT, None), Case(Setting(32, 1), None)], saved.append)
        assert ended == [None] and report.interrupted and saved == []
        assert report.missing == [str(AT.table), str(Setting(32, 1).table)]

    def test_warnings(self):
        report = Report([result([1.0, 1.0, 1.0])], other_cores=0.0)
        assert report.warnings == []
        cores = float(torch.multiprocessing.cpu_count())
        report = Report([result([1.0, 2.0, 3.0])], repetitions=3, other_cores=cores)
        busy, wide = report.warnings
        assert "The machine was busy" in busy and "1 of 1 times" in wide and "50%" in wide

    def test_a_checkpoint_lends_its_weights(self, base, tmp_path):
        torch.manual_seed(3)
        model = CLCAViTForImageClassification(case_config(base, Case(AT, "topk", "CLCA", 0.5)))
        model.save_pretrained(tmp_path)
        dense = Benchmark(base, CPU, checkpoint=str(tmp_path))._model(Result(AT._replace(image_size=48), None, ""))
        assert torch.equal(dense.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
        assert dense.vit.embeddings.position_embeddings.shape[1] == 37  # resampled

    def test_a_busy_machine_is_refused(self, capsys, monkeypatch):
        """Without `--force`, and naming the load; with it, the report says so."""
        monkeypatch.setattr(os, "getloadavg", lambda: (1.25, 0.0, 0.0))
        error = refused(capsys, *TINY, *PLAIN)
        assert "1.25" in error and "0.3" in error and "--force" in error
        assert cli.main(["benchmark", *TINY, *PLAIN, "--methods", "none", "--force"]) == 0
        assert "1.25" in capsys.readouterr().out

    @pytest.mark.parametrize(("load", "idle"), [(0.0, True), (0.3, True), (0.31, False)])
    def test_idle(self, load, idle, monkeypatch):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
        if idle:
            assert check_idle() == load
        else:
            with pytest.raises(ValueError, match="`--force`"):
                check_idle()
        assert check_idle(force=True) == load


class TestDeployments:
    """The fastest reduced model against the fastest dense one, per precision."""

    def rows(self, table, times):
        """Return results of our dense model and of EViT, from {(dense or not, backend): seconds}, beside transformers' with 8 s."""
        stock = Result(table._replace(backend="eager"), None, "dense", seconds=[8.0], macs=400, macs_executed=400)
        rows = []
        for (dense, backend), seconds in times.items():
            case = Case(table._replace(backend=backend), None if dense else "evit", goals=(Goal("share", 0.9),))
            macs = 360 if dense else 100
            rows.append(Result(case.setting, case, str(case), stock, seconds=[seconds], macs=macs, macs_executed=macs))
        for row in rows:
            row.dense_rows = [r for r in (stock, *rows) if r.is_dense]
            row.deployments = [r for r in rows if r.case.model == row.case.model]
        return [stock, *rows]

    def test_both_ratios(self):
        times = {(True, "eager"): 5.0, (True, "onnx"): 4.0, (False, "eager"): 2.0, (False, "onnx"): 1.25}
        stock, _, fastest_dense, eager, onnx = self.rows(AT, times)
        assert onnx.fastest_dense is fastest_dense and onnx.is_fastest and not eager.is_fastest
        assert (eager.speedup, onnx.speedup) == (4.0, 6.4)  # over transformers' dense model as it comes
        assert (eager.over_fastest, onnx.over_fastest) == (2.0, 3.2)
        # The fastest dense model executes 360, transformers' 400.
        assert onnx.possible == 3.6 and onnx.share == pytest.approx(3.2 / 3.6)
        assert onnx.realised == pytest.approx(6.4 / 4.0)
        assert fastest_dense.over_fastest == fastest_dense.share == 1.0 and stock.over_fastest is None

    def test_transformers_may_be_the_fastest_dense(self):
        rows = self.rows(AT, {(True, "eager"): 9.0, (False, "eager"): 2.0})
        assert rows[-1].fastest_dense is rows[0] and rows[-1].over_fastest == rows[-1].speedup == 4.0
        assert rows[-1].possible == 4.0

    def test_what_failed_is_not_the_fastest(self):
        rows = self.rows(AT, {(True, "onnx"): 1.0, (False, "onnx"): 1.0})
        rows[1].seconds, rows[1].error = [], "out of memory"
        assert rows[2].fastest_dense is rows[0] and rows[2].over_fastest == 8.0

    def test_summary(self):
        """One line per model and precision, the goal by its fastest deployment alone, and int8 against float32."""
        times = {(True, "eager"): 5.0, (True, "onnx"): 4.0, (False, "eager"): 2.0, (False, "onnx"): 1.25}
        half = {key: seconds / 2 for key, seconds in times.items() if key[1] == "onnx"}
        results = [*self.rows(AT, times), *self.rows(AT._replace(dtype="int8"), half)]
        benchmark._join_precisions(results)
        report = Report(results)
        head, *lines = summary_table(report)
        found = [dict(zip(head, line, strict=False)) for line in lines]
        assert [line["setting"] for line in found] == [str(AT.table), str(AT._replace(dtype="int8").table)]
        assert [line["over fastest dense"] for line in found] == ["3.20", "3.20"]
        assert [line["share"] for line in found] == ["88.9%", "88.9%"]
        assert [line["over its float32"] for line in found] == ["", "2.00"]
        assert all(line["goal"].count(":") == 1 and line["goal"].endswith("missed") for line in found)
        assert tables(report)[0][1][0] == head
        assert summary_table(Report(self.rows(AT, {(True, "eager"): 5.0, (False, "eager"): 2.0}))) == []

    def test_dense_rows_of_each_table(self, base):
        """Transformers' own, ours on the backends of the cases, and on those that are asked for; in int8 none in float32 counts."""
        cases = [Case(AT, "evit"), Case(AT._replace(dtype="int8", backend="onnx"), "evit")]
        rows = Benchmark(base, CPU, dense_backends=("onnx", "openvino"))._with_dense(cases)
        found = [(r.setting.dtype, r.setting.backend, r.case and r.case.method) for r in rows]
        dense = [("float32", b, None) for b in ("eager", "eager", "onnx", "openvino")]
        assert found[:5] == [*dense, ("float32", "eager", "evit")]
        assert found[5:] == [("int8", b, None) for b in ("eager", "onnx", "openvino")] + [("int8", "onnx", "evit")]
        assert rows[4].dense_rows == rows[:4] and rows[-1].dense_rows == rows[6:8]
        pooled = CLCAViTConfig.from_dict(
            base.to_dict() | {"pooling": "mean"}
        )  # transformers has none, so ours is its own
        rows = Benchmark(pooled, CPU, dense_backends=())._with_dense([Case(AT, "evit")])
        assert [r.case and r.case.method for r in rows] == [None, "evit"]
        training = [Case(AT._replace(mode="training"), "evit")]
        assert len(Benchmark(base, CPU, dense_backends=("onnx",))._with_dense(training)) == 3

    @pytest.mark.parametrize("setting", [AT._replace(backend=name) for name in BACKENDS], ids=str)
    def test_every_precision_is_measured_or_refused(self, setting):
        for dtype in DTYPES:
            why = backends.why_not(setting._replace(dtype=dtype))
            assert (why is None) == (dtype in BACKENDS[setting.backend].dtypes)

    def test_deployments_of_a_model_stay_together(self):
        """They are compared with each other, so that they are timed in turn."""
        cases = [
            Case(AT._replace(backend=b), m) for b in ("eager", "onnx", "openvino") for m in ("evit", "tome", "topk")
        ]
        found = chunks(cases, 6)
        assert [{case.method for case in chunk} for chunk in found] == [{"evit", "tome"}, {"topk"}]
        assert sorted(case for chunk in found for case in chunk) == sorted(cases)

    def test_no_compiler(self, base, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        report = Benchmark(base, CPU, repetitions=1).run([Case(AT._replace(backend="aoti"), "evit")])
        assert "no-such-compiler" in report.results[1].error

    @pytest.mark.slow
    @pytest.mark.parametrize("method", [None, "evit", "tome"], ids=str)
    def test_deployments(self, base, method):
        """Every backend in every precision, with its logits near those of the model where a file is exported."""
        for package in ("onnxruntime", "openvino", "nncf"):
            pytest.importorskip(package, reason=f"{package} is not installed: make openvino", exc_type=ImportError)
        cases = [
            Case(Setting(32, 2, dtype, name), method, "CLCA", 0.5 if method else 1.0)
            for name, backend in BACKENDS.items()
            for dtype in backend.dtypes
            if name != "compiled" and (name, dtype) != ("aoti", "float16")  # compiling takes minutes
        ]
        report = Benchmark(base, CPU, threads=1, repetitions=1, dense_backends=()).run(cases)
        assert [r.error for r in report.results if r.error] == []
        assert all(r.seconds and (r.case is None or r.over_fastest > 0) for r in report.results)
        assert all(r.setup_seconds for r in report.results if r.setting.backend != "eager")


class TestReport:
    def test_reduction_needs_less(self, report):
        dense, reduced = (r for r in report.results if r.setting == Setting(32, 2, mode="training"))
        assert 0 < reduced.activation_memory < reduced.peak_memory
        assert 0 < dense.activation_memory < dense.peak_memory
        weights = 3 * 4 * dense.parameters  # and two moments of AdamW
        assert dense.peak_memory > weights
        assert reduced.memory_ratio("activation_memory") == reduced.activation_memory / dense.activation_memory

    def test_rows(self, report):
        rows = csv_rows(report)
        assert len(rows) == len(report.results) and len({tuple(row) for row in rows}) == 1
        assert rows[0]["method"] == rows[1]["method"] == "dense" and rows[2]["method"] == "none"
        assert rows[3]["keep_rate"] == 0.5

    def test_goals_are_told(self):
        dense = result([3.0], macs=300, macs_executed=300)
        goals = (Goal("speedup", 3.0), Goal("realised", 0.95), Goal("activations", 0.45))
        reduced = result([1.0], Case(AT, "evit", goals=goals), dense=dense, macs=100, macs_executed=90)
        table = setting_table([dense, reduced])
        assert table[0][-1] == "goal"
        assert table[2][-1] == "≥ 3x: met, ≥ 0.95 of GMACs: missed, activations ≤ 0.45: not measured"

    def test_memory_alone(self, base, report):
        """The same bytes as with times, of all dense models, too; nothing is timed and nothing is missing."""
        settings = [AT, AT._replace(mode="training")]
        found = Benchmark(base, CPU, repetitions=0, dense_backends=()).run(cross(["evit"], ["CLCA"], [0.5], settings))
        timed = {(str(r.setting), r.name): r for r in report.results}
        assert len(found.results) == 6 and found.missing == [] and not any(r.seconds for r in found.results)
        for r in found.results:
            assert r.finished and 0 < r.activation_memory < r.peak_memory
            if (same := timed.get((str(r.setting), r.name))) is not None:
                assert (r.activation_memory, r.peak_memory) == (same.activation_memory, same.peak_memory)
        head = setting_table(found.results[:3])[0]
        assert {"activations, MB", "peak, MB"} <= set(head) and "images/s" not in head

    def test_panels(self, report):
        assert list(throughput_panels(report)) == [str(AT), str(Setting(32, 2, mode="training"))]

    def test_filling_in(self, tmp_path):
        document = tmp_path / "page.md"
        document.write_text("a\n<!-- table: x -->\nold\n<!-- end: x -->\nb <!-- table: y --><!-- end: y -->\n")
        fill_in(document, "x", "| 1\\d |", [tmp_path / "figures" / "x_y.png"])
        text = document.read_text()
        assert text.startswith(
            "a\n<!-- table: x -->\n\n| 1\\d |\n\n![x y](figures/x_y.png)\n\n<!-- end: x -->\nb <!--"
        )
        fill_in(document, "x", "new")
        assert "1" not in document.read_text() and document.read_text().endswith("y -->\n")
        for name in ("z", "a\n"):
            with pytest.raises(ValueError, match="<!-- table"):
                check_place(document, name)
        with pytest.raises(ValueError, match="`--into`"):
            check_place(tmp_path / "other.md", "x")


class TestCommand:
    def test_files(self, capsys, tmp_path):
        argv = [
            "benchmark",
            *TINY,
            *PLAIN,
            "--batch-sizes",
            "2",
            "4",
            "--methods",
            "none",
            "topk",
            "--output",
            str(tmp_path / "new"),
        ]
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert "inference, 32 px, batch 4, float32\n" in text and "topk + CLCA, 0.1" in text
        files = {f.name for f in (tmp_path / "new").iterdir()}
        assert files == {f"benchmark.{s}" for s in ("csv", "md", "json")} | {
            "benchmark_throughput.png",
            "benchmark_latency.png",
        }
        record = json.loads((tmp_path / "new" / "benchmark.json").read_text())
        assert {"command", "date", "host", "versions", "threads", "warnings", "network"} <= set(record)
        assert record["load"] == 0.0 and {"over_fastest_dense", "share", "is_fastest"} <= set(record["results"][0])
        assert [len(r["seconds"]) for r in record["results"]] == [2] * 8 and record["network"]["hidden_size"] == 16
        assert "| topk + CLCA, 0.1 |" in (tmp_path / "new" / "benchmark.md").read_text()

    def test_interrupted(self, tmp_path, monkeypatch):
        """Partial results are written, and the document is not changed."""
        rounds = InterleavedTiming.run

        def go(self, count, after=None):
            rounds(self, count, after)
            raise KeyboardInterrupt

        monkeypatch.setattr(InterleavedTiming, "run", go)
        document = tmp_path / "page.md"
        document.write_text("<!-- table: scaling -->\n<!-- end: scaling -->\n")
        argv = ["benchmark", *TINY, *PLAIN, "--batch-sizes", "2", "4", "--output", str(tmp_path / "out")]
        assert cli.main(argv) == 130
        record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
        assert record["missing"] == [str(AT.table), str(AT._replace(batch_size=4).table)] and not record["complete"]
        assert record["interrupted"] and [len(r["seconds"]) for r in record["results"]] == [1, 1, 1, 1]
        argv = ["benchmark", *TINY, "--scaling", "--depths", "4", "--into", str(document)]
        assert cli.main(argv) == 130
        assert document.read_text() == "<!-- table: scaling -->\n<!-- end: scaling -->\n"

    def test_a_killed_run_is_continued(self, capsys, tmp_path, monkeypatch):
        """What a kill leaves behind: the files of all finished settings, which the same command does not measure again."""
        whole = Benchmark._time_group

        def only_first(self, setting, results, report):
            if setting.batch_size == 4:
                raise GeneratorExit  # nothing handles it, as with SIGKILL
            whole(self, setting, results, report)

        argv = ["benchmark", *TINY, *PLAIN, "--methods", "evit", "--batch-sizes", "2", "4", "--output", str(tmp_path)]

        def read():
            found = json.loads((tmp_path / "benchmark.json").read_text())
            return found, {(r["batch_size"], r["model"]): r["seconds"] for r in found["results"]}

        with monkeypatch.context() as patched, pytest.raises(GeneratorExit):
            patched.setattr(Benchmark, "_time_group", only_first)
            cli.main(argv)
        record, first = read()
        assert {batch for batch, _ in first} == {2} and all(first.values())
        assert record["missing"] == [str(AT._replace(batch_size=4).table)]
        assert record["missing"][0] in (tmp_path / "benchmark.md").read_text() and not record["complete"]
        assert {f.name for f in tmp_path.iterdir()} == {f"benchmark.{s}" for s in ("csv", "md", "json")}

        before = json.loads((tmp_path / "benchmark.json").read_text())
        assert cli.main(argv) == 0
        record, second = read()
        assert {name: second[name] for name in first} == first and len(second) == 2 * len(first)
        assert record["missing"] == [] and record["complete"]
        assert len(record["notes"]) == 1 and before["date"] in record["notes"][0]
        assert record["seconds"] > before["seconds"]
        rows = [[r for r in found["results"] if r["batch_size"] == 2] for found in (before, record)]
        assert rows[0] == rows[1]

    def test_only_the_same_run_is_continued(self, tmp_path, caplog):
        facts = {name: name for name in ("command", "host", "versions", "code")}
        about = {"repetitions": 3, "network": {"layers": [1, 2]}}
        assert unfinished(tmp_path, facts, about) is None
        needed = {"complete": False, "date": "d", "load": 0.0, "notes": [], "other_cores": 0.0, "seconds": 1.0}
        record = {**facts, **about, **needed, "missing": ["x"], "results": []}
        (tmp_path / "benchmark.json").write_text(json.dumps(record))
        assert unfinished(tmp_path, facts, about | {"network": {"layers": (1, 2)}}) == record
        assert not caplog.records
        for name in (*facts, *about):
            assert unfinished(tmp_path, {**facts, **about, name: "other"}, {**facts, **about, name: "other"}) is None
            assert name in caplog.records[-1].getMessage()
        for complete in (False, True):  # whether the files that follow the last setting were written
            one = record | {"missing": [], "complete": complete}
            (tmp_path / "benchmark.json").write_text(json.dumps(one))
            assert unfinished(tmp_path, facts, about) == (None if complete else one)

    def test_what_is_no_record_is_not_continued(self, tmp_path, caplog):
        facts = {name: name for name in ("command", "host", "versions", "code", "date")}
        whole = as_read(record_of(Report([result()], load=0.0), facts, {}))
        (row,) = whole["results"]
        file = tmp_path / "benchmark.json"
        file.write_text(json.dumps(whole))
        assert unfinished(tmp_path, facts, {}) == whole and not caplog.records

        def without(values, name):
            return {key: value for key, value in values.items() if key != name}

        damaged = [[], {}, None, whole | {"results": None}, whole | {"results": [1]}]
        damaged += [without(whole, name) for name in NEEDED]
        damaged += [whole | {"results": [row, without(row, name)]} for name in NEEDED_ROW]
        for text in ("", "[", *map(json.dumps, damaged)):
            caplog.clear()
            file.write_text(text)
            assert unfinished(tmp_path, facts, {}) is None and str(file) in caplog.text, text
        caplog.clear()
        file.unlink()
        file.mkdir()
        assert unfinished(tmp_path, facts, {}) is None and str(file) in caplog.text

    def test_a_preset_into_a_document(self, capsys, tmp_path, monkeypatch):
        """Whole, or not at all: after the time limit, or a kill while files are written, the same command continues."""
        document = tmp_path / "page.md"
        empty = "<!-- table: training -->\n<!-- end: training -->\n"
        document.write_text(empty)
        argv = ["benchmark", "--preset", "training", *OPTIONS, "--patch-size", "64", "--repetitions", "1"]
        argv += ["--into", str(document), "--output", str(tmp_path / "out")]
        whole = Benchmark._time_group

        def read():
            return json.loads((tmp_path / "out" / "benchmark.json").read_text())

        def then_late(self, *args):
            whole(self, *args)
            self.deadline = -math.inf

        def killed(*args):
            raise GeneratorExit  # nothing handles it, as with SIGKILL

        with monkeypatch.context() as patched:
            patched.setattr(Benchmark, "_time_group", then_late)
            assert cli.main(argv) == 1
        assert read()["over_time"] and read()["missing"] and read()["results"] and not read()["complete"]
        assert str(document) in capsys.readouterr().out and document.read_text() == empty
        with monkeypatch.context() as patched, pytest.raises(GeneratorExit):
            patched.setattr(command, "fill_in", killed)
            cli.main(argv)
        assert read()["missing"] == [] and not read()["complete"] and document.read_text() == empty
        with monkeypatch.context() as patched:
            patched.setattr(Benchmark, "_time_group", killed)  # everything is measured
            assert cli.main(argv) == 0
        assert read()["complete"] and "filled in training" in capsys.readouterr().out
        text = document.read_text()
        assert "training, 448 px, batch 4" in text and "| evit + CLCA, 0.1 |" in text
        assert "goal" not in text  # those are for ViT-B/16
        assert "![benchmark training throughput](figures/benchmark_training_throughput.png)" in text
        assert (tmp_path / "figures" / "benchmark_training_throughput.png").is_file()

    def test_a_checkpoint_sets_the_plan(self, capsys, tmp_path, base):
        config = case_config(base, Case(AT, "topk", "CLC", 0.3))
        CLCAViTForImageClassification(config).save_pretrained(tmp_path)
        assert cli.main(["benchmark", str(tmp_path), "--repetitions", "1", "--threads", "1", *PLAIN]) == 0
        text = capsys.readouterr().out
        assert "32 px" in text and "topk + CLC, 0.3" in text and "no reduction + CLC" in text

    def test_nothing_measured(self, capsys):
        argv = ["benchmark", *TINY, "--methods", "evit", "--backends", "onnx", "--modes", "training"]
        assert cli.main(argv) == 1
        assert "ONNX Runtime does not train" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--preset", "cpu44"], "Did you mean cpu448?"),
            (["--preset", "cpu448", "--methods", "evit"], "`--methods` does not go with `--preset cpu448`"),
            (["--quick", "--scaling"], "not allowed with"),
            (["--methods", "evitt"], "Did you mean evit?"),
            (["--variants", "CLCB"], "base, CLC, CLA, CLCA"),
            (["--keep-rates", "0"], "`--keep-rates` must be in (0, 1], got 0.0"),
            (["--image-sizes", "225"], "multiples of the patch size, 16"),
            (["--batch-sizes", "0"], "`--batch-sizes` must be at least 1, got 0"),
            (["--scaling", "--repetitions", "0"], "`--repetitions` must be at least 1"),
            (["--dtypes", "float64"], "float32, bfloat16, float16"),
            (["--backends", "tensorrt"], "eager, compiled, aoti, onnx, openvino"),
            (["--scaling", "--dense-backends", "onnx"], "`--dense-backends`"),
            (["--depths", "6"], "`--depths` does not go with a table of combinations"),
            (["--into", "page.md"], "`--into` needs"),
            (["--scaling", "--into", "no/page.md"], "no/page.md"),
            (["--scaling", "--modes", "training"], "eager inference"),
            (["--input-pipeline", "no/such/folder", "--image-sizes", "32"], "no/such/folder"),
            (["no/such/folder"], "there is no checkpoint no/such/folder"),
            (["--hidden-size", "15"], "hidden_size"),
            (["--seed", str(2**63)], f"`--seed` must be at most {2**63 - 1}, got {2**63}"),
        ],
    )
    def test_mistakes(self, capsys, argv, words):
        assert words in refused(capsys, *argv)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, capsys):
        assert "torch finds none here" in refused(capsys, *TINY, "--device", "cuda")
        assert "torch finds none here" in refused(capsys, "--preset", "gpu")


class TestScaling:
    def test_counts_everywhere_measures_where_it_is_quick(self, base, tmp_path, monkeypatch):
        monkeypatch.setattr(scaling, "DEPTH_SIZE", 32)
        measured = scaling.Scaling(base, Case(Setting(32), "evit", "CLCA", 0.5), CPU, 1, 1, limit=1e4)
        measured.run([32, 64], [4])
        assert [(p.axis, p.value) for p in measured.points] == [("image size", 32), ("image size", 64), ("depth", 4)]
        assert all(p.dense.time and p.case.time and p.dense_training and p.case_training for p in measured.points)
        small, large, shallow = measured.points
        assert large.dense_training > 2 * small.dense_training and large.case_training < large.dense_training
        assert large.case.macs == count_macs(CLCAViTForImageClassification(case_config(base, large.case.case)))
        assert shallow.dense.macs < small.dense.macs and shallow.dense_training < small.dense_training
        assert measured.remarks() == measured.report.warnings

        measured.limit = 0.0
        measured.run([48], [])
        last = measured.points[-1]
        assert last.dense.time is None and last.dense_training is None
        assert small.dense.macs < last.dense.macs < large.dense.macs
        assert "Counted but not measured: 48" in measured.remarks()[0]
        files = scaling.write_scaling(tmp_path, measured, {"command": "c", "host": "h", "date": "d", "versions": {}})
        assert [f.name for f in files] == ["scaling.csv", "scaling.md", "scaling.json", "scaling.png"]
        assert "| 48 | 0.00 | 0.00 |" in (tmp_path / "scaling.md").read_text()

    def test_memory_that_is_not_there(self, base, monkeypatch):
        points = scaling.Scaling(base, Case(Setting(32), "evit", "CLCA", 0.5), CPU, 1, 1, limit=1e4)
        monkeypatch.setattr(scaling, "_available_memory", lambda: 1000)
        points.run([32, 64], [])
        assert "GB of memory" in points.points[1].skipped


def test_quick_is_planned_to_end_in_three_minutes():
    """Nothing starts after the limit; compilation, which takes longest, comes last."""
    preset = PRESETS["quick"]
    assert preset.time_limit <= 120 and preset.model_size == "tiny"
    assert preset.cases[-1].setting.backend == "compiled"
    assert {c.method for c in preset.cases} == {None, *REDUCTIONS}
