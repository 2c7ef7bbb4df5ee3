"""Checkpoints that are complete or do not count, and a training that goes on from one as if it had never stopped.

A checkpoint is written into `output_dir/_incomplete/`. When all its files are on the disk, a list of them with their sizes and
checksums is added, and the folder is renamed to `output_dir/checkpoint-<step>`: whatever ends the process, a folder of that name is
whole. Checksums are compared when training resumes and before a best checkpoint is loaded; lists of earlier versions have none.
Checkpoints without such a list, e.g. those of a plain `transformers.Trainer`, count if their files can be read to the end.

Callbacks may have state that belongs into a checkpoint, such as averaged weights: `CheckpointMixin` calls, on each callback that
has it,

    save_to_checkpoint(folder: Path)      by the process that saves, before the checkpoint is complete
    load_from_checkpoint(folder: Path)    by every process, when training goes on, after every callback's `on_train_begin`
"""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

from ..utils.checksums import FILE_LIST, find_differences, write_file_list
from ..utils.files import raise_disk_full, remove, share, to_disk, whole_files, write_text_atomically
from ..utils.provenance import as_read
from ..utils.signals import Ended, ending_signals, pending_signal, raised_signal
from ..utils.text import differences, one_sentence, shortened
from .checkpoint_files import (
    ADAPTER_FOLDER,
    ALL_METRICS,
    EMA_FOLDER,
    FILES,
    FOLDERS,
    GRADIENTS_FIGURE,
    GRADIENTS_FILE,
    INCOMPLETE,
    KEPT_PATCHES_FILE,
    LAST_FOLDER,
    METRICS_FILES,
    PARTS,
)


logger = logging.getLogger(__name__)

# Raised by transformers, torch, safetensors and json for contents that they did not expect.
_UNEXPECTED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError, OSError)
_UNEXPECTED += (pickle.UnpicklingError, SafetensorError)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the text is a sentence for people."""


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-<step>` in `output_dir`, complete or not, by step."""
    folders = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.is_dir()]
    return sorted((f for f in folders if re.fullmatch(r".*-\d+", f.name)), key=step_of)


def step_of(checkpoint: str | os.PathLike) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def what_is_missing(checkpoint: str | os.PathLike, to_resume: bool = True, read: bool = False) -> str | None:
    """Why a checkpoint is not complete, in a few words; None if it is.

    Args:
        to_resume: it must also hold all that training goes on from (with `save_only_model` it does not).
        read: compare the checksums of its files, too, where its list has them: all of it is read. Without a list it is read
            anyway.
    """
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():  # Trainer writes it last
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        listed = (folder / FILE_LIST).exists()
        problem = next(find_differences(folder, read) if listed else _unreadable(folder), None)
    except _UNEXPECTED:
        return f"{TRAINER_STATE_NAME} or another list in it cannot be read"
    problem = problem or _odd_state(folder / TRAINER_STATE_NAME)
    if problem is None and to_resume:
        for part, names in PARTS.items():
            if not any(True for name in names for _ in folder.glob(name)):
                return f"it has no {part}"
    return problem


def _odd_state(path: Path) -> str | None:
    """Why Trainer could not go on from its state, if so."""
    try:
        state = TrainerState.load_from_json(str(path))
    except _UNEXPECTED as error:  # among them keys of another version of transformers
        return f"{path.name} cannot be read: {shortened(one_sentence(error))}"
    kinds = {
        "global_step": int,
        "epoch": (int, float),
        "max_steps": int,
        "log_history": list,
        "stateful_callbacks": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(state, name), kind):
            return f"{path.name} cannot be read: `{name}` is {shortened(repr(getattr(state, name)), 40)}"
    return None


def _unreadable(folder: Path) -> Iterator[str]:
    """Problems of a checkpoint that nobody has listed: each file is read to its end."""
    if (folder / "checkpoint-is-incomplete.txt").exists():  # transformers' checkpoint on SIGTERM
        yield "it is marked as incomplete"
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / index).exists():
            for name in set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()):
                if not (folder / name).is_file():
                    yield f"{name} is missing"
    for file in sorted(folder.iterdir()):
        if not file.is_file():
            if file.suffix in (".safetensors", ".pt", ".pth", ".json"):
                yield f"{file.name} is a folder"
            continue
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip() is not None:
                        yield f"{file.name} is damaged"
        except (SafetensorError, zipfile.BadZipFile, OSError):
            yield f"{file.name} is cut off or damaged"


