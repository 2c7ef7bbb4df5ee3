"""Sweeps: which runs a grid has, what is refused before anything runs, and a queue that survives failures and interruption.

Most queues here run a stub in place of run_ufgir.py; one real run goes all the way to its record, its log and TensorBoard.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from ufgir.cli import entry as cli
from ufgir.runs import queue as run_queue
from ufgir.runs.queue import RunQueue, make_slots, stop_processes
from ufgir.runs.records import MANIFEST, RECORD, read_run_records
from ufgir.runs.sweep import VARIANTS, Grid, parse_set, parse_variant, run_name


RECIPE = {
    "dataset": "synthetic_leaves",
    "synthetic_num_classes": 2,
    "synthetic_images_per_class": [2, 1, 1],
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "reduction": "evit",
    "reduction_layers": [1],
    "keep_rate": 0.5,
    "do_train": True,
    "do_predict": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
}

# Does what the name of its folder says: fails, saves a checkpoint and waits to be killed, or writes a record.
STUB = """
import json, os, pathlib, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
folder = pathlib.Path(options["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}) + "\\n")
print("working on", folder.name)
if "seed=13" in folder.name:
    sys.exit("ValueError: thirteen")
if "seed=7" in folder.name and "resume_from_checkpoint" not in options:
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    (folder / "waits").touch()
    time.sleep(60)
if "seed=5" in folder.name or "seed=6" in folder.name:  # wait for each other
    other = folder.with_name(folder.name.translate({ord("5"): "6", ord("6"): "5"}))
    for _ in range(100):
        if (other / "calls.jsonl").exists():
            break
        time.sleep(0.1)
    else:
        sys.exit("alone")
record = {"settings": {}, "config": {}, "metrics": {}, "split_sizes": {}, "macs": 1, "seed": 1}
(folder / "run.json").write_text(json.dumps(record))
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def stub(tmp_path) -> list[str]:
    (tmp_path / "stub.py").write_text(STUB)
    return [sys.executable, "-S", str(tmp_path / "stub.py")]


@pytest.fixture
def queue(recipe, stub, tmp_path, monkeypatch):
    """Create the queue of a grid in the folder `study`, for the stub."""
    monkeypatch.setattr(run_queue, "POLL", 0.02)
    # the stub's checkpoints hold no weights
    monkeypatch.setattr(run_queue, "last_complete_checkpoint", lambda f: next(Path(f).glob("checkpoint-*"), None))
    return lambda *sets, variants=(): RunQueue(Grid(recipe, sets, variants), tmp_path / "study", stub)


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def statuses(study: Path) -> dict[str, str]:
    runs = json.loads((study / MANIFEST).read_text())["runs"]
    return {name: run["status"] for name, run in runs.items()}


CPU = [run_queue.Slot("cpu", {})]


# Which runs


@pytest.mark.parametrize(
    "text, labels",
    [
        ("keep_rate=0.1,0.25", ["0.1", "0.25"]),
        ("--keep-rate=0.1", ["0.1"]),
        ("reduction_layers=3 6 9,2 5 8", ["3 6 9", "2 5 8"]),
        ("reduction_layers=[3, 6, 9],[2, 5, 8]", ["[3, 6, 9]", "[2, 5, 8]"]),
        ('reduction_kwargs={"a": 1, "b": 2},{"a": "x,y"}', ['{"a": 1, "b": 2}', '{"a": "x,y"}']),
        ('reduction_kwargs={"a": "}", "b": 2}', ['{"a": "}", "b": 2}']),
    ],
)
def test_commas_stand_between_alternatives_and_not_inside_a_value(text, labels):
    assert [choice.label for choice in parse_set(text)[1]] == labels


def test_a_variant_sets_several_options_together():
    name, options = parse_variant("clca")
    assert (name, options) == ("clca", {"cross_layer_cache": "true", "num_clr_tokens": "1", "head": "cla"})
    own = parse_variant("small:hidden_size=96,reduction_layers=[1, 2]")
    assert own == ("small", {"hidden_size": "96", "reduction_layers": "[1, 2]"})


def test_every_combination_is_a_run_and_its_command_line_says_so(recipe, tmp_path):
    sets = ["keep_rate=0.5 0.25,0.7", "seed=1,10", "reduction_layers=[0, 1]"]
    runs = Grid(recipe, sets, list(VARIANTS)).runs(tmp_path)
    assert len({run.name for run in runs}) == len(runs) == 4 * 2 * 2
    assert runs[0].name == "variant=base,keep_rate=0.5-0.25,reduction_layers=0-1,seed=1"
    assert runs[1].name.endswith("seed=10") and runs[-1].name.startswith("variant=clca")
    settings = [run.settings for run in runs]
    assert [s["keep_rate"] for s in settings[:4]] == [[0.5, 0.25], [0.5, 0.25], [0.7], [0.7]]
    assert {(s["cross_layer_cache"], s["num_clr_tokens"], s["head"]) for s in settings} == {
        (False, 0, "linear"),
        (True, 1, "linear"),
        (False, 0, "cla"),
        (True, 1, "cla"),
    }
    assert all(s["reduction_layers"] == [0, 1] and s["hidden_size"] == 16 for s in settings)
    assert "--keep_rate" in runs[0].options and "0.25" in runs[0].options and "--seed=1" in runs[0].options


def test_names_are_readable_and_do_not_depend_on_the_order_of_the_options():
    assert run_name({"seed": "1", "keep_rate": "0.1", "variant": "a"}) == "variant=a,keep_rate=0.1,seed=1"
    assert run_name({"head": "cla", "seed": "1"}) == run_name({"seed": "1", "head": "cla"}) == "head=cla,seed=1"
    assert run_name({"model_name_or_path": "a/b c"}) == "model_name_or_path=a_b-c"
    long = [run_name({"model_name_or_path": "x" * 300 + end}) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) <= 160


@pytest.mark.parametrize(
    "sets, variants, words",
    [
        (["keep_rat=0.1"], [], ["`keep_rat`", "did you mean keep_rate?"]),
        (["keep_rate=half"], [], ["keep_rate=half", "'half'"]),
        (["keep_rate=0.5,1.5"], [], ["keep_rate=1.5", "`keep_rate`", "(0, 1]"]),
        (["reduction=evit,evot"], [], ["reduction=evot", "`reduction`", "topk"]),
        (["keep_rate=0.5,0.50"], [], ["keep_rate=0.5", "keep_rate=0.50", "same run"]),
        (["keep_rate=0.5,0.5"], [], ["`keep_rate`", "more than once"]),
        (["keep_rate=0.5,,0.7"], [], ["`--set`", "empty value"]),
        (["keep_rate="], [], ["`--set`", "OPTION=VALUE"]),
        (["keep_rate"], [], ["`--set`", "OPTION=VALUE"]),
        (["seed=1", "seed=2"], [], ["`seed` twice", "seed=A,B"]),
        (["output_dir=a,b"], [], ["`output_dir`", "set by the sweep"]),
        (["head=cla"], ["clca"], ["`head`", "both `variant` and `head`"]),
        ([], ["clac"], ["`--variant`", "'clac'", "did you mean clc?"]),
        ([], ["a:head=cla,head=linear"], ["`--variant`", "once"]),
        ([], [], ["nothing to sweep over", "`--set`"]),
        (["do_train=false", "do_predict=false"], [], ["nothing to do", "`do_train`"]),
    ],
)
def test_mistakes_are_reported_before_anything_runs(recipe, tmp_path, sets, variants, words):
    with pytest.raises(ValueError) as error:
        Grid(recipe, sets, variants).runs(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_an_option_without_effect_in_some_runs_is_named_and_left_out_there(recipe, tmp_path, caplog):
    import run_ufgir

    recipe.write_text(yaml.safe_dump(RECIPE | {"num_pictures": 0}))
    sets = ["mixup_alpha=0,0.8", "mix_switch_probability=0.3", "lora_targets=mlp"]
    off, on = Grid(recipe, sets).runs(tmp_path)
    assert off.options == ["--mixup_alpha=0"] and on.options == ["--mixup_alpha=0.8", "--mix_switch_probability=0.3"]
    assert off.settings["mix_switch_probability"] == on.settings["mix_switch_probability"] == 0.3
    assert "`mix_switch_probability` has no effect in 1 of 2 runs" in caplog.text
    assert "`lora_targets` has no effect in 2 of 2 runs" in caplog.text and "it needs a `lora_rank`" in caplog.text
    assert "test" in run_ufgir.main([str(recipe), *off.options, "--output_dir", str(tmp_path / "off")])
    # nothing is reduced at any keep rate
    caplog.clear()
    dense, half = Grid(recipe, ["reduction=none,topk", "keep_rate=0.5"]).runs(tmp_path)
    assert "--keep_rate" in half.options and dense.options == ["--reduction=none"]
    assert "`keep_rate` has no effect in 1 of 2 runs" in caplog.text
    # an option may need another option that has no effect itself
    caplog.clear()
    (run,) = Grid(recipe, ["do_train=false", "teacher=x", "distillation=hard"]).runs(tmp_path)
    assert run.options == ["--do_train=false"]
    assert "`teacher` has no effect" in caplog.text and "`distillation` has no effect" in caplog.text


# Where they run


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = [(slot.device, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in make_slots(["all"], jobs=2)]
    assert seen == [("cuda:0", "4")] * 2 + [("cuda:1", "7")] * 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert make_slots()[0] == ("cuda:0", {"CUDA_VISIBLE_DEVICES": "0"})  # not both: Trainer would split each batch
    with pytest.raises(ValueError, match="cuda:0, cuda:1, cpu, got 'cuda:2'"):
        make_slots(["cuda:2"])
    with pytest.raises(ValueError, match="twice"):
        make_slots(["cuda:1", "cuda:1"])
    with pytest.raises(ValueError, match="`--jobs`"):
        make_slots(["cpu"], jobs=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert make_slots(jobs=2) == [("cpu", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"})] * 2
    with pytest.raises(ValueError, match="no GPU"):
        make_slots(["all"])


def test_runs_are_at_work_at_the_same_time(queue, tmp_path):
    """Each of the two runs waits until the other one has started."""
    both = queue("seed=5,6")
    both.work([run_queue.Slot("a", {"PLACE": "a"}), run_queue.Slot("b", {"PLACE": "b"})])
    assert not both.failed
    assert {calls(tmp_path / "study" / f"seed={n}")[0]["env"]["PLACE"] for n in (5, 6)} == {"a", "b"}


# The queue


def test_failures_stay_apart_and_the_rest_goes_on(queue, tmp_path, caplog):
    caplog.set_level("INFO", logger="ufgir")
    first = queue("seed=1,13,2")
    first.work(CPU)
    study = tmp_path / "study"
    assert first.failed == ["seed=13"]
    assert statuses(study) == {"seed=1": "finished", "seed=13": "failed", "seed=2": "finished"}
    assert "status 1: ValueError: thirteen" in first.summary() and "2 finished, 1 failed" in first.summary()
    assert "working on seed=13" in (study / "logs" / "seed=13.log").read_text()
    assert "seed=13: failed" in caplog.text
    records = read_run_records([study])
    assert [r["folder"] for r in records.finished] == [str(study / "seed=1"), str(study / "seed=2")]
    assert records.unfinished == {study / "seed=13": "failed: status 1: ValueError: thirteen"}

    argv = calls(study / "seed=1")[0]["argv"]
    assert argv[:2] == [str(study / "recipe.yaml"), "--seed=1"] and "--overwrite_output_dir=true" in argv
    assert "--run_name=study/seed=1" in argv and (study / "recipe.yaml").read_text() == yaml.safe_dump(RECIPE)
    # again, with one value more: what is finished is left alone, what failed is tried again
    again = queue("seed=1,13,2,3")
    assert [row[1] for row in again.table()] == ["finished", "start", "finished", "start"]
    again.work(CPU)
    assert [len(calls(study / f"seed={n}")) for n in (1, 13, 2, 3)] == [1, 2, 1, 1]
    assert again.failed == ["seed=13"]


def test_no_more_runs_after_too_many_failures(queue, tmp_path):
    stopped = queue("seed=1,13,2")
    stopped.work(CPU, max_failures=1)
    assert statuses(tmp_path / "study") == {"seed=1": "finished", "seed=13": "failed", "seed=2": "waiting"}
    assert "1 waiting" in stopped.summary()


def test_a_run_without_a_record_has_failed(queue, stub, tmp_path):
    Path(stub[-1]).write_text("print('that is all')")
    lazy = queue("seed=1")
    lazy.work(CPU)
    assert "ended without a run.json: that is all" in lazy.summary()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_runs_and_is_taken_up_again(queue, tmp_path, number):
    study = tmp_path / "study"

    def interrupt():
        while not (study / "seed=7" / "waits").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    begun = queue("seed=1,7,2")
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        begun.work(CPU)
    assert statuses(study) == {"seed=1": "finished", "seed=7": "interrupted", "seed=2": "waiting"}
    with pytest.raises(ProcessLookupError):  # it is gone
        os.kill(calls(study / "seed=7")[0]["pid"], 0)
    assert read_run_records([study]).unfinished == {study / "seed=7": "interrupted", study / "seed=2": "waiting"}

    again = queue("seed=1,7,2")
    assert [row[1] for row in again.table()] == ["finished", "resume", "start"]
    again.work(CPU)
    assert set(statuses(study).values()) == {"finished"}
    argv = calls(study / "seed=7")[1]["argv"]
    assert "--resume_from_checkpoint=true" in argv and "--overwrite_output_dir=true" not in argv


def test_a_process_that_does_not_end_is_killed():
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        stop_processes([process], grace=0.1)
        assert process.returncode == -signal.SIGKILL


def test_two_sweeps_on_one_folder_refuse_each_other(queue, tmp_path):
    one, other = queue("seed=1"), queue("seed=1")
    one.output.mkdir()
    with run_queue._lock(one.output / run_queue.LOCK) as lock:
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            other.work(CPU)
        left_behind = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:  # the sweep is gone, killed perhaps, but one of its runs is still running
        with pytest.raises(ValueError, match="in use by"):
            other.work(CPU)
    finally:
        left_behind.kill()
        left_behind.wait()
    other.work(CPU)
    assert not other.failed


def test_a_system_without_locks_that_runs_inherit_is_refused(queue, monkeypatch):
    """Such as Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ValueError, match="`ufgir sweep` needs Linux or macOS"):
        queue("seed=1").work(CPU)


def test_a_folder_of_something_else_is_refused(queue, recipe, tmp_path):
    study = tmp_path / "study"
    queue("seed=1").work(CPU)
    recipe.write_text(yaml.safe_dump(RECIPE | {"num_train_epochs": 2, "learning_rate": 1e-3}))
    with pytest.raises(ValueError, match=r"`num_train_epochs` \(1.0 in .*, 2.0 now\), `learning_rate`"):
        queue("seed=1")
    recipe.write_text("# another comment\n" + yaml.safe_dump(RECIPE))
    queue("seed=1")
    (study / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="is not a manifest written by"):
        queue("seed=1")
    (study / MANIFEST).unlink()
    with pytest.raises(ValueError, match="do not belong to a sweep"):
        queue("seed=1")


# The command


def test_a_dry_run_lists_the_runs_and_writes_nothing(recipe, tmp_path, capsys):
    options = ["--set", "keep_rate=0.5,0.7", "--variant", "base", "clca", "--output", str(tmp_path / "study")]
    assert cli.main(["sweep", str(recipe), *options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "variant=clca,keep_rate=0.7  start" in text and "4 runs: 4 to start" in text
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--set", "keep_rat=1"], "did you mean keep_rate?"),
        (["--set", "seed=1", "--jobs", "0"], "`--jobs`"),
        (["--set", "seed=1", "--devices", "gpu"], "`--devices`"),
        (["--set", "seed=1", "--max-failures", "0"], "`--max-failures`"),
    ],
)
def test_mistakes_end_the_command_with_one_sentence(recipe, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", str(recipe), "--output", str(tmp_path / "study"), *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_real_run_to_its_record_and_tensorboard(recipe, tmp_path, capsys):
    """Two runs, of which one fails because it has fewer images than a batch."""
    recipe.write_text(yaml.safe_dump(RECIPE | {"report_to": "tensorboard", "logging_steps": 1, "num_pictures": 0}))
    study, options = (
        tmp_path / "study",
        ["--set", "per_device_train_batch_size=2,64", "--devices", "cpu", "--jobs", "2"],
    )
    assert cli.main(["sweep", str(recipe), "--output", str(study), *options]) == 1
    text = capsys.readouterr().out
    assert (
        "1 finished, 1 failed" in text and "`per_device_train_batch_size` times the number of processes is 64" in text
    )
    records = read_run_records([study])
    (record,) = records.finished
    assert record["settings"]["per_device_train_batch_size"] == 2 and record["config"]["reduction"] == "evit"
    assert "top1" in record["metrics"]["test"] and record["split_sizes"]["train"] == 4
    assert 0 < record["macs"] < record["dense_macs"] and record["train_seconds"] > 0
    assert record["peak_memory"]["host"] > 2**20 and record["versions"]["torch"] == torch.__version__
    assert record["images_per_second"]["test"] > 0 and "run_ufgir.py" in record["command"]
    (events,) = (study / "tensorboard" / "per_device_train_batch_size=2").glob("events.out.tfevents.*")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events)).Reload()
    assert len(board.Scalars("train/loss")) == 2  # steps
    assert not (study / "per_device_train_batch_size=64" / RECORD).exists()
