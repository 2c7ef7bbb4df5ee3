"""Kill trainings and predictions at random moments, resume them, and compare the results with uninterrupted runs.

The parent process has imported everything, and each try is a fork of it, which makes tries cheap. Half of the tries
are killed after a random time, half before or after a random call of a function that writes, trains or evaluates
(`POINTS`). Some are killed twice.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import modeling_utils

import run_ufgir
from tests.faults.results import Result
from tests.script import helpers
from ufgir.cli import entry
from ufgir.evaluation import prediction
from ufgir.runs.queue import RunQueue
from ufgir.runs.sweep import Grid
from ufgir.training.trainer import UFGIRTrainer


SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMEOUT = 300.0  # seconds after which a try counts as hanging
EXIT_GRACE = 20.0  # seconds for one of two processes to end after the other
MODEL: dict[str, Any] = {**helpers.MODEL, "hidden_dropout_prob": 0.1}
TRAINING: dict[str, Any] = {
    **helpers.TRAINING,
    "do_predict": True,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_total_limit": 2,
    "num_pictures": 2,
}
DENSE = {"reduction": "none", "keep_rate": None, "reduction_layers": None}
PLAIN = {"cross_layer_cache": False, "num_clr_tokens": 0, "head": "linear"}

# name -> changes to MODEL and TRAINING
TRAININGS: dict[str, dict[str, Any]] = {
    "evit, cache and CLA head": {},
    "dense, linear head": {**DENSE, **PLAIN},
    "tome, linear head": {"reduction": "tome", **PLAIN},
    "dyvit, cache": {"reduction": "dyvit", "head": "linear"},
    "topk, IFA head": {"reduction": "topk", "head": "ifa"},
    "sinkhorn, VQT head": {"reduction": "sinkhorn", "head": "vqt"},
    "ats, H2T head": {"reduction": "ats", "head": "h2t", "cross_layer_cache": False, "num_clr_tokens": 0},
    "EMA": {"ema_decay": 0.8, "metric_for_best_model": "ema_top1"},
    "EMA as the model": {"ema_decay": 0.8, "ema_warmup": True, "ema_as_final": True},
    "several keep rates": {"train_keep_rates": [0.3, 0.6, 1.0]},
    "MixUp, CutMix, erasing": {
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "random_erasing_probability": 0.5,
        "random_erasing_fill": "noise",
        "label_smoothing": 0.1,
    },
    "crops, repeated images, workers": {
        "random_resized_crop": 0.3,
        "repeated_augmentation": 2,
        "dataloader_num_workers": 1,
    },
    "LoRA adapter": {"lora_rank": 2, "lora_dropout": 0.1, **PLAIN},
    "frozen backbone": {"freeze": ["backbone"]},
    "backbone unfrozen after an epoch": {"freeze_epochs": 1, "layer_lr_decay": 0.8},
    "cosine_epochs schedule": {"schedule": "cosine_epochs", "warmup_epochs": 1},
    "accumulation, clipping, gradients": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "record_gradients": True,
    },
    "best and last model": {"save_last_model": True, "early_stopping_patience": 9, "optim": "sgd"},
    "teacher": {"teacher": "{trained}"},
    "saved on a signal": {"enable_jit_checkpoint": True, "save_steps": 3},
}


class Kind(NamedTuple):
    """A kind of run to kill.

    Args:
        name: its name in the table.
        run: starts it in a folder; called in a forked process.
        resume: resumes it.
        processes: number of processes.
    """

    name: str
    run: Callable[[Path], Any]
    resume: Callable[[Path], Any]
    processes: int = 1


def make_kinds(work: Path) -> list[Kind]:
    """Return all kinds; create what they need in `work`: images, a trained model, recipes."""
    leaves, trained = helpers.draw_leaves(work / "leaves"), work / "trained" / "out"

    def recipe(name: str, **changes: Any) -> str:
        options = {"dataset": str(leaves), **MODEL, **TRAINING, **changes}
        options = {
            k: v.format(trained=trained) if isinstance(v, str) else v for k, v in options.items() if v is not None
        }
        path = work / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}.yaml"
        path.write_text(yaml.safe_dump(options), encoding="utf-8")
        return str(path)

    def training(file: str, folder: Path, *more: str) -> None:
        run_ufgir.main([file, f"--output_dir={folder / 'out'}", *more])

    def command(*words: Any) -> None:
        *argv, folder = words
        if status := entry.main([str(word).format(folder=folder) for word in argv]):
            raise SystemExit(status)

    def resumable(file: str, processes: int = 1, name: str = "") -> Kind:
        run = functools.partial(training, file)
        return Kind(name, run, lambda folder: run(folder, "--resume_from_checkpoint=auto"), processes)

    status, output = in_forks(
        [lambda: training(recipe("trained", num_train_epochs=1), work / "trained")], work / "log"
    )
    if status != [0]:
        raise RuntimeError(f"the first training failed:\n{output}")
    kinds = [resumable(recipe(name, **changes), name=name) for name, changes in TRAININGS.items()]

    file = recipe("two", per_device_train_batch_size=2)
    kinds.append(resumable(file, 2, "two processes"))

    file = recipe(
        "evaluation", do_train=False, do_eval=True, model_name_or_path="{trained}", per_device_eval_batch_size=1
    )
    kinds.append(Kind("evaluation of a model", *[functools.partial(training, file)] * 2))

    data = ("--dataset", leaves, "--split", "train", "--batch-size", "2")
    for name, *arguments in (
        ("predict", trained, leaves, "--output", "{folder}/predictions.csv", "--batch-size", "2"),
        ("analyze", trained, "--output", "{folder}/analysis", *data, "--shard-size", "4", "--assignments"),
        ("embed", trained, "--output", "{folder}/embedding", *data, "--method", "pca"),
        ("export", trained, "--output", "{folder}/model.pt2"),
        ("data-report", leaves, "--output", "{folder}/report", "--html"),
    ):
        importlib.import_module(f"ufgir.cli.{name.replace('-', '_')}")  # otherwise every fork would import it
        kinds.append(Kind(f"ufgir {name}", *[functools.partial(command, name, *arguments)] * 2))

    def member(folder: Path) -> None:
        queue = RunQueue(Grid(Path(sweep), ["seed=5,6"]), folder / "out", ["run"])
        queue._write()
        shutil.copyfile(sweep, queue.recipe)
        run = next(iter(queue.runs.values()))
        if queue.how(run) != "finished":
            run_ufgir.main(queue.command(run)[1:])

    sweep = recipe("sweep", do_predict=False)
    kinds.append(Kind("member of a sweep", member, member))
    return kinds


# Forks


def in_forks(
    jobs: Sequence[Callable[[], Any]], log: Path, ending: Callable[[list[int]], None] | None = None
) -> tuple[list[int], str]:
    """Run each job in a fork; return the exit statuses and the output of all.

    Args:
        jobs: functions; several jobs are the processes of one torchrun.
        log: file for their output.
        ending: called with the process ids, e.g. to kill them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log.write_text("")
    processes = []
    for rank, job in enumerate(jobs):
        process = os.fork()
        if process == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(jobs), "LOCAL_WORLD_SIZE": len(jobs)}
            if len(jobs) > 1:
                os.environ.update(
                    {k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                )
            _do(job, log)
        processes.append(process)
    if ending is not None:
        ending(processes)
    return _wait(processes), log.read_text(errors="replace")


def _do(job: Callable[[], Any], log: Path) -> None:
    """Run a job in a fork and exit with its status."""
    status = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(handle, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", 1) for descriptor in (1, 2))
        job()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(processes: list[int]) -> list[int]:
    """Return the exit statuses. When one of several processes ends, the others get some time to end, as with torchrun."""
    statuses: dict[int, int] = {}
    deadline, number = time.monotonic() + TIMEOUT, signal.SIGKILL
    while len(statuses) < len(processes):
        for process in processes:
            if process not in statuses and (found := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(found[1])
                if len(statuses) == 1:
                    deadline, number = min(deadline, time.monotonic() + EXIT_GRACE), signal.SIGTERM
        if time.monotonic() > deadline:
            for process in set(processes) - set(statuses):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, number)
            deadline, number = time.monotonic() + EXIT_GRACE, signal.SIGKILL
        time.sleep(0.01)
    return [statuses[process] for process in processes]


# Points to kill at


POINTS: dict[str, tuple[Any, str]] = {
    "a file gets its name": (os, "replace"),
    "a file goes to the disk": (os, "fsync"),
    "torch writes": (torch, "save"),
    "weights are written": (modeling_utils, "safe_save_file"),
    "a folder is deleted": (shutil, "rmtree"),
    "a training step": (UFGIRTrainer, "training_step"),
    "an evaluation": (UFGIRTrainer, "evaluation_loop"),
    "metrics are saved": (UFGIRTrainer, "save_metrics"),
    "a batch is predicted": (prediction, "_predict"),
}


@contextlib.contextmanager
def _hooked(what: Callable[[str, int], None], after: bool) -> Iterator[dict[str, int]]:
    """Call `what(point, number of the call)` before or after each call of each point; yield the counts."""
    counts = dict.fromkeys(POINTS, 0)
    originals = {point: getattr(*place) for point, place in POINTS.items()}

    def watched(point: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[point] += 1
            number = counts[point]
            if not after:
                what(point, number)
            result = function(*args, **kwargs)
            if after:
                what(point, number)
            return result

        return call

    for point, (owner, name) in POINTS.items():
        setattr(owner, name, watched(point, originals[point]))
    try:
        yield counts
    finally:
        for point, (owner, name) in POINTS.items():
            setattr(owner, name, originals[point])


class Reference(NamedTuple):
    """An uninterrupted run: its results, its duration in seconds, and the number of calls of each point."""

    results: dict[str, Any]
    seconds: float
    counts: dict[str, int]


def run_uninterrupted(kind: Kind, folder: Path) -> Reference:
    """Run a kind once without a kill.

    Raises:
        RuntimeError: if it fails.
    """
    folder.mkdir(parents=True)
    file = folder.with_suffix(".counts")

    def job() -> None:
        with _hooked(lambda *_: None, False) as counts:
            kind.run(folder)
        if os.environ.get("RANK", "0") == "0":
            file.write_text(json.dumps(counts))

    start = time.monotonic()
    statuses, output = in_forks([job] * kind.processes, folder.with_suffix(".log"))
    if any(statuses):
        raise RuntimeError(f"{kind.name} fails without a kill:\n{output[-3000:]}")
    return Reference(read_results(folder), time.monotonic() - start, json.loads(file.read_text()))


# Results


def read_results(folder: Path) -> dict[str, Any]:
    """Return file name -> content below `folder`: hashes of weights and tables, JSON files without times."""
    return {str(f.relative_to(folder)): _content(f) for f in sorted(folder.rglob("*")) if not f.is_dir()}


_TIMES = ("runtime", "preparation_time", "per_second", "flos", "train_loss", "train_runtime")


def _content(file: Path) -> Any:
    if file.suffix in (".safetensors", ".csv", ".parquet", ".pt2"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if file.name == "trainer_state.json":
        state = json.loads(file.read_text())
        lines = [line for line in state["log_history"] if "train_runtime" not in line]
        return [state["global_step"], state["best_metric"], list(map(_timeless, lines))]
    if file.name.endswith("_results.json"):
        return _timeless(json.loads(file.read_text()))
    if file.name == "run.json":
        record = json.loads(file.read_text())
        return [record["metrics"], record["split_sizes"], record["config"], record["seed"]]
    return "there"


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not k.startswith("train_") and not any(part in k for part in _TIMES)}


def _difference(results: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return the differences in a few words; an empty string if there are none."""
    more, less = sorted(results.keys() - expected.keys()), sorted(expected.keys() - results.keys())
    other = [name for name in expected if name in results and results[name] != expected[name]]
    parts = (("left behind", more), ("missing", less), ("different", other))
    return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in parts if names)


# Tries


def kill_and_resume(kind: Kind, reference: Reference, folder: Path, seed: str) -> str:
    """Kill a run once or twice, resume it and compare; return the problem, or an empty string.

    Args:
        kind: the run.
        reference: the same run without a kill.
        folder: a new folder.
        seed: seed of when, where and how to kill.
    """
    generator, log = random.Random(seed), folder.with_suffix(".log")
    folder.mkdir(parents=True)
    kills = []
    for step in (kind.run, kind.resume)[: generator.choice((1, 1, 2))]:
        how, problem = _kill(kind, step, reference, folder, generator)
        kills.append(how)
        if problem:
            return f"{', then '.join(kills)}: {problem}"
    statuses, output = in_forks([lambda: kind.resume(folder)] * kind.processes, log)
    problem = (
        f"resumed, status {statuses}: {output.strip()[-500:]}"
        if any(statuses)
        else _difference(read_results(folder), reference.results)
    )
    return f"{', then '.join(kills)}: {problem}" if problem else ""


def _kill(
    kind: Kind, step: Callable[[Path], Any], reference: Reference, folder: Path, generator: random.Random
) -> tuple[str, str]:
    """Kill a run; return how it was killed, and the problem of its end, or an empty string."""
    number = generator.choice(SIGNALS)
    rank = generator.randrange(kind.processes)
    points = [point for point, count in reference.counts.items() if count]
    timed, delay = generator.random() < 0.5, generator.uniform(0.02, 0.98) * reference.seconds
    point, after = generator.choice(points), generator.random() < 0.5
    call = generator.randint(1, reference.counts[point])

    def job() -> None:
        def here(place: str, count: int) -> None:
            if (place, count) == (point, call) and os.environ.get("RANK", "0") == str(rank):
                os.kill(os.getpid(), number)

        with contextlib.nullcontext() if timed else _hooked(here, after):
            step(folder)

    def later(processes: list[int]) -> None:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank], number)

    statuses, output = in_forks([job] * kind.processes, folder.with_suffix(".log"), later if timed else None)
    where = f"after {delay:.2f} s" if timed else f"{'after' if after else 'before'} call {call} of: {point}"
    name = signal.Signals(number).name
    how = f"{name} {where}" + (f" in process {rank}" if kind.processes > 1 else "")
    # 0: it had ended, or did not reach that call when resumed; -number: killed before the program had started, or by SIGKILL
    expected = {0, -number} if number == signal.SIGKILL else {0, -number, 128 + number}
    if "Traceback" in output or "Exception ignored" in output:
        return how, f"a traceback: {output.strip()[-1500:]}"
    if statuses[rank] not in expected and kind.processes == 1:
        return how, f"status {statuses[rank]}: {output.strip()[-500:]}"
    if (
        statuses[rank] == 128 + number
        and sum(output.count(f"{word}: ") for word in ("run_ufgir.py", "ended by")) > 1 + kind.processes
    ):
        return how, f"more than one sentence: {output.strip()[-500:]}"
    return how, ""


def run(
    minutes: float,
    tries: int,
    seed: int,
    work: Path,
    record: Path | None = None,
    only: str = "",
    shard: tuple[int, int] = (1, 1),
) -> list[Result]:
    """Kill runs of all kinds in turn.

    Args:
        minutes: no try starts after this time.
        tries: maximum number of tries over all kinds.
        seed: seed of all random choices.
        work: an empty folder.
        record: a file with a line for each try; tries in it are not repeated.
        only: part of the names of the kinds to run; all by default.
        shard: (k, n): make every n-th try, from the k-th on. Processes with the same record share the work.
    """
    end = time.monotonic() + 60 * minutes
    done: dict[tuple[str, int], str] = {}
    if record is not None and record.is_file():
        for line in record.read_text(encoding="utf-8").splitlines():
            entry_ = json.loads(line)
            if entry_["seed"] == seed:
                done[entry_["kind"], entry_["try"]] = entry_["problem"]
    kinds = [kind for kind in make_kinds(work) if only in kind.name]
    references: dict[str, Reference] = {}
    for count in range(tries):
        kind, number = kinds[count % len(kinds)], count // len(kinds)
        if count % shard[1] != shard[0] - 1 or (kind.name, number) in done:
            continue
        if time.monotonic() > end:
            break
        if kind.name not in references:
            references[kind.name] = run_uninterrupted(kind, work / f"reference-{len(references)}")
        folder = work / f"try-{count}"
        problem = kill_and_resume(kind, references[kind.name], folder, f"{seed}-{kind.name}-{number}")
        done[kind.name, number] = problem
        if not problem:
            shutil.rmtree(folder)
        if record is not None:
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind.name, "try": number, "seed": seed, "problem": problem}) + "\n")
        sys.stderr.write(f"{count + 1}: {kind.name}: {problem or 'survived'}\n")
    results = []
    for kind in kinds:
        problems = [problem for (name, _), problem in done.items() if name == kind.name]
        lost = [problem for problem in problems if problem]
        results.append(
            Result(f"killed: {kind.name}", len(problems), len(problems) - len(lost), len(lost), "; ".join(lost))
        )
    return results
