"""Records of runs, the tables of records, and the figures drawn from the tables."""

import csv
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_config
from tests.run_folders import VARIANTS, write_run
from ufgir.cli import entry as cli
from ufgir.runs import figures as paper_figures
from ufgir.runs.records import MANIFEST, RECORD, is_finished, read_run_records, remove_run_record
from ufgir.runs.tables import (
    default_factors,
    default_metric,
    markdown,
    matching,
    pool,
    read_summary,
    run_rows,
    summarize,
    varying,
)
from ufgir.training.gradients import GradientCurve
from ufgir.utils.files import write_csv
from ufgir.utils.plotting import style


PUBLISHED = Path(__file__).parents[2] / "docs" / "data" / "published_accuracy_evit_448.csv"


@pytest.fixture
def study(tmp_path) -> Path:
    """Write a study of two variants, two keep rates and three seeds, in which one run failed and two were interrupted."""
    for variant in ("base", "CLCA"):
        for rate in (0.25, 0.5):
            for index, seed in enumerate((1, 10, 100)):
                top1 = 0.4 + 0.2 * (variant == "CLCA") + 0.1 * rate + 0.01 * index
                folder = tmp_path / "study" / f"variant={variant},keep_rate={rate},seed={seed}"
                write_run(folder, seed, top1, rate=rate, options=VARIANTS[variant])
    runs = {"seed=13": {"status": "failed", "error": "status 1: no"}, "seed=14": {"status": "running"}}
    (tmp_path / "study" / MANIFEST).write_text(json.dumps({"recipe": {}, "runs": runs}))
    (tmp_path / "study" / "alone" / "checkpoint-3").mkdir(parents=True)
    return tmp_path / "study"


# Records


def test_a_record_says_what_the_run_was(tmp_path):
    path = write_run(tmp_path / "a")
    record = json.loads(path.read_text())
    assert path == tmp_path / "a" / RECORD and is_finished(tmp_path / "a") and not is_finished(tmp_path)
    assert record["settings"]["keep_rate"] == [0.5] and record["config"]["hidden_size"] == 16
    assert record["config"]["num_labels"] == 3 and "id2label" not in record["config"]
    assert record["metrics"] == {"test": {"top1": 0.5, "macro_f1": 0.25}} and record["macs"] == 5 * 10**8
    assert record["command"] == "run_ufgir.py 'a b.yaml'" and record["date"][4] == "-" and "CPU" in record["host"]
    assert record["peak_memory"]["host"] > 2**20 and set(record["versions"]) >= {"python", "torch", "transformers"}
    assert [p.name for p in path.parent.iterdir()] == [RECORD]  # nothing half-written stays
    remove_run_record(tmp_path / "a")
    remove_run_record(tmp_path / "a")
    assert not is_finished(tmp_path / "a")


