"""Complete checkpoints, and exact resumption from them.

A checkpoint is written into `output_dir/_incomplete/`. When all its files are on the disk, a list of them with their
sizes and checksums is added, and the folder is renamed to `output_dir/checkpoint-<step>`. A folder of that name is
therefore complete, however the process ends. Checksums are compared when training resumes and before the best
checkpoint is loaded; lists written by earlier versions have no checksums. Checkpoints without a list, e.g. those of a
plain `transformers.Trainer`, are accepted if all their files can be read.

Callbacks may have state that belongs in a checkpoint, such as averaged weights. `CheckpointMixin` calls these methods
of each callback that defines them:

    save_to_checkpoint(folder: Path)      in the process that saves, before the checkpoint is complete
    load_from_checkpoint(folder: Path)    in every process, when training resumes, after every callback's `on_train_begin`
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

from ..utils.checksums import FILE_LIST, find_differences, list_weights, write_file_list
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

# Raised by transformers, torch, safetensors and json for invalid contents.
_UNEXPECTED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError, OSError)
_UNEXPECTED += (pickle.UnpicklingError, SafetensorError)


class CheckpointError(ValueError):
    """An error for a checkpoint that cannot be used; its text is shown to the user."""


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """Return the folders `checkpoint-<step>` in `output_dir`, complete or not, sorted by step."""
    folders = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.is_dir()]
    return sorted((f for f in folders if re.fullmatch(r".*-\d+", f.name)), key=step_of)


def step_of(checkpoint: str | os.PathLike) -> int:
    """Return the step after which a checkpoint was saved, read from its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def checkpoint_problem(checkpoint: str | os.PathLike, to_resume: bool = True, read: bool = False) -> str | None:
    """Return why a checkpoint is not complete, in a few words; None if it is complete.

    Args:
        to_resume: require everything that resuming needs (missing with `save_only_model`).
        read: also compare the checksums of the files, if the list has them. This reads every file. Files of a
            checkpoint without a list are always read.
    """
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():  # Trainer writes it last
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        listed = (folder / FILE_LIST).exists()
        problem = next(find_differences(folder, read) if listed else _unreadable(folder), None)
    except _UNEXPECTED:
        return f"{TRAINER_STATE_NAME} or another JSON file in it could not be read"
    problem = problem or _state_problem(folder / TRAINER_STATE_NAME)
    if problem is None and to_resume:
        for part, names in PARTS.items():
            if not any(True for name in names for _ in folder.glob(name)):
                return f"the {part} is missing"
    return problem


def _state_problem(path: Path) -> str | None:
    """Return why Trainer cannot resume from its state file; None if it can."""
    try:
        state = TrainerState.load_from_json(str(path))
    except _UNEXPECTED as error:  # including keys of another version of transformers
        return f"{path.name} could not be read: {shortened(one_sentence(error))}"
    kinds = {
        "global_step": int,
        "epoch": (int, float),
        "max_steps": int,
        "log_history": list,
        "stateful_callbacks": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(state, name), kind):
            return f"{path.name} could not be read: `{name}` is {shortened(repr(getattr(state, name)), 40)}"
    return None


