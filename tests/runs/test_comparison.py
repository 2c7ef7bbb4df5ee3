"""Comparison of runs with a baseline, and summaries that replace the folders of runs."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.run_folders import VARIANTS, write_gradients, write_predictions, write_run
from ufgir.cli import entry as cli
from ufgir.runs.details import gradients_of, outcomes_of
from ufgir.runs.summaries import read_runs, read_summary_file, write_summary_file
from ufgir.runs.tables import run_rows


IMAGES = 40
SEEDS = (1, 10, 100)
STEPS = 240


def right_images(variant: str, rate: float, seed: int) -> np.ndarray:
    """CLCA is right on 8 images more than base, whatever the seed; each seed is wrong on other images."""
    count = 18 + 8 * (variant == "CLCA") + int(4 * rate)
    return np.random.default_rng(seed).permutation(IMAGES) < count


def write_study(folder: Path) -> Path:
    for variant in ("base", "CLCA"):
        for rate in (0.25, 0.5):
            for seed in SEEDS:
                place = folder / f"variant={variant},keep_rate={rate},seed={seed}"
                right = right_images(variant, rate, seed)
                write_run(place, seed, right.mean(), rate=rate, options=VARIANTS[variant])
                write_predictions(place, right)
                scale = 0.5 if variant == "CLCA" else 1.0
                write_gradients(place, scale * (2 + np.sin(np.arange(STEPS) / 5 + seed)))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("original"))


@pytest.fixture
def study(original, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(original, Path("runs/study"))


def results(capsys, *argv: object) -> str:
    assert cli.main(["results", *map(str, argv)]) == 0
    return capsys.readouterr().out


def error(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["results", *map(str, argv)])
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.count("\n") == 1
    return text


def cells(text: str, first: str) -> dict[str, str]:
    """Title -> cell of the first line of a table that begins so."""
    lines = text.splitlines()
    found = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    head = max(i for i in range(found) if lines[i].startswith("| ---")) - 1
    titles, values = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (head, found))
    return dict(zip(titles, values, strict=True))


# Differences, intervals, tests


def test_differences_to_a_baseline(study, capsys):
    text = results(capsys, study, "--baseline", "variant=base", "--resamples", 500)
    row = cells(text, "0.25 | CLCA")
    assert row["difference to base"] == "+20.00 ± 0.00" and row["pairs won"] == "3 of 3"  # 8 of 40 images
    assert row["significant"] == "yes" and float(row["p"]) < 0.01 and float(row["p (Holm)"]) >= float(row["p"])
    low, high = map(float, row["95 % interval of the difference"].split(" to "))
    assert 0 < low < 20 < high
    assert cells(text, "0.25 | base")["difference to base"] == ""
    assert "corrected for the 2 comparisons" in text and "excludes 0" in text
    # the right images of CLCA include those of base, see `right_images`
    test = cells(text, "0.25 | CLCA | 10")
    assert (test["only this right"], test["only base right"]) == ("8", "0")
    assert float(test["p"]) == pytest.approx(2 / 2**8, rel=0.01)
    assert float(test["p (Holm)"]) == pytest.approx(6 * 2 / 2**8, rel=0.01)


def test_a_baseline_of_several_columns_and_pooled_rows(study, capsys):
    text = results(capsys, study, "--baseline", "variant=base,keep-rate=0.25", "--resamples", 100)
    row = cells(text, "0.5 | CLCA")
    assert (row["difference to base, 0.25"], row["pairs won"]) == ("+22.50 ± 0.00", "3 of 3")
    text = results(capsys, study, "--by", "variant", "--baseline", "base", "--resamples", 100)
    pooled = cells(text, "CLCA")
    assert (pooled["difference to base"], pooled["pairs won"]) == ("+20.00 ± 0.00", "6 of 6")
    assert "| 0.25 | CLCA | 10 |" in text or "| CLCA | 0.25 | 10 |" in text  # McNemar: pairs are not pooled
    mirrored = cells(results(capsys, study, "--by", "variant", "--baseline", "clca", "--resamples", 100), "base")
    assert (mirrored["difference to CLCA"], mirrored["pairs won"]) == ("-20.00 ± 0.00", "0 of 6")
    low, high = pooled["95 % interval of the difference"].split(" to ")
    assert mirrored["95 % interval of the difference"] == f"{high} to {low}".replace("+", "-")
    assert mirrored["p"] == pooled["p"]


def test_differences_of_other_metrics(study, capsys):
    text = results(capsys, study, "--metric", "largest_gradient_median_last_third", "--baseline", "base")
    row = cells(text, "0.5 | CLCA")
    assert row["pairs higher"] == "0 of 3" and row["difference to base"].startswith("-1.") and "significant" not in row
    assert "Intervals" not in text and "McNemar" not in text


def test_one_seed_and_intervals_alone(study, capsys):
    text = results(capsys, study, "--where", "seed=1", "--baseline", "base", "--resamples", 100)
    row = cells(text, "0.5 | CLCA")
    assert row["difference to base"] == "+20.00" and row["significant"] == "yes"
    assert "of images only, where there is one seed" in text
    text = results(capsys, study, "--intervals")
    low, high = map(float, cells(text, "0.5 | CLCA")["95 % interval"].split(" to "))
    assert low < 100 * right_images("CLCA", 0.5, 1).mean() < high and "10,000" in text and "ifference" not in text


def test_runs_without_predictions_or_partner(study, capsys):
    for place in study.glob("*keep_rate=0.5,seed=10"):
        (place / "predictions.csv").unlink()
    shutil.rmtree(next(study.glob("*base,keep_rate=0.25,seed=1")))
    text = results(capsys, study, "--baseline", "base", "--resamples", 100)
    partly, without = cells(text, "0.25 | CLCA"), cells(text, "0.5 | CLCA")
    assert partly["pairs won"] == "2 of 2" and partly["runs"] == "3" and partly["significant"] == "yes"
    assert without["pairs won"] == "3 of 3" and without["significant"] == without["95 % interval"] == ""
    assert "No interval of the difference for 0.5 CLCA" in text and "seed=10 has no predictions" in text
    assert "| 0.5 | CLCA | 1 |" in text and "| 0.5 | CLCA | 10 |" not in text  # McNemar where it is possible


def test_rows_whose_runs_cannot_be_resampled_together(study, capsys):
    shutil.rmtree(study / "variant=base,keep_rate=0.5,seed=1")
    place = study / "variant=CLCA,keep_rate=0.25,seed=1"
    write_predictions(place, right_images("CLCA", 0.25, 1), file="other{}.png")
    text = results(capsys, study, "--intervals", "--by", "variant", "--resamples", 100)
    assert cells(text, "base")["Test top-1 (%)"].startswith("48") and "95 % interval" not in text.split("Intervals")[0]
    assert "No interval for base: some seeds have more runs than others." in text
    assert "tested on different images" in text.split("No interval for CLCA:")[1]


def test_pairs_that_cannot_be_compared(study, capsys):
    assert "`variant`: no column" not in error(capsys, study, "--baseline", "variant=cla")
    assert "matches no run; values of variant: CLCA; base" in error(capsys, study, "--baseline", "cla")
    assert "did you mean variant?" in error(capsys, study, "--baseline", "varian=base")
    assert "must be COLUMN=VALUE" in error(capsys, study, "--baseline", "")
    assert "Add it to `--by`" in error(capsys, study, "--baseline", "base", "--by", "keep_rate")
    assert "`--resamples` must be at least" in error(capsys, study, "--baseline", "base", "--resamples", 3)
    assert "`--resamples` has no effect" in error(capsys, study, "--resamples", 300)
    assert "`--metric` top1" in error(capsys, study, "--intervals", "--metric", "macro_f1")
    place = study / "variant=CLCA,keep_rate=0.5,seed=1"
    write_predictions(place, right_images("CLCA", 0.5, 1), file="other{}.png")
    assert "were tested on different images" in error(capsys, study, "--baseline", "base")
    shutil.copytree(study / "variant=base,keep_rate=0.5,seed=1", study / "copy")
    assert "cannot be paired" in error(capsys, study, "--baseline", "base")


def test_predictions_that_do_not_belong_to_the_record(study, caplog):
    place = study / "variant=CLCA,keep_rate=0.5,seed=1"
    (record,) = read_runs([place]).finished
    assert outcomes_of(record).right.tolist() == right_images("CLCA", 0.5, 1).tolist()
    write_predictions(place, np.zeros(IMAGES, dtype=bool))
    assert outcomes_of(record) is None and "does not have the top-1" in caplog.text
    write_predictions(place, [True, False, True])  # cut off; the record says 28 of 40
    assert outcomes_of(record) is None
    write_predictions(place, right_images("CLCA", 0.5, 1), name="later.csv")  # of a later evaluation
    evaluations = [{"settings": {"predictions_file": "later.csv"}}]
    content = json.loads((place / "run.json").read_text()) | {"evaluations": evaluations}
    (place / "run.json").write_text(json.dumps(content))
    assert outcomes_of(record).right.sum() == 28
    (place / "later.csv").unlink()
    (place / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"predictions\.csv is not a file of predictions"):
        outcomes_of(record)
    assert outcomes_of(record | {"metrics": {"test": {"map": 0.5}}}) is None


# Summaries


def test_a_summary_gives_the_same_tables_as_the_folders(study, capsys):
    options = ("--baseline", "variant=base", "--resamples", 200)
    folders = results(capsys, study, *options, "--output", "a.csv")
    assert "wrote runs/study.json" in results(capsys, study, "--summary", "runs/study.json")
    shutil.rmtree(study)
    assert results(capsys, "runs/study.json", *options, "--output", "b.csv").replace("b.csv", "a.csv") == folders
    assert Path("b.csv").read_text() == Path("a.csv").read_text()
    # a file written from a file is the same file
    results(capsys, "runs/study.json", "--summary", "again.json")
    assert Path("again.json").read_text() == Path("runs/study.json").read_text()
    assert Path("again.json").stat().st_size < 12 * 6000


@pytest.mark.slow
def test_a_summary_gives_the_same_files_and_figures(study, capsys):
    options = ("--baseline", "base", "--where", "keep_rate=0.5", "--figure", "gradients", "ablation")
    results(capsys, study, "--summary", "s.json")
    for source, folder in ((study, "a"), ("s.json", "b")):
        results(capsys, source, *options, "--output", folder)
    names = {path.name for path in Path("a").iterdir()}
    assert names == {path.name for path in Path("b").iterdir()} >= {"gradients.png", "pairs.csv"}
    for name in ("results.csv", "summary.csv", "pairs.csv", "results.md", "ablation.png"):
        assert Path("b", name).read_bytes() == Path("a", name).read_bytes(), name
    with Path("a/pairs.csv").open() as file:
        assert [row["difference"] for row in csv.DictReader(file)] == ["0.2"] * 3
    # the intervals of a summary.csv are shown again
    again = cells(results(capsys, "a/summary.csv"), "CLCA")
    assert again == cells(Path("a/results.md").read_text(), "CLCA")


def test_a_summary_stores_common_settings_once_and_nothing_of_the_machine(study, tmp_path):
    elsewhere = [r | {"command": f"/elsewhere/{r['command']}"} for r in read_runs([study.absolute()]).finished]
    path = write_summary_file(tmp_path / "s.json", elsewhere)
    content = json.loads(path.read_text())
    assert content["shared"]["settings"]["learning_rate"] == 1e-3 and content["shared"]["config"]["hidden_size"] == 16
    assert all("learning_rate" not in run["settings"] for run in content["runs"])
    assert content["runs"][0]["settings"].keys() >= {"seed", "keep_rate", "head"}
    assert str(tmp_path) not in path.read_text() and "elsewhere" not in path.read_text()
    assert len(path.read_text().splitlines()) == len(content["runs"]) + 4
    outcomes = content["runs"][0]["outcomes"]
    assert outcomes["count"] == IMAGES and len(outcomes["right"]) == IMAGES // 4
    records, read = read_runs([study]).finished, read_summary_file(path)
    assert run_rows(read, gradients=True) == run_rows(records, gradients=True)
    for record in read:
        (other,) = [r for r in records if r["folder"] == record["folder"]]
        assert other == {name: value for name, value in record.items() if name not in ("outcomes", "gradients")}
        assert outcomes_of(record).images == outcomes_of(other).images
        assert (outcomes_of(record).right == outcomes_of(other).right).all()
        here, there = gradients_of(record), gradients_of(other)
        assert here.statistics == there.statistics
        # the curve is shorter, its peaks and its level are those of the whole
        assert len(here.curve.values) == len(here.curve.level) == 100 < len(there.curve.values)
        assert here.curve.values.max() == pytest.approx(there.curve.values.max(), rel=1e-3)
        at = np.searchsorted(there.curve.level_steps, here.curve.level_steps)
        assert here.curve.level == pytest.approx(there.curve.level[at], rel=1e-3)


def test_summaries_and_folders_together(study, tmp_path, capsys):
    results(capsys, study, "--summary", "all.json")
    gone = study / "variant=base,keep_rate=0.25,seed=1"
    shutil.rmtree(gone)
    both = read_runs([study, "all.json", "all.json"])
    assert len(both.finished) == 12  # one of them from the file only
    assert "contains runs that are not among the sources (1)" in error(capsys, study, "--summary", "all.json")
    results(capsys, study, "all.json", "--summary", "all.json")
    assert len(read_summary_file(Path("all.json"))) == 12
    # the same study of another machine: other runs in folders of the same names
    for place in study.iterdir():
        record = json.loads((place / "run.json").read_text())
        (place / "run.json").write_text(json.dumps(record | {"host": "another"}))
    results(capsys, study, "--summary", "other.json")
    assert len({r["folder"] for r in read_runs(["all.json", "other.json"]).finished}) == 12 + 11
    results(capsys, study, "--where", "variant=CLCA", "--summary", "some.json")
    assert len(read_summary_file(Path("some.json"))) == 6


def test_runs_without_details_and_interrupted_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("s/a"), resumed_from="/somewhere/checkpoint-3")
    write_gradients(Path("s/a"), [1.0, float("nan")])
    Path("s/b/checkpoint-1").mkdir(parents=True)
    text = results(capsys, "s", "--summary", "s.json")
    assert "s/b: interrupted" in text
    (record,) = read_summary_file(Path("s.json"))
    assert outcomes_of(record) is None and record["resumed_from"] == "checkpoint-3"
    assert np.isnan(gradients_of(record).curve.values[1]) and "NaN" not in Path("s.json").read_text()
    assert "No interval for the only row" in results(capsys, "s.json", "--intervals")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "could not be read"),
        ("[1]", "is not a summary"),
        ('{"format": "another"}', "is not a summary"),
        ('{"format": "ufgir runs, version 1", "shared": {}, "runs": [{}]}', "damaged summary.*a run lacks config"),
        ('{"format": "ufgir runs, version 1", "shared": {}, "runs": []}', "has no runs"),
        ('{"format": "ufgir runs, version 1"}', "damaged summary"),
    ],
)
def test_files_that_are_no_summaries(tmp_path, content, words):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_runs([tmp_path / "s.json"])


def test_wrong_sources(study, capsys):
    assert "nowhere.json could not be read" in error(capsys, "nowhere.json")
    assert "must be a file that ends in .json" in error(capsys, study, "--summary", "a.csv")
    Path("a.csv").write_text("metric,mean,std,n,variant\ntest_top1,0.5,,1,base\n")
    assert "`--baseline` requires runs" in error(capsys, "a.csv", "--baseline", "base")
    assert "several sources must be runs" in error(capsys, "a.csv", study)
    results(capsys, study, "--summary", "s.json")
    content = json.loads(Path("s.json").read_text())
    content["runs"][0]["outcomes"]["right"] = "ff"
    Path("s.json").write_text(json.dumps(content))
    assert "damaged summary" in error(capsys, "s.json")