def last_complete_checkpoint(output_dir: str | os.PathLike, read: bool = True) -> Path | None:
    """The complete checkpoint with the highest step; later ones that are not complete are passed over with a warning.

    Args:
        read: see `what_is_missing`.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        problem = what_is_missing(folder, read=read)
        if problem is None:
            return folder
        logger.warning("%s is not complete and passed over: %s", folder, problem)
    return None


def complete_checkpoint(folder: Path, target: Path, **about: Any) -> None:
    """Bring the files of `folder` to the disk, list them with their checksums, and rename the folder to `target`, in whose place
    it comes.

    Args:
        about: what else the list says.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != FILE_LIST)
    share(folder)
    for file in files:
        to_disk(file)
    to_disk(write_file_list(folder, files, about))
    to_disk(folder)
    replaced = folder.with_name(f"{target.name}.replaced")
    if target.exists():  # damaged, or saved at the same step before
        os.replace(target, replaced)
    os.replace(folder, target)
    to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate_checkpoints(output_dir: str | os.PathLike, limit: int | None, best: str | os.PathLike | None) -> None:
    """Delete the oldest checkpoints but `limit`, and those that are not complete.

    Call it when a new checkpoint is complete: nothing is deleted before. The last complete checkpoint and the best one stay,
    whatever the limit. (transformers' own function would count, and delete, a folder `checkpoint-5-mine`, too.)

    Args:
        limit: checkpoints to keep; None or 0 keeps all.
        best: the best checkpoint, if there is one.
    """
    problems = {folder: what_is_missing(folder, to_resume=False) for folder in checkpoint_folders(output_dir)}
    for folder, problem in problems.items():
        if problem is not None:
            logger.warning("%s is deleted, it is not complete: %s", folder, problem)
            shutil.rmtree(folder, ignore_errors=True)
    complete = [folder for folder, problem in problems.items() if problem is None]
    kept = {complete[-1].resolve(), *([Path(best).resolve()] if best else [])} if complete else set()
    excess = len(complete) - max(limit, len(kept)) if limit else 0
    for folder in [f for f in complete if f.resolve() not in kept][: max(excess, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoints(output_dir: str | os.PathLike, after: str | os.PathLike | None = None) -> None:
    """Delete the folders `checkpoint-<number>` in `output_dir`, and what an interrupted one has left.

    Args:
        after: only those with a higher number than this checkpoint's.
    """
    remove(Path(output_dir) / INCOMPLETE)
    for folder in checkpoint_folders(output_dir):
        if after is None or step_of(folder) > step_of(after):
            shutil.rmtree(folder)


def remove_results(output_dir: str | os.PathLike, predictions: Iterable[str] = ()) -> None:
    """Delete what an earlier training left in `output_dir` and a new one need not replace: averaged and last weights, an adapter,
    recorded gradients, the files of `predictions`, a picture of them, and metrics, to which Trainer would add."""
    output_dir = Path(output_dir)
    for name in (EMA_FOLDER, LAST_FOLDER, ADAPTER_FOLDER, *METRICS_FILES, GRADIENTS_FILE, GRADIENTS_FIGURE):
        remove(output_dir / name)
    for name in (KEPT_PATCHES_FILE, *predictions):
        remove(output_dir / name)


def check_places(output_dir: str | os.PathLike, others: Iterable[str] = ()) -> None:
    """Refuse an `output_dir` in which a run could not write: a file stands where a folder belongs, or the other way round.

    Args:
        output_dir: there or not.
        others: names of more files that the run will write.

    Raises:
        ValueError: naming the first of them.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {output_dir}: choose another")
    for name in (*FILES, *others):
        if (output_dir / name).is_dir():
            raise ValueError(
                f"`output_dir` {output_dir} has a folder {name} where the run writes a file: move it away"
            )
    for name in FOLDERS:
        if (output_dir / name).exists() and not (output_dir / name).is_dir():
            raise ValueError(f"`output_dir` {output_dir} has a file {name} where the run makes a folder: move it away")


def find_checkpoint(args: transformers.TrainingArguments) -> str | None:
    """The checkpoint to resume from, or None to start afresh. Nothing is changed.

    Args:
        args: `resume_from_checkpoint` is "true" for the last complete one in `output_dir`, a checkpoint's folder, or "false"
            or None; with `overwrite_output_dir`, checkpoints found in `output_dir` do not matter.

    Raises:
        ValueError: there is nothing to resume from, or it is not complete; or `output_dir` holds the checkpoints of another
            training, or later ones, with which those of a new training would mix.
    """
    output_dir, found = args.output_dir, checkpoint_folders(args.output_dir)
    wanted = (args.resume_from_checkpoint or "false").strip()
    if wanted.lower() == "false":
        if found and not args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` holds {found[-1]}: continue with --resume_from_checkpoint true, start over with "
                "--overwrite_output_dir true, or choose another folder"
            )
        return None
    if wanted.lower() in ("true", "auto"):
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None and wanted.lower() == "auto":
            return None
        if checkpoint is None:
            which = "complete checkpoint" if found else "checkpoint"
            raise ValueError(f"`resume_from_checkpoint`: there is no {which} in {output_dir}")
        return str(checkpoint)
    if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`resume_from_checkpoint`: there is no checkpoint in {wanted}")
    problem = what_is_missing(wanted, read=True)
    if problem is not None:
        raise ValueError(f"`resume_from_checkpoint`: {wanted} is not complete, {problem}; choose another, or true")
    step = json.loads((Path(wanted) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    if found and step_of(found[-1]) > step and not args.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` holds {found[-1]}, which is later than `resume_from_checkpoint` {wanted}: give it up with "
            "--overwrite_output_dir true, resume from it, or choose another `output_dir`"
        )
    return wanted


def how_to_go_on(args: transformers.TrainingArguments) -> str:
    """What to do after an interrupted run, a sentence without its period."""
    if not args.do_train:
        return "The same command takes predictions up where they stopped"
    checkpoint = last_complete_checkpoint(args.output_dir, read=False)
    if checkpoint is None:
        return f"There is no complete checkpoint in {args.output_dir} yet"
    return f"The same command with `--resume_from_checkpoint true` goes on from {checkpoint}"


def check_fits(checkpoint: str | os.PathLike, model: nn.Module) -> None:
    """Raise ValueError if the weights in `checkpoint` are not those of `model` by name and shape: Trainer would only warn and
    go on from weights drawn at random. (Sharded checkpoints and adapters are not looked into.)"""
    file = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not file.is_file() or hasattr(model, "peft_config"):
        return
    with safe_open(file, "pt") as weights:
        saved = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    odd = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if odd:
        name = odd[0]
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is of another model, {len(odd)} weights differ, e.g. {name} with shape "
            f"{saved.get(name, 'none')} there and {own.get(name, 'none')} here; resume with the options it was trained with"
        )


def check_settings(
    checkpoint: str | os.PathLike, settings: Mapping[str, Any], free: Collection[str] = (), images: str | None = None
) -> None:
    """Compare what a training goes on with with what it began with, as far as the checkpoint says it.

    The optimizer and its schedule come from the checkpoint, whatever the options: others would be passed over in silence.

    Args:
        settings: options by name, as they are now.
        free: names of those that take effect from now on if they are changed; the others must not change.
        images: a digest of the training images.

    Raises:
        ValueError: an option was changed, or the images are others.
    """
    listed = Path(checkpoint) / FILE_LIST
    saved = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else {}
    before = saved.get("settings") or {}
    now = {name: value for name, value in as_read(dict(settings)).items() if name in before}
    before = {name: value for name, value in before.items() if name in now}
    for changed in sorted(name for name in free if before.get(name) != now.get(name)):
        told = (checkpoint, changed, before[changed], now[changed])
        logger.warning("%s was trained with `%s` %s: training goes on with %s", *told)
        before[changed] = now[changed]
    problems = [differences(before, now, "it")] if before != now else []
    if None not in (images, saved.get("images")) and images != saved["images"]:
        problems.append("other training images or classes")
    if problems:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is of a training with {' and '.join(problems)}. Go on as it began, or "
            "start over with --overwrite_output_dir true"
        )


@contextlib.contextmanager
def _usable(checkpoint: str | os.PathLike, what: str) -> Iterator[None]:
    """Within, a part of a checkpoint is loaded; what it makes torch or transformers raise becomes a sentence.

    Raises:
        CheckpointError: in place of the error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _UNEXPECTED as error:
        raise CheckpointError(
            f"`resume_from_checkpoint`: {what} of {checkpoint} cannot be loaded: {shortened(one_sentence(error)).rstrip('.')}. "
            "Resume with the options it was trained with, or from another checkpoint"
        ) from error


# State of torch's own optimizers that has the shape of its parameter.
_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "exp_inf")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an optimizer's state was loaded for parameters of other shapes, which torch finds at the next step."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not type(inner).__module__.startswith("torch.optim"):
        return
    for parameter, state in inner.state.items():
        for name in _LIKE_PARAMETERS:
            value = state.get(name)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} for a parameter of {list(parameter.shape)}")