def _unreadable(folder: Path) -> Iterator[str]:
    """Yield the problems of a checkpoint without a list; reads every file."""
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
    """Return the complete checkpoint with the highest step; skip incomplete ones with a warning.

    Args:
        read: see `checkpoint_problem`.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        problem = checkpoint_problem(folder, read=read)
        if problem is None:
            return folder
        logger.warning("Skipping incomplete checkpoint %s: %s", folder, problem)
    return None


def complete_checkpoint(folder: Path, target: Path, **about: Any) -> None:
    """Flush the files of `folder` to disk, list them with their checksums, and rename the folder to `target`.

    Args:
        folder: the files of the checkpoint.
        target: the final name; an existing folder is replaced.
        about: further entries of the list.
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
    """Delete incomplete checkpoints, and the oldest complete ones beyond `limit`.

    Call this after a new checkpoint is complete. The last complete checkpoint and the best one are never deleted. Extra
    ones, which were saved because of a signal, are deleted as soon as there is a later one. (transformers' own function
    would also count and delete a folder `checkpoint-5-mine`.)

    Args:
        limit: number of checkpoints to keep; None or 0 keeps all.
        best: the best checkpoint, if there is one.
    """
    problems = {folder: checkpoint_problem(folder, to_resume=False) for folder in checkpoint_folders(output_dir)}
    for folder, problem in problems.items():
        if problem is not None:
            logger.warning("Deleting incomplete checkpoint %s: %s", folder, problem)
            shutil.rmtree(folder, ignore_errors=True)
    complete = [folder for folder, problem in problems.items() if problem is None]
    for folder in [f for f in complete[:-1] if _read_list(f).get("extra")]:
        shutil.rmtree(folder, ignore_errors=True)
        complete.remove(folder)
    kept = {complete[-1].resolve(), *([Path(best).resolve()] if best else [])} if complete else set()
    excess = len(complete) - max(limit, len(kept)) if limit else 0
    for folder in [f for f in complete if f.resolve() not in kept][: max(excess, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _read_list(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a checkpoint's file list; an empty dict without a list."""
    file = Path(checkpoint) / FILE_LIST
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def remove_checkpoints(output_dir: str | os.PathLike, after: str | os.PathLike | None = None) -> None:
    """Delete the folders `checkpoint-<number>` in `output_dir` and any incomplete checkpoint.

    Args:
        after: delete only checkpoints with a higher step than this one.
    """
    remove(Path(output_dir) / INCOMPLETE)
    for folder in checkpoint_folders(output_dir):
        if after is None or step_of(folder) > step_of(after):
            shutil.rmtree(folder)


def remove_results(output_dir: str | os.PathLike, predictions: Iterable[str] = ()) -> None:
    """Delete results of an earlier training in `output_dir` that a new training may not replace.

    These are averaged and last weights, an adapter, recorded gradients, the files in `predictions`, their figure, and
    metrics (which Trainer would merge with the new ones).
    """
    output_dir = Path(output_dir)
    for name in (EMA_FOLDER, LAST_FOLDER, ADAPTER_FOLDER, *METRICS_FILES, GRADIENTS_FILE, GRADIENTS_FIGURE):
        remove(output_dir / name)
    for name in (KEPT_PATCHES_FILE, *predictions):
        remove(output_dir / name)


def check_output_paths(output_dir: str | os.PathLike, others: Iterable[str] = ()) -> None:
    """Check that no file in `output_dir` has the name of a folder that the run creates, and vice versa.

    Args:
        output_dir: a folder that may not exist yet.
        others: names of further files that the run writes.

    Raises:
        ValueError: if the run could not write one of its files or folders; names the first.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {output_dir}. Choose another path")
    for name in (*FILES, *others):
        if (output_dir / name).is_dir():
            raise ValueError(
                f"`output_dir` {output_dir} contains a folder {name}, which must be a file. Move the folder"
            )
    for name in FOLDERS:
        if (output_dir / name).exists() and not (output_dir / name).is_dir():
            raise ValueError(
                f"`output_dir` {output_dir} contains a file {name}, which must be a folder. Move the file"
            )


def find_checkpoint(args: transformers.TrainingArguments) -> str | None:
    """Return the checkpoint to resume from, or None to start a new training. Changes no file.

    Args:
        args: `resume_from_checkpoint` is "true" for the last complete checkpoint in `output_dir`, "auto" for the same
            or None, a checkpoint folder, or "false" or None. With `overwrite_output_dir`, existing checkpoints in
            `output_dir` are ignored.

    Raises:
        ValueError: if there is no checkpoint to resume from, if it is incomplete, or if `output_dir` holds checkpoints
            of another training, or later ones, that would mix with those of this training.
    """
    output_dir, found = args.output_dir, checkpoint_folders(args.output_dir)
    wanted = (args.resume_from_checkpoint or "false").strip()
    if wanted.lower() == "false":
        if found and not args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` already contains {found[-1]}. Resume with --resume_from_checkpoint true, start over with "
                "--overwrite_output_dir true, or choose another folder"
            )
        return None
    if wanted.lower() in ("true", "auto"):
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None and wanted.lower() == "auto":
            return None
        if checkpoint is None:
            which = "complete checkpoint" if found else "checkpoint"
            raise ValueError(f"`resume_from_checkpoint`: no {which} found in {output_dir}")
        return str(checkpoint)
    if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`resume_from_checkpoint`: no checkpoint found in {wanted}")
    problem = checkpoint_problem(wanted, read=True)
    if problem is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: {wanted} is incomplete ({problem}). Choose another checkpoint, or pass true"
        )
    step = json.loads((Path(wanted) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    if found and step_of(found[-1]) > step and not args.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` contains {found[-1]}, which is later than `resume_from_checkpoint` {wanted}. Delete it with "
            "--overwrite_output_dir true, resume from it, or choose another `output_dir`"
        )
    return wanted


def resume_hint(args: transformers.TrainingArguments) -> str:
    """Return how to continue an interrupted run, as a sentence without its period."""
    if not args.do_train:
        return "Run the same command again to continue the predictions"
    checkpoint = last_complete_checkpoint(args.output_dir, read=False)
    if checkpoint is None:
        return f"There is no complete checkpoint in {args.output_dir} yet"
    return f"Run the same command with `--resume_from_checkpoint true` to resume from {checkpoint}"


def check_fits(checkpoint: str | os.PathLike, model: nn.Module) -> None:
    """Check that the weights in `checkpoint` have the names and shapes of `model`'s.

    Trainer would only log a warning and train from random weights. Sharded checkpoints and adapters are not checked.

    Raises:
        ValueError: if a name or shape differs.
    """
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
            f"`resume_from_checkpoint`: {checkpoint} does not fit the model: {len(odd)} weights differ, e.g. {name} has shape "
            f"{saved.get(name, 'none')} in the checkpoint and {own.get(name, 'none')} in the model. "
            "Resume with the original options"
        )


def check_settings(
    checkpoint: str | os.PathLike, settings: Mapping[str, Any], free: Collection[str] = (), images: str | None = None
) -> None:
    """Compare the options and images of a resumed training with those stored in its checkpoint.

    The optimizer and its schedule are loaded from the checkpoint, so that changed options would be ignored silently.

    Args:
        checkpoint: the folder to resume from.
        settings: current options by name.
        free: names of options that may change; they take effect from now on, with a warning.
        images: checksum of the training images.

    Raises:
        ValueError: if another option or the images changed.
    """
    saved = _read_list(checkpoint)
    before = saved.get("settings") or {}
    now = {name: value for name, value in as_read(dict(settings)).items() if name in before}
    before = {name: value for name, value in before.items() if name in now}
    for changed in sorted(name for name in free if before.get(name) != now.get(name)):
        values = (changed, before[changed], now[changed], checkpoint)
        logger.warning("`%s` changed from %s to %s since %s was saved; the new value is used from now on", *values)
        before[changed] = now[changed]
    problems = [f"options changed: {differences(before, now, 'the checkpoint')}"] if before != now else []
    if None not in (images, saved.get("images")) and images != saved["images"]:
        problems.append("the training images or classes changed")
    if problems:
        raise ValueError(
            f"`resume_from_checkpoint`: cannot resume from {checkpoint}: {'; '.join(problems)}. Resume with the original "
            "options and images, or start over with --overwrite_output_dir true"
        )


@contextlib.contextmanager
def _as_checkpoint_error(checkpoint: str | os.PathLike, what: str) -> Iterator[None]:
    """Turn errors of torch or transformers while a part of a checkpoint is loaded into a `CheckpointError`.

    Raises:
        CheckpointError: in place of the error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _UNEXPECTED as error:
        raise CheckpointError(
            f"`resume_from_checkpoint`: {what} of {checkpoint} could not be loaded: "
            f"{shortened(one_sentence(error)).rstrip('.')}. "
            "Resume with the original options, or from another checkpoint"
        ) from error


# State entries of torch's optimizers that have the shape of their parameter.
_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "exp_inf")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check that the loaded optimizer state has the shapes of its parameters; torch only fails at the next step.

    Raises:
        ValueError: if a shape differs.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not type(inner).__module__.startswith("torch.optim"):
        return
    for parameter, state in inner.state.items():
        for name in _LIKE_PARAMETERS:
            value = state.get(name)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} for a parameter of {list(parameter.shape)}")


class _Flow(TrainerCallback):
    """Callback that saves checkpoints where training can resume, and restores other callbacks. Runs after all others.

    With `enable_jit_checkpoint`, a signal that ends the run first saves a checkpoint after the current step.
    transformers' own callback saves it between the backward pass and the step, so that a BatchNorm counts that batch
    twice. This checkpoint is extra, unless it is due at this step anyway: it does not become the best one, and is deleted
    after the next one, so that the resumed training ends as an uninterrupted one does.

    Args:
        callbacks: all callbacks of the training.
        checkpoint: the checkpoint to resume from, if any.
    """

    def __init__(self, callbacks: list[TrainerCallback], checkpoint: Path | None) -> None:
        self.callbacks = callbacks
        self.checkpoint = checkpoint
        self.waits = False
        self.ending: int | None = None  # the signal that ends the training after the next checkpoint
        self.extra = False  # the next checkpoint is only saved because of it

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        for callback in self.callbacks if self.checkpoint is not None else ():
            load = getattr(callback, "load_from_checkpoint", None)
            if load is not None:
                with _as_checkpoint_error(self.checkpoint, f"the state of {type(callback).__name__}"):
                    load(self.checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if (number := raised_signal()) is not None:  # raised where exceptions are swallowed
            raise Ended(number)

    def _waiting_signal(self, args: Any) -> int | None:
        """Return the signal that any process has received, if it is held until a checkpoint is saved."""
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
        self.extra = self.ending is not None and not control.should_save
        if self.ending is not None:
            if args.save_only_model:  # such checkpoints cannot be resumed
                raise Ended(self.ending)
            control.should_save = True
        # From a checkpoint of the last step of an epoch, Trainer resumes with the next epoch. The end of the epoch, e.g. an
        # evaluation, would be skipped, so it must come before the checkpoint.
        if control.should_save and state.epoch == int(state.epoch):
            control.should_save, self.waits = False, True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.waits:
            self.extra = self.extra and not control.should_save  # due at the end of the epoch
            control.should_save, self.waits = True, False


class CheckpointMixin:
    """Mixin for `transformers.Trainer`: complete checkpoints (see the module docstring) and exact resumption.

    Unlike Trainer, it restores the count of early stopping, does not continue a training that has ended (by its number
    of steps or by early stopping), and finds the best checkpoint after `output_dir` has been moved.
    """

    _saving_checkpoint = False  # a checkpoint is being written
    _resumed_from: Path | None = None
    _flow: _Flow | None = None  # while training
    # Stored in checkpoints for `check_settings`: options by name, and a checksum of the training images.
    settings: Mapping[str, Any] | None = None
    images_checksum: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` as in Trainer, where True is the last complete checkpoint in `output_dir`.

        Raises:
            ValueError: if there is none, or if it belongs to another model.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"`resume_from_checkpoint`: no complete checkpoint found in {self.args.output_dir}")
        if checkpoint is not None:
            check_fits(checkpoint, self.model)
            self._compare_steps(checkpoint)
        if self.args.should_save:
            remove(Path(self.args.output_dir) / INCOMPLETE)
        self.accelerator.wait_for_everyone()
        self._resumed_from = Path(checkpoint) if checkpoint else None
        self._flow = flow = _Flow(self.callback_handler.callbacks, self._resumed_from)
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
            self._flow = None

    def _step(self) -> dict[str, int]:
        return {"images_per_step": self.get_total_train_batch_size(self.args), "processes": self.args.world_size}

    def _compare_steps(self, checkpoint: str | os.PathLike) -> None:
        """Warn if the batch size per step or the number of processes has changed, so that results will differ."""
        saved = _read_list(checkpoint)
        for name, now in self._step().items():
            if saved.get(name, now) != now:
                logger.warning(
                    "%s was saved with %s %d, now %d: results will differ from those of an uninterrupted training",
                    *(checkpoint, name, saved[name], now),
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
                # a killed process may not have done this, and no later checkpoint may follow
                rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        return position

    def _find_best(self, checkpoint: Path) -> None:
        """Find the best checkpoint so far after `output_dir` has been moved; reset the best metric if it is missing.

        There is no best checkpoint if none was saved after the best evaluation.
        """
        state = self.state
        saved = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if saved is None or state.best_model_checkpoint is not None:
            return
        moved = Path(self.args.output_dir) / Path(saved).name
        if moved.is_dir():
            state.best_model_checkpoint = str(moved)
        else:  # otherwise no later one could become the best
            logger.warning(
                "The best checkpoint so far, %s, is missing: the best of the following evaluations is used instead",
                moved.name,
            )
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
        with _as_checkpoint_error(resume_from_checkpoint, "the model"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _as_checkpoint_error(checkpoint or "", "the optimizer or its schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                _check_optimizer(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _as_checkpoint_error(checkpoint or "", "the fp16 scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _as_checkpoint_error(checkpoint or "", "the random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        problem = checkpoint_problem(best, to_resume=False, read=True)
        if problem is not None:
            raise CheckpointError(
                f"the best checkpoint {best} is incomplete ({problem}). To keep the last weights instead, resume with "
                "`load_best_model_at_end` false"
            )
        super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, INCOMPLETE) if self._saving_checkpoint else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        target = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = output_dir / INCOMPLETE / target.name
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful()).stateful_callbacks
        is_best, best = self.state.best_global_step == self.state.global_step, self.state.best_model_checkpoint
        due = is_best and self.args.save_strategy == SaveStrategy.BEST
        extra = self._flow is not None and self._flow.extra and not due
        self._saving_checkpoint = True
        try:
            with raise_disk_full(folder, self._space_needed()):
                super()._save_checkpoint(model, trial)
                if is_best:
                    self.state.best_model_checkpoint = best if extra else str(target)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                    for callback in self.callback_handler.callbacks:
                        if hasattr(callback, "save_to_checkpoint"):
                            callback.save_to_checkpoint(folder)
        except BaseException:
            remove(folder.parent)
            raise
        finally:
            self._saving_checkpoint = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            about = {"settings": as_read(dict(self.settings or {})), "images": self.images_checksum}
            about |= {"extra": True} if extra else {}
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
        if not self._saving_checkpoint:  # it is uploaded later, under its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _space_needed(self) -> int:
        """Return the size of a checkpoint in bytes: that of the last one, or an estimate."""
        for folder in reversed(checkpoint_folders(self.args.output_dir)):
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        state = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [*self.model.state_dict().values(), *(v for v in state if isinstance(v, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._saving_checkpoint or not self.args.should_save:  # a checkpoint folder is renamed as a whole
            super()._save(output_dir, state_dict)
            return
        with whole_files(Path(output_dir or self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)
            list_weights(folder)  # it gets its final name last

    def save_state(self) -> None:
        """Write the training log, `trainer_state.json` in `output_dir`, atomically."""
        if self.is_world_process_zero():
            with whole_files(Path(self.args.output_dir)) as folder:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json` and update `all_results.json`, both atomically.

        An `all_results.json` that cannot be read is replaced, with a warning.
        """
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        write_metrics(output_dir / f"{split}_results.json", metrics)
        if combined:
            path = output_dir / ALL_METRICS
            write_metrics(path, read_metrics(path) | dict(metrics))


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics in a JSON file; an empty dict if it is missing or (with a warning) unreadable."""
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        metrics = error
    if isinstance(metrics, dict):
        return metrics
    logger.warning(
        "%s could not be read and is replaced: %s",
        path,
        metrics if isinstance(metrics, Exception) else "not an object",
    )
    return {}


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON, atomically."""
    write_text_atomically(path, json.dumps(dict(metrics), indent=4, sort_keys=True))


def drop_metrics(output_dir: str | os.PathLike, split: str) -> None:
    """Remove the metrics of a split from `ALL_METRICS`, for a run that will not replace them."""
    path = Path(output_dir) / ALL_METRICS
    if path.is_file():
        kept = {name: value for name, value in read_metrics(path).items() if not name.startswith(f"{split}_")}
        write_metrics(path, kept)