def test_an_evaluation_adds_to_the_record_of_its_training(tmp_path, caplog):
    """As in run_ufgir.py, where the configuration is loaded from the saved model."""
    config = tiny_config(reduction="evit", keep_rate=[0.5])
    easy = {"source": {"synthetic_difficulty": "easy"}, "validation": {"validation_fraction": 0.4}, "test": {}}
    write_run(tmp_path, top1=0.5, data=easy)
    config.save_pretrained(tmp_path / "model")
    loaded = type(config).from_pretrained(tmp_path / "model")
    extra = {
        "train_seconds": None,
        "metrics": {"validation": {"top1": 0.9}},
        "split_sizes": {"train": 9, "validation": 7},
    }
    extra["data"] = easy | {"validation": {"validation_fraction": 0.2}}  # not measured before: it may be of any images
    write_run(tmp_path, config=loaded, command=["later"], images_per_second={"validation": 3.0}, **extra)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["metrics"]["validation"] == {"top1": 0.9} and record["metrics"]["test"]["top1"] == 0.5
    assert record["split_sizes"] == {"train": 80, "test": 20, "validation": 7} and record["train_seconds"] == 10
    assert record["command"] == "run_ufgir.py 'a b.yaml'" and record["evaluations"][0]["command"] == "later"
    assert record["data"] == extra["data"]
    # other data: nothing of it takes the place of what the training measured
    other = extra | {"metrics": {"test": {"top1": 0.1}}, "split_sizes": {"test": 3}, "settings": {"dataset": "other"}}
    hard, few = {"source": {"synthetic_difficulty": "hard"}}, {"test": {"max_predict_samples": 3}}
    for changes in ({"dataset": "other"}, {"data": easy | hard}, {"data": easy | few}):
        write_run(tmp_path, config=loaded, **other | changes)
        again = json.loads((tmp_path / RECORD).read_text())
        assert {k: v for k, v in again.items() if k != "evaluations"} == {
            k: v for k, v in record.items() if k != "evaluations"
        }
        last = again["evaluations"][-1]
        assert last["metrics"] == {"test": {"top1": 0.1}} and last["settings"] == {"dataset": "other"}
        assert {k: last[k] for k in changes} == changes
    record = again
    # another model, in the folder of this one
    write_run(tmp_path, rate=0.25, **extra | {"metrics": {"test": {"top1": 0.1}}})
    assert json.loads((tmp_path / RECORD).read_text()) == record and "another model" in caplog.text
    # a new training takes its place
    write_run(tmp_path, rate=0.25, top1=0.3)
    assert json.loads((tmp_path / RECORD).read_text())["metrics"] == {"test": {"top1": 0.3, "macro_f1": 0.15}}