class _Flow(TrainerCallback):
    """Saves checkpoints where a training can go on from, and gives callbacks back what they saved. The last of all callbacks.

    With `enable_jit_checkpoint`, a signal that ends the run first has a checkpoint saved after the step: transformers' own callback
    would save it between the backward pass and the step, whose batch a BatchNorm then counts twice.

    Args:
        callbacks: all callbacks of the training.
        checkpoint: the one that the training goes on from, if any.
    """

    def __init__(self, callbacks: list[TrainerCallback], checkpoint: Path | None) -> None:
        self.callbacks = callbacks
        self.checkpoint = checkpoint
        self.waits = False
        self.ending: int | None = None  # the signal that ends the training after the next checkpoint

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        for callback in self.callbacks if self.checkpoint is not None else ():
            load = getattr(callback, "load_from_checkpoint", None)
            if load is not None:
                with _usable(self.checkpoint, f"what {type(callback).__name__} saved"):
                    load(self.checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if (number := raised_signal()) is not None:  # in a place that lets no exception through
            raise Ended(number)

    def _waiting_signal(self, args: Any) -> int | None:
        """The signal that has come to any process, if it waits for a checkpoint."""
        if not args.enable_jit_checkpoint:
            return None
        number = pending_signal() or 0
        if args.world_size > 1:
            highest = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest)
        return number or None

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.ending is not None:
            raise Ended(self.ending)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.ending = self._waiting_signal(args)
        if self.ending is not None:
            if args.save_only_model:  # nothing to go on from
                raise Ended(self.ending)
            control.should_save = True
        # From a checkpoint of the last step of an epoch Trainer goes on with the next epoch. What else belongs to the end of
        # the epoch, an evaluation perhaps, would be left out: it has to come before the checkpoint.
        if control.should_save and state.epoch == int(state.epoch):
            control.should_save, self.waits = False, True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.waits:
            control.should_save, self.waits = True, False


