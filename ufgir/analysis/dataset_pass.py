"""Run a model over any number of images and store its output as parquet files, with statistics of all images.

Memory holds one shard of images: a full shard is written to disk, followed by the statistics so far. An interrupted pass resumes
after the last complete shard. All files are written to `_<name>.partial/` next to the output folder, which is renamed at the end.

Shapes: B images per batch, K classes, S stages, P patches, D width.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from clca import CLCAViTConfig
from clca.loss_clca import classification_loss

from ..evaluation.prediction import hash_weights, identity_of_data
from ..interpret.attention_maps import checked_layers, evaluation_mode
from ..interpret.patterns import PatternStatistics, cluster_maps, own_tokens, stage_layers
from ..interpret.tracing import trace_patches
from ..utils.files import write_csv, write_text_atomically
from ..utils.locks import exclusive_lock
from ..utils.statistics import RunningMean
from .inputs import Batch, LayerOutputs, as_json, batches, check_cls, no_file


logger = logging.getLogger(__name__)

RECORD = "analysis.json"
STATE = "state.npz"


class Analysis(NamedTuple):
    """The result of `analyze`."""

    path: Path
    images: int  # number of rows written
    metrics: dict[str, float]  # fractions in [0, 1] and the mean loss, over images of known class
    broken: list[str]  # skipped images
    resumed_at: int  # images finished by an interrupted call


def analyze(
    model: nn.Module,
    dataset: Dataset,
    output: str | os.PathLike,
    *,
    layers: Sequence[int] = (),
    assignments: bool = False,
    class_names: Sequence[str] | None = None,
    files: Callable[[int], str | None] = no_file,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_size: int = 1024,
    skip_broken: bool = False,
    progress: bool = False,
    data: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    figure: Callable[[Path, PatternStatistics], None] | None = None,
) -> Analysis:
    """Write the model's output for each image, and statistics of all images, into a folder.

    `images-00000.parquet` and so on have a row per image: `index`, `file`, `label`, `prediction`, `probability`, `loss`, `logits`. For a
    model with a reduction, each stage i adds `kept_i`, the patches that have their own token, in row-major order. With
    `assignments`, it also adds `cluster_i`, the index of the token that holds the largest part of each patch after the stage (-1 for
    none), and `share_i`, the share of the patch in that token. `cls_3` is CLS after layer 3. Labels and predictions are class indices,
    or lists of them for multi-label data; unknown labels, and their losses, are null.

    `classes.csv` has a row per class, `stages.csv` a row per stage, `maps.csv` a row per patch: its mean depth and how often it is
    kept. `analysis.json` holds the metrics and `record`.

    Args:
        model: a CLCA classifier, on the device to run on.
        dataset: a `TransformedImages`, `StreamedImages` or similar data set.
        output: the folder. If it exists, it must hold the result of the same call, which is then returned.
        layers: 0-based indices of the layers whose CLS features are written.
        assignments: also write which token holds each patch.
        class_names: K names; None for those of the model.
        files: returns the file name of an image by index, for the rows and for messages.
        batch_size: images per batch.
        num_workers: number of processes that load images.
        shard_size: images per file, rounded up to whole batches.
        skip_broken: skip images that cannot be read.
        progress: show a progress bar.
        data: identifies the images in addition to their names, e.g. by data set, split and options. A result for other data is not
            reused.
        record: additional content of `analysis.json`.
        figure: function that draws the statistics of the reduction into the folder.

    Raises:
        ValueError: if the data set is empty, an image cannot be read, assignments or CLS features are requested of a model without a
            reduction or CLS token, a number is out of range, or the folder has other content or is in use by another process.
    """
    config, output = model.config, Path(output)
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if layers:
        check_cls(config, "the model", "writing CLS features")
        checked_layers(layers, config)
    if assignments:
        stage_layers(config)
    names = list(class_names or (config.id2label[k] for k in range(config.num_labels)))
    writer = _Writer(config, list(layers), assignments)
    shard_size = -(-shard_size // batch_size) * batch_size
    same = {
        "model": hash_weights(model),
        "data": _hash([identity_of_data(dataset, files), dict(data or {})]),
        "options": [list(layers), assignments, batch_size, shard_size],
        "classes": names,
    }
    with exclusive_lock(
        output, f"{output} is in use by another process. Wait for it to finish or choose another folder."
    ):
        if finished := _finished(output, same):
            return finished
        statistics = Statistics(config)
        pass_ = _Pass(output, same, statistics)
        start = pass_.begin()
        if start:
            logger.info("Resuming the interrupted analysis %s after %d images", output, start)
        began, rows, held = time.perf_counter(), [], 0
        done = not isinstance(dataset, IterableDataset) and start >= len(dataset) > 0
        source = (
            ()
            if done
            else batches(
                dataset,
                batch_size,
                start=start,
                num_workers=num_workers,
                files=files,
                skip_broken=skip_broken,
                progress="Analyzing" if progress else None,
            )
        )
        for batch in source:
            pass_.broken += batch.broken
            if batch.indices:
                rows.append(writer.rows(model, batch, [files(index) for index in batch.indices], statistics))
            held += batch.size
            if held >= shard_size:
                pass_.save(rows, writer.schema, held)
                rows, held = [], 0
        if held:
            pass_.save(rows, writer.schema, held)
        if statistics.images == 0:
            raise ValueError("`dataset` contains no readable image.")
        seconds = time.perf_counter() - began
        about = {"images": statistics.images, "broken": pass_.broken, "seconds": seconds, "resumed_at": start}
        return pass_.finish(names, about | dict(record or {}), figure, start)


# Rows of the images


class _Writer:
    """Computes the rows of a shard and the schema of its table."""

    def __init__(self, config: CLCAViTConfig, layers: list[int], assignments: bool) -> None:
        self.config, self.layers, self.assignments = config, layers, assignments
        self.stages = stage_layers(config) if config.reduction else []
        self.several = config.problem_type == "multi_label_classification"
        classes = pa.list_(pa.int32()) if self.several else pa.int32()
        fields = [("index", pa.int64()), ("file", pa.string()), ("label", classes), ("prediction", classes)]
        fields += [("probability", pa.float32()), ("loss", pa.float32()), ("logits", pa.list_(pa.float32()))]
        for stage in range(len(self.stages)):
            fields.append((f"kept_{stage}", pa.list_(pa.int32())))
            if assignments:
                fields += [(f"cluster_{stage}", pa.list_(pa.int32())), (f"share_{stage}", pa.list_(pa.float32()))]
        fields += [(f"cls_{layer}", pa.list_(pa.float32(), config.hidden_size)) for layer in layers]
        self.schema = pa.schema(fields)

    def rows(
        self, model: nn.Module, batch: Batch, files: Sequence[str | None], statistics: "Statistics"
    ) -> pa.RecordBatch:
        """Return the rows of a batch, and add the batch to the statistics."""
        with evaluation_mode(model), LayerOutputs(model, self.layers) as outputs:
            pixels = batch.columns["pixel_values"].to(model.device, non_blocking=True)
            output = model(pixel_values=pixels, output_assignments=bool(self.stages))
            features = [cls.float().cpu().numpy() for cls in outputs.cls()]
        logits = output.logits.float().cpu()
        labels, losses = batch.columns.get("labels"), np.full(len(logits), np.nan)
        known = np.zeros(len(logits), bool)
        if labels is not None:
            known = (labels.reshape(len(labels), -1) >= 0).all(dim=1).numpy()
            for i in np.flatnonzero(known):
                losses[i] = classification_loss(logits[i : i + 1], labels[i : i + 1], self.config)
        probabilities = (logits.double().sigmoid() if self.several else logits.double().softmax(dim=1)).amax(dim=1)
        ranks = (-logits.double().numpy()).argsort(axis=1, kind="stable")  # ties: the lower class first
        if self.several:
            chosen = logits.numpy() > 0
            predictions = [np.flatnonzero(row) for row in chosen]
            targets = labels.numpy() > 0 if labels is not None else np.zeros_like(chosen)
            known_labels = [np.flatnonzero(row) if k else None for row, k in zip(targets, known, strict=True)]
        else:
            predictions = ranks[:, 0]
            known_labels = [int(labels[i]) if known[i] else None for i in range(len(logits))]
            columns = np.arange(logits.shape[1])
            chosen = predictions[:, None] == columns
            targets = np.array([[-1 if k is None else k] for k in known_labels]) == columns
        statistics.update(chosen[known], targets[known], ranks[known], losses[known], len(logits))
        columns = [
            batch.indices,
            list(files),
            known_labels,
            list(predictions),
            probabilities.numpy(),
            [None if np.isnan(loss) else loss for loss in losses],
            list(logits.numpy()),
        ]
        if self.stages:
            columns += self._patterns(output.assignments, statistics)
        columns += [list(rows) for rows in features]
        arrays = [pa.array(c, type=field.type) for c, field in zip(columns, self.schema, strict=True)]
        return pa.record_batch(arrays, schema=self.schema)

    def _patterns(self, assignments: Sequence[torch.Tensor], statistics: "Statistics") -> list[list[np.ndarray]]:
        traces = trace_patches(assignments, self.config, retrieve=False).stages
        kept = own_tokens(traces).cpu().numpy()
        statistics.patterns.update(kept)
        columns = []
        if self.assignments:
            clusters = cluster_maps(assignments, self.config)
        for stage in range(len(self.stages)):
            columns.append([np.flatnonzero(row) for row in kept[:, stage]])
            if self.assignments:
                rows = clusters[:, stage]
                shares = traces[stage].gather(1, rows.clamp(min=0).unsqueeze(1)).squeeze(1) * (rows >= 0)
                columns += [list(rows.cpu().numpy()), list(shares.float().cpu().numpy())]
        return columns


class Statistics:
    """Statistics over all images so far, in constant memory.

    Args:
        config: configuration of the model.
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        self.several = config.problem_type == "multi_label_classification"
        classes = config.num_labels
        self.images = 0
        self.known = 0  # images whose class is known
        self.hits = np.zeros(2, np.int64)  # correct class among the top 1, the top 5
        self.right, self.predicted, self.labelled = (np.zeros(classes, np.int64) for _ in range(3))
        self.loss = RunningMean()
        self.class_loss = RunningMean((classes,))
        self.patterns = PatternStatistics(config) if config.reduction else None

    def update(
        self, chosen: np.ndarray, targets: np.ndarray, ranks: np.ndarray, losses: np.ndarray, images: int
    ) -> None:
        """Add the images of a batch whose classes are known.

        Args:
            chosen: (B, K) booleans, the predicted classes.
            targets: (B, K) booleans, the correct classes.
            ranks: (B, K) classes in descending order of their logits.
            losses: (B,).
            images: images in the batch, including those of unknown class.
        """
        self.images += images
        self.known += len(chosen)
        self.right += (chosen & targets).sum(axis=0)
        self.predicted += chosen.sum(axis=0)
        self.labelled += targets.sum(axis=0)
        hit = np.take_along_axis(targets, ranks[:, :5], axis=1)
        self.hits += [hit[:, :1].any(axis=1).sum(), hit.any(axis=1).sum()]
        self.loss.update(losses)
        self.class_loss.update(np.where(targets, losses[:, None], np.nan))

    def metrics(self) -> dict[str, float]:
        """Return the metrics; empty if no class is known."""
        if not self.known:
            return {}
        total = self.predicted + self.labelled
        metrics = {}
        if not self.several:
            metrics["top1"] = float(self.hits[0] / self.known)
            metrics |= {"top5": float(self.hits[1] / self.known)} if len(total) > 5 else {}
        else:
            metrics["micro_f1"] = float(2 * self.right.sum() / max(total.sum(), 1))
        occurs = total > 0
        metrics["macro_f1"] = float((2 * self.right[occurs] / total[occurs]).mean()) if occurs.any() else 0.0
        return metrics | {"loss": self.loss.mean, "loss_std": self.loss.std}

    def classes(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row per class: number of images, number of predictions, recall, precision, mean loss."""
        with np.errstate(invalid="ignore"):
            recall, precision = self.right / self.labelled, self.right / self.predicted
        columns = (names, self.labelled, self.predicted, recall, precision, self.class_loss.mean)
        keys = ("class", "images", "predicted", "recall", "precision", "loss")
        rows = zip(*(column if column is names else column.tolist() for column in columns), strict=True)
        return [dict(zip(keys, ["" if v != v else v for v in row], strict=True)) for row in rows]

    def state(self) -> dict[str, np.ndarray]:
        """Return the state for `restore`."""
        found = {name: np.asarray(getattr(self, name)) for name in self._counts()}
        for name, mean in self._means().items():
            found |= {f"{name}/{key}": value for key, value in mean.state().items()}
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a `state`."""
        for name in self._counts():
            value = state[name]
            setattr(self, name, int(value) if value.ndim == 0 else np.array(value))
        for name, mean in self._means().items():
            mean.restore({key: state[f"{name}/{key}"] for key in mean.state()})

    def _counts(self) -> tuple[str, ...]:
        return ("images", "known", "hits", "right", "predicted", "labelled")

    def _means(self) -> dict[str, RunningMean]:
        own = {"loss": self.loss, "class_loss": self.class_loss}
        of = self.patterns
        return own | ({"depth": of.depth, "kept": of.kept, "share": of.share} if of else {})


# Files


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _finished(output: Path, same: Mapping[str, Any]) -> Analysis | None:
    """Return the result of an earlier call with the same arguments, or None."""
    if output.is_file():
        raise ValueError(f"`output` must be a folder, got the file {output}.")
    if not output.is_dir() or not any(output.iterdir()):
        return None
    try:
        found = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`output` {output} exists and does not hold an analysis. Choose a new folder.") from error
    if found.get("same") != same:
        raise ValueError(
            f"`output` {output} holds an analysis of another model, other images or with other options. Choose a new "
            "folder or delete it."
        )
    return Analysis(output, found["images"], found["metrics"], found["broken"], found["images"])


class _Pass:
    """Writes the shards, and the statistics after each."""

    def __init__(self, output: Path, same: Mapping[str, Any], statistics: Statistics) -> None:
        self.output, self.same, self.statistics = output, same, statistics
        self.folder = output.with_name(f"_{output.name}.partial")
        self.broken: list[str] = []
        self.shards = self.done = 0

    def begin(self) -> int:
        """Resume an interrupted call with the same arguments, or delete what it left. Returns the number of finished images."""
        try:
            with np.load(self.folder / STATE, allow_pickle=False) as state:
                found = json.loads(str(state["about"]))
                if found["same"] == self.same:
                    self.shards, self.done, self.broken = found["shards"], found["done"], found["broken"]
                    self.statistics.restore(state)
                    return self.done
            logger.info("Deleting %s: it belongs to another model, other data or other options", self.folder)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as error:
            logger.warning("Deleting %s: its state could not be read: %s", self.folder, error)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return 0

    def save(self, rows: list[pa.RecordBatch], schema: pa.Schema, images: int) -> None:
        """Write a complete shard, then the state that includes it."""
        temporary = self.folder / "writing.tmp"
        pq.write_table(pa.Table.from_batches(rows, schema=schema), temporary, compression="zstd")
        os.replace(temporary, self.folder / f"images-{self.shards:05d}.parquet")
        self.shards, self.done = self.shards + 1, self.done + images
        about = {"same": self.same, "shards": self.shards, "done": self.done, "broken": self.broken}
        with temporary.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **self.statistics.state())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / STATE)

    def finish(self, names: Sequence[str], about: Mapping[str, Any], figure: Callable | None, start: int) -> Analysis:
        """Write the tables and the record, and give the folder its final name."""
        statistics, patterns = self.statistics, self.statistics.patterns
        if statistics.known:
            write_csv(self.folder / "classes.csv", statistics.classes(names))
        record = {"metrics": statistics.metrics(), **about, "same": self.same}
        if patterns is not None:
            record["stages"] = patterns.stages()
            write_csv(self.folder / "stages.csv", record["stages"])
            maps = patterns.maps()
            cells = np.ndindex(*patterns.grid)
            rows = [{"row": i, "column": j, **{n: float(v[i, j]) for n, v in maps.items()}} for i, j in cells]
            write_csv(self.folder / "maps.csv", rows)
            if figure is not None:
                figure(self.folder, patterns)
        for stale in self.folder.glob("images-*.parquet"):  # left by a call that was killed between shard and state
            if int(stale.stem.removeprefix("images-")) >= self.shards:
                stale.unlink()
        write_text_atomically(self.folder / RECORD, as_json(record))
        (self.folder / STATE).unlink()
        if self.output.is_dir():
            self.output.rmdir()  # empty
        os.replace(self.folder, self.output)
        return Analysis(self.output, statistics.images, statistics.metrics(), self.broken, start)