@pytest.mark.parametrize(
    "jit, step, stopping, finished",
    [(True, 3, None, False), (True, 10, None, True), (True, 3, 1, False), (True, 3, 2, True), (False, 3, None, True)],
)
def test_records_that_earlier_versions_wrote_after_a_signal(tmp_path, jit, step, stopping, finished):
    """They do not count, and a sweep continues these runs. A training that stopped early is finished."""
    settings = {"enable_jit_checkpoint": jit, "seed": 1}
    folder = write_run(tmp_path / "a", settings=settings).parent
    write_run(tmp_path / "b", settings=settings)  # no state: nothing is known
    early = {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": stopping}}
    state = {
        "global_step": step,
        "max_steps": 10,
        "stateful_callbacks": {"EarlyStoppingCallback": early} if stopping else {},
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert is_finished(folder) == finished
    records = read_run_records([tmp_path])
    assert len(records.finished) == 1 + finished
    assert finished or "3 of 10" in records.unfinished[folder.resolve()]


def test_unfinished_runs_are_listed_separately(study, tmp_path):
    (study / "damaged").mkdir()
    (study / "damaged" / RECORD).write_text('{"settings": {')
    (study / "odd").mkdir()
    (study / "odd" / RECORD).write_text("{}")
    (study / "seed=14").mkdir()
    write_run(study / "seed=14" / "checkpoint-1")  # an upload, a copy: not a run
    records = read_run_records([study, study / "alone", study])
    assert len(records.finished) == 12 and len({r["folder"] for r in records.finished}) == 12
    why = {folder.name: reason for folder, reason in records.unfinished.items()}
    assert why.pop("damaged").startswith("run.json could not be read")
    assert why.pop("odd").startswith("run.json lacks")
    assert why == {
        "alone": "interrupted, with checkpoints",
        "seed=13": "failed: status 1: no",
        "seed=14": "running or killed",
    }
    with pytest.raises(ValueError, match="no runs found in"):
        (tmp_path / "empty").mkdir()
        read_run_records([tmp_path / "empty"])
    with pytest.raises(ValueError, match="does not exist"):
        read_run_records([tmp_path / "nowhere"])


# Tables


def test_means_and_sample_deviations_over_seeds(study):
    rows = run_rows(read_run_records([study]).finished)
    metric = default_metric(rows)
    summary = summarize(rows, metric, default_factors(rows))
    assert metric == "test_top1" and len(summary) == 4
    assert varying(summary, default_factors(rows)) == ["keep_rate", "variant"]  # what follows from them is no factor
    first = summary[0]
    values = [0.425, 0.435, 0.445]
    assert (first["variant"], first["keep_rate"], first["n"]) == ("base", 0.25, 3)
    assert first["mean"] == pytest.approx(statistics.fmean(values)) and first["std"] == pytest.approx(0.01)
    assert first["gmacs"] == 0.25 and first["images_per_second"] == 400 and first["train_seconds"] == 370
    text = markdown(summary)
    assert "| 0.25 | base | 43.50 ± 1.00 | 3 |" in text and text.startswith("dataset leaves, backbone from scratch")
    assert summarize(rows[:1], metric, ["variant"])[0]["std"] is None
    assert "± " not in markdown(summarize(rows[:1], metric, ["variant"]))


def test_options_that_differ_within_a_setting_are_factors(tmp_path):
    for count in (1, 4):
        options = VARIANTS["CLCA"] | {"num_clr_tokens": count}
        write_run(tmp_path / str(count), seed=1, top1=0.1 * count, options=options)
    write_run(tmp_path / "dense", method=None, rate=1.0)
    write_run(tmp_path / "stages", options={"keep_rate": [0.5, 0.25]})
    rows = run_rows(read_run_records([tmp_path]).finished)
    factors = default_factors(rows)
    assert factors[-1] == "num_clr_tokens" and "logging_steps" not in factors and "seed" not in factors
    summary = {
        (r["method"], r["keep_rate"], r["num_clr_tokens"]): r["mean"] for r in summarize(rows, "test_top1", factors)
    }
    assert summary == pytest.approx(
        {("evit", 0.5, 1): 0.1, ("evit", 0.5, 4): 0.4, ("none", 1.0, 0): 0.5, ("evit", "0.5 0.25", 0): 0.5}
    )


def test_options_are_not_taken_for_metrics(tmp_path):
    """Their names have the prefixes of metrics: train_..., validation_..."""
    for i, option in enumerate(("train_on_trainval", "validation_fraction", "test_option")):
        write_run(tmp_path / option, settings={"seed": 1, option: i + 1})
    rows = run_rows(read_run_records([tmp_path]).finished)
    assert set(default_factors(rows)[6:]) == {"train_on_trainval", "validation_fraction", "test_option"}
    assert len(summarize(rows, "test_top1", default_factors(rows))) == 3


def test_variants_are_known_by_the_model(tmp_path):
    for name, options in VARIANTS.items():
        write_run(tmp_path / name, options=options)
    write_run(tmp_path / "vqt", options={"head": "vqt"})
    write_run(tmp_path / "ifa", options=VARIANTS["CLC"] | {"head": "ifa"})
    rows = run_rows(read_run_records([tmp_path]).finished)
    assert [row["variant"] for row in rows] == ["base", "CLC", "CLA", "CLCA", "CLC+IFA", "VQT"]
    assert [row["variant"] for row in summarize(rows[::-1], "test_top1", ["variant"])] == [r["variant"] for r in rows]


def test_a_metric_that_some_runs_lack(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2, metrics={"validation": {"top1": 0.25}}, resumed_from="checkpoint-3")
    rows = run_rows(read_run_records([tmp_path]).finished)
    assert [row["train_seconds"] for row in rows] == [10, ""]  # the other's whole time is not known
    assert default_metric(rows) == "test_top1" and default_metric(rows, "validation_top1") == "validation_top1"
    (row,) = summarize(rows, "test_top1", ["variant"])
    assert (row["mean"], row["n"]) == (0.5, 1)
    with pytest.raises(ValueError, match=r"`--metric` top7 .*: test_top1, test_macro_f1"):
        default_metric(rows, "top7")


def test_a_cost_that_differs_by_image_is_left_out(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"ats{seed}", seed=seed, method="ats", macs=None)
        write_run(tmp_path / f"evit{seed}", seed=seed)
    rows = run_rows(read_run_records([tmp_path]).finished)
    assert [row["gmacs"] for row in rows] == ["", "", 0.5, 0.5] and {row["dense_gmacs"] for row in rows} == {1.0}
    summary = summarize(rows, "test_top1", default_factors(rows))
    assert [(row["method"], row["gmacs"]) for row in summary] == [("ats", None), ("evit", 0.5)]
    assert "| ats | 50.00 ± 0.00 | 2 |  | 200 |" in markdown(summary)
    assert read_summary(write_csv(tmp_path / "summary.csv", summary))[0]["gmacs"] is None
    with style():
        assert len(paper_figures.draw_cost(summary, "gmacs").axes[0].containers) == 1
        with pytest.raises(ValueError, match="differ between images"):
            paper_figures.draw_cost(summary[:1], "gmacs")


def test_rows_are_chosen_by_their_values(study):
    rows = run_rows(read_run_records([study]).finished)
    assert len(matching(rows, ["variant=clca", "keep-rate=0.5"])) == 3
    assert len(matching(rows, ["seed=1,10"])) == 8
    with pytest.raises(ValueError, match="`variant`: CLCA, base"):
        matching(rows, ["variant=CLA"])
    with pytest.raises(ValueError, match="did you mean variant"):
        matching(rows, ["varian=CLA"])
    with pytest.raises(ValueError, match="COLUMN=VALUE"):
        matching(rows, ["variant"])


def test_a_summary_survives_its_file(study, tmp_path):
    rows = run_rows(read_run_records([study]).finished)
    summary = summarize(rows, "test_top1", default_factors(rows))
    again = read_summary(write_csv(tmp_path / "summary.csv", summary))
    assert again == [pytest.approx(row) for row in summary]
    assert pool(again, list(again[0])[:6]) == again  # nothing to pool
    (base, clca) = pool(again, ["variant"])
    assert (base["n"], base["std"]) == (6, None) and base["mean"] == pytest.approx(0.4475)
    assert clca["mean"] - base["mean"] == pytest.approx(0.2)
    for text, words in (
        ("a,b\n1,2\n", "not a summary"),
        ("", "not a summary"),
        ("metric,mean,std,n\nx,?,1,1\n", "numbers"),
    ):
        (tmp_path / "odd.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_summary(tmp_path / "odd.csv")
    with pytest.raises(ValueError, match="could not be read"):
        read_summary(tmp_path / "nowhere.csv")


def test_the_published_table_gives_the_gains_that_the_paper_reports():
    """The mean gain of CLCA over base, over 9 backbones and 5 data sets, by keep rate, in points."""
    summary = read_summary(PUBLISHED)
    assert len(summary) == 9 * 3 * 5 * 5
    means = {(row["keep_rate"], row["variant"]): 100 * row["mean"] for row in pool(summary, ["keep_rate", "variant"])}
    gains = {rate: means[rate, "CLCA"] - means[rate, "base"] for rate in (0.1, 0.25, 0.5, 0.7, 1)}
    assert gains == pytest.approx({0.1: 28.6, 0.25: 26.9, 0.5: 23.9, 0.7: 24.4, 1: 25.8}, abs=0.05)


# Figures


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_accuracy_over_cost_has_a_line_a_variant_and_names_the_rates(study):
    rows = run_rows(read_run_records([study]).finished)
    summary = summarize(rows, "test_top1", default_factors(rows))
    with style():
        for cost, x in (("gmacs", [0.25, 0.5]), ("images_per_second", [200, 400])):
            (axes,) = paper_figures.draw_cost(summary, cost).axes
            handles, labels = axes.get_legend_handles_labels()
            assert labels == ["base", "CLCA"] and sorted(texts(axes)) == ["25", "50"]
            for handle, offset in zip(handles, (0.0, 20.0), strict=True):
                points = {tuple(point.round(3)) for point in handle[0].get_xydata()}
                y = [43.5 + offset, 46.0 + offset]
                assert points == set(zip(x, y if cost == "gmacs" else y[::-1], strict=True))
        with pytest.raises(ValueError, match="`model_images_per_second`"):
            paper_figures.draw_cost(summary, "model_images_per_second")


def test_other_factors_have_panels_and_not_too_many(study):
    summary = read_summary(PUBLISHED)
    with style():
        figure = paper_figures.draw_bars(matching(summary, ["backbone=DINO"]))
        titles = [axes.get_title() for axes in figure.axes if axes.axison]
        assert titles == ["cotton", "soyageing", "soygene", "soyglobal", "soylocal"]
        heights = [patch.get_height() for patch in figure.axes[0].containers[-1]]
        assert heights == pytest.approx([53.89, 62.78, 65.56, 67.92, 67.08])  # CLCA on Cotton, as published
        with pytest.raises(ValueError, match=r"45 panels.*`--where`.*`--by`"):
            paper_figures.draw_bars(summary)
        with pytest.raises(ValueError, match="needs the column variant"):
            paper_figures.draw_bars(pool(summary, ["keep_rate"]))


def test_boxes_hold_the_settings_of_a_method_and_variant():
    summary = matching(read_summary(PUBLISHED), ["keep_rate=0.1", "dataset=cotton"])
    others = [row | {"method": "topk", "mean": row["mean"] / 2} for row in summary]
    with style():
        (axes,) = paper_figures.draw_boxes(summary + others).axes
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["evit", "topk"]
        assert "9 settings per box" in axes.get_xlabel()
        medians = {line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 1.4}
        clca = statistics.median(100 * row["mean"] for row in summary if row["variant"] == "CLCA")
        assert any(value == pytest.approx(clca) for value in medians)
        assert any(value == pytest.approx(clca / 2) for value in medians) and len(medians) == 6
        with pytest.raises(ValueError, match="several settings"):
            paper_figures.draw_boxes(matching(summary, ["backbone=DINO"]))


def test_a_variant_looks_the_same_whichever_others_there_are() -> None:
    """In gray, bars differ by their hatching."""

    def hatches(*variants):
        rows = [
            {"variant": v, "keep_rate": r, "metric": "test_top1", "mean": 0.5, "std": None}
            for v in variants
            for r in (0.25, 0.5)
        ]
        with style():
            bars = paper_figures.draw_bars(rows).axes[0].containers
        return {bar.get_label(): bar.patches[0].get_hatch() for bar in bars}

    everything = hatches("base", "CLA", "CLC", "CLCA", "mine", "other")
    assert len(set(everything.values())) == 6
    for some in (("CLCA", "base"), ("CLA", "CLCA"), ("CLC", "mine")):
        assert hatches(*some) == {name: everything[name] for name in some}


def test_methods_and_variants_of_ones_own_are_drawn_too(tmp_path):
    for method in (None, "topk", "tome"):
        for head in ("vqt", "ifa"):
            write_run(
                tmp_path / f"{method}{head}",
                method=method,
                options={"head": head},
                rate=1.0 if method is None else 0.5,
            )
    rows = run_rows(read_run_records([tmp_path]).finished)
    summary = summarize(rows, "test_top1", default_factors(rows))
    summary += [row | {"method": "mine"} for row in summary if row["method"] == "tome"]
    with style():
        assert len([a for a in paper_figures.draw_cost(summary, "gmacs").axes if a.axison]) == 4  # a panel a method
        alone = matching(summary, ["variant=vqt"])
        labels = paper_figures.draw_cost(alone, "gmacs").axes[0].get_legend_handles_labels()[1]
        assert sorted(labels) == ["mine", "none", "tome", "topk"]


def test_gradients_of_runs_that_agree_share_a_name(study):
    rows = run_rows(read_run_records([study]).finished)
    arguments = ("test_top1", ["variant", "keep_rate", "dataset"])
    curve = GradientCurve.of(np.arange(1, 4), 0.1 * np.arange(1, 4))
    with style():
        with pytest.raises(ValueError, match="`record_gradients`"):
            paper_figures.draw_gradients(rows, {}, *arguments)
        curves = {row["run"]: curve for row in matching(rows, ["keep_rate=0.5"])}
        (axes,) = paper_figures.draw_gradients(rows, curves, *arguments).axes
        assert axes.get_legend_handles_labels()[1] == ["base 46.0", "CLCA 66.0"] and len(axes.lines) == 6
        assert axes.get_legend().get_title().get_text() == "Test top-1 (%)"
        other = next(row for row in rows if row["keep_rate"] == 0.25)
        with pytest.raises(ValueError, match=r"differ in variant and keep_rate.*`--where`"):
            paper_figures.draw_gradients(rows, curves | {other["run"]: curve}, *arguments)


# The command


def results(capsys, *argv: object) -> str:
    assert cli.main(["results", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_the_command_writes_tables_and_figures(study, tmp_path, capsys):
    out = tmp_path / "out"
    text = results(capsys, study, "--output", out, "--figure", "gmacs", "throughput", "ablation")
    assert "| 0.5 | CLCA | 66.00 ± 1.00 | 3 |" in text and "Unfinished runs, not in the table: 3" in text
    assert "seed=13: failed: status 1: no" in text
    names = {"results.csv", "summary.csv", "results.md"}
    names |= {f"{n}.{kind}" for n in ("gmacs", "throughput", "ablation") for kind in ("png", "pdf")}
    assert {path.name for path in out.iterdir()} == names
    assert Image.open(out / "gmacs.png").size[0] > 500 and (out / "gmacs.pdf").read_bytes()[:4] == b"%PDF"
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0]["test_top1"] == "0.425" and rows[0]["gmacs"] == "0.25"
    assert (out / "results.md").read_text().strip() in text
    # figures from the summary alone
    shutil.rmtree(study)
    text = results(
        capsys, out / "summary.csv", "--where", "keep_rate=0.5", "--figure", "ablation", "--output", tmp_path / "b"
    )
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"ablation.png", "ablation.pdf"}
    assert "keep_rate 0.5" in text
    results(capsys, out / "summary.csv", "--figure", "ablation", "--output", tmp_path / "c" / "bars.svg")
    assert "<svg" in (tmp_path / "c" / "bars.svg").read_text()


def test_one_file_and_other_columns(study, tmp_path, capsys):
    text = results(capsys, study, "--by", "variant", "--metric", "macro_f1", "--output", tmp_path / "a.md")
    assert "| CLCA | 32.38 ± " in text and "Test macro-F1 (%)" in (tmp_path / "a.md").read_text()
    results(capsys, study, "--output", tmp_path / "runs.csv")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 13
    assert "Warning" not in results(capsys, study)
    shutil.copytree(study / "variant=base,keep_rate=0.5,seed=1", study / "copy")
    assert "same settings and the same seed" in results(capsys, study)


def test_when_nothing_is_finished_that_is_said(study, capsys):
    for folder in study.glob("variant*"):
        shutil.rmtree(folder)
    assert "There is no finished run." in (text := results(capsys, study)) and "alone: interrupted" in text


@pytest.mark.parametrize(
    "options, words",
    [
        (["--by", "varian"], "did you mean variant?"),
        (["--metric", "top7"], "`--metric` top7"),
        (["--figure", "gmacs"], "`--figure` requires `--output`"),
        (["--output", "x.png"], "`--output` x.png"),
        (["--figure", "pie", "--output", "x"], "invalid choice: 'pie'"),
        (["--figure", "box", "--output", "x"], "several settings"),
        (["--figure", "gradients", "--output", "x"], "`record_gradients`"),
        (["--where", "variant=x"], "`--where`"),
    ],
)
def test_mistakes_end_the_command_with_one_sentence(study, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        results(capsys, study, *options)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()  # nothing was written