class CheckpointMixin:
    """For a `transformers.Trainer`: checkpoints as this module describes them, and resumption that leaves no trace.

    Beyond Trainer: what early stopping has counted is remembered; a training that had come to its end, by its number of steps
    or by early stopping, does not train on when resumed; a best checkpoint is found when `output_dir` has been moved.
    """

    _aside = False  # a checkpoint is being written
    _resumed_from: Path | None = None
    # What checkpoints say of the training, for `check_settings`: options by name, and a digest of the training images.
    settings: Mapping[str, Any] | None = None
    images_digest: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` as in Trainer, True being the last complete one in `output_dir`.

        Raises:
            ValueError: there is none, or it is of another model.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint`: there is no complete checkpoint in {self.args.output_dir}"
                )
        if checkpoint is not None:
            check_fits(checkpoint, self.model)
            self._compare_steps(Path(checkpoint) / FILE_LIST)
        if self.args.should_save:
            remove(Path(self.args.output_dir) / INCOMPLETE)
        self.accelerator.wait_for_everyone()
        self._resumed_from = Path(checkpoint) if checkpoint else None
        flow = _Flow(self.callback_handler.callbacks, self._resumed_from)
        self.add_callback(flow)
        waiting = ending_signals(wait=True) if self.args.enable_jit_checkpoint else contextlib.nullcontext()
        try:
            with waiting:
                output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
                if self.args.enable_jit_checkpoint and (number := pending_signal()) is not None:
                    raise Ended(number)  # it came after the last step
                return output
        finally:
            self.callback_handler.callbacks.remove(flow)

    def _step(self) -> dict[str, int]:
        return {"images_per_step": self.get_total_train_batch_size(self.args), "processes": self.args.world_size}

    def _compare_steps(self, listed: Path) -> None:
        """Warn where a training cannot go on as if it had not stopped."""
        saved = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else {}
        for name, now in self._step().items():
            if saved.get(name, now) != now:
                logger.warning(
                    "%s was written with %s %d, it is %d now: training goes on, but not as it would have without a stop",
                    *(listed.parent, name, saved[name], now),
                )

    def _stateful(self) -> list[ExportableState]:
        return [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        for callback in self._stateful():
            saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
            for name, value in saved.get("attributes", {}).items() if isinstance(saved, dict) else ():
                setattr(callback, name, value)
        if self._resumed_from is not None:
            self._find_best(self._resumed_from)
            if self.args.should_save and self._resumed_from.resolve().parent == Path(self.args.output_dir).resolve():
                # what a killed process did not come to; no later checkpoint may follow that would do it
                rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        return position

    def _find_best(self, checkpoint: Path) -> None:
        """Find the best checkpoint so far where `output_dir` has been moved; forget the best metric if it is gone. (There is none
        if the best evaluation was not one after which a checkpoint was saved.)"""
        state = self.state
        saved = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if saved is None or state.best_model_checkpoint is not None:
            return
        moved = Path(self.args.output_dir) / Path(saved).name
        if moved.is_dir():
            state.best_model_checkpoint = str(moved)
        else:  # or else no later one could be called the best
            logger.warning("the best checkpoint so far, %s, is gone: the best of those to come counts", moved.name)
            state.best_metric = state.best_global_step = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        stopped = any(
            isinstance(c, EarlyStoppingCallback) and 0 < c.early_stopping_patience <= c.early_stopping_patience_counter
            for c in self.callback_handler.callbacks
        )
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _usable(resume_from_checkpoint, "the model"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _usable(checkpoint or "", "the optimizer or its schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                _check_optimizer(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _usable(checkpoint or "", "the scaler of fp16"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _usable(checkpoint or "", "the random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        problem = what_is_missing(best, to_resume=False, read=True)
        if problem is not None:
            raise CheckpointError(
                f"the best checkpoint {best} is not complete, {problem}; to end with the last weights instead, resume with "
                "`load_best_model_at_end` false"
            )
        super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, INCOMPLETE) if self._aside else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        target = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = output_dir / INCOMPLETE / target.name
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful()).stateful_callbacks
        self._aside = True
        try:
            with raise_disk_full(folder, self._space_needed()):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(target)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                    for callback in self.callback_handler.callbacks:
                        if hasattr(callback, "save_to_checkpoint"):
                            callback.save_to_checkpoint(folder)
        except BaseException:
            remove(folder.parent)
            raise
        finally:
            self._aside = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            about = {"settings": as_read(dict(self.settings or {})), "images": self.images_digest}
            try:
                with raise_disk_full(folder, self._space_needed()):
                    complete_checkpoint(folder, target, **self._step(), **about)
            finally:
                remove(folder.parent)
            rotate_checkpoints(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._aside:  # it is uploaded in the background, by its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _space_needed(self) -> int:
        """Bytes of a checkpoint: those of the last one, or about those of weights and optimizer."""
        for folder in reversed(checkpoint_folders(self.args.output_dir)):
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        state = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [*self.model.state_dict().values(), *(v for v in state if isinstance(v, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._aside or not self.args.should_save:  # the folder of a checkpoint takes its place as a whole
            super()._save(output_dir, state_dict)
            return
        with whole_files(Path(output_dir or self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)

    def save_state(self) -> None:
        """Write the log of the training, `trainer_state.json` in `output_dir`, whole."""
        if self.is_world_process_zero():
            with whole_files(Path(self.args.output_dir)) as folder:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json` and add to `all_results.json`, both whole; one that cannot be read is replaced, with a
        warning."""
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        write_metrics(output_dir / f"{split}_results.json", metrics)
        if combined:
            path = output_dir / ALL_METRICS
            write_metrics(path, read_metrics(path) | dict(metrics))


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics in a file of this module; none if there is no file or, with a warning, if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        metrics = error
    if isinstance(metrics, dict):
        return metrics
    logger.warning(
        "%s cannot be read and is replaced: %s", path, metrics if isinstance(metrics, Exception) else "no object"
    )
    return {}


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON, whole."""
    write_text_atomically(path, json.dumps(dict(metrics), indent=4, sort_keys=True))


def forget_metrics(output_dir: str | os.PathLike, split: str) -> None:
    """Take what an earlier run has measured on a split out of `ALL_METRICS`, for a run that will not replace it."""
    path = Path(output_dir) / ALL_METRICS
    if path.is_file():
        kept = {name: value for name, value in read_metrics(path).items() if not name.startswith(f"{split}_")}
        write_metrics(path, kept)
