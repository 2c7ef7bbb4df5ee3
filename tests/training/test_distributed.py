"""Two processes: they train, evaluate, predict and resume as one does. All but the command line's own start are forks of this
process, with the environment that torchrun makes (a fresh one would import torch for seconds)."""

import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import run_ufgir
from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, TINY, VARIANTS, checkpoint_activations, images, labels, tiny_model, variant_model
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.data.transformed import TransformedImages
from ufgir.evaluation import prediction
from ufgir.evaluation.metrics import compute_metrics
from ufgir.evaluation.prediction import predict_to_file
from ufgir.training.checkpointing import checkpoint_folders, checkpoint_problem
from ufgir.training.distributed import DistributedArguments
from ufgir.training.trainer import UFGIRTrainer
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor


ROOT = Path(__file__).parents[2]
OPTIONS = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "reduction": "evit",
    "reduction_layers": [1],
    "keep_rate": 0.5,
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "do_train": True,
    "do_predict": True,
    "num_train_epochs": 4,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 5,
    "ddp_find_unused_parameters": False,  # an unused one would stop the training
}


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> Path:
    """Write three classes of noisy colors: 18 images for training, 9 for validation, 9 for test."""
    root, generator = tmp_path_factory.mktemp("leaves"), np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (20, 24, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{name}{i}.png")
    return root


def recipe(folder: Path, data: Path, **changes: Any) -> str:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(OPTIONS | {"dataset": str(data), "output_dir": str(folder)} | changes))
    return str(path)


def in_two_processes(function: Callable[[int], None], folder: Path) -> None:
    """Call `function(rank)` in two processes, as torchrun would start them; fail with their tracebacks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int) -> None:
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for state in (AcceleratorState, PartialState, GradientState):  # other tests have found one process
                state._reset_state()
            function(rank)
        except BaseException:
            (folder / f"error-{rank}").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
    assert not errors and [p.exitcode for p in processes] == [0, 0], "\n".join(errors)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_as_one(two: Path, one: Path) -> None:
    """Compare weights, the loss of each step and the metrics of validation and test; 9 images are not a multiple of the batch."""
    expected = weights(one)
    for name, value in weights(two).items():
        assert (value - expected[name]).abs().max() <= 1e-5, name
    assert len(log(two)) == len(log(one)) == 4 * 4 + 4 + 1
    for actual, wanted in zip(log(two), log(one), strict=True):
        for name in {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_top1", "eval_macro_f1"} & wanted.keys():
            assert actual[name] == pytest.approx(wanted[name], abs=1e-5), name
    assert rows(two)[0].keys() == rows(one)[0].keys()
    for actual, wanted in zip(rows(two), rows(one), strict=True):
        assert all(actual[name] == wanted[name] for name in ("index", "file", "label", "prediction"))
        assert float(actual["probability_1"]) == pytest.approx(float(wanted["probability_1"]), abs=1e-5)


# Training


def test_torchrun(leaves: Path, tmp_path: Path) -> None:
    """With a linear head, the command gives the result of one process with the doubled batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_ufgir.main([recipe(one, leaves, per_device_train_batch_size=4)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_ufgir.py"]
    command.append(recipe(two, leaves, per_device_train_batch_size=2))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_one(two, one)


@pytest.fixture(scope="module")
def trained(leaves: Path, tmp_path_factory) -> Path:
    """Return `<head>1` and `<head>2`: trained by one process, and by two with half the batch each."""
    root = tmp_path_factory.mktemp("trained")
    heads = {head: {"head": head, "num_train_epochs": 4} for head in ("ifa", "cla")}
    for head, changes in heads.items():
        run_ufgir.main([recipe(root / f"{head}1", leaves, per_device_train_batch_size=4, **changes)])

    def run(rank: int) -> None:
        for head, changes in heads.items():
            run_ufgir.main([recipe(root / f"{head}2", leaves, per_device_train_batch_size=2, **changes)])
            if torch.distributed.is_initialized():
                torch.distributed.barrier()

    in_two_processes(run, root)
    return root


def test_ifa_head(trained: Path) -> None:
    assert_as_one(trained / "ifa2", trained / "ifa1")


def test_cla_head_is_not_as_one(trained: Path) -> None:
    """Its BatchNorm uses the images of one process, so that even the first loss differs. (If this fails, update docs/scaling.md.)"""
    one, two = (log(trained / f"cla{n}")[0]["loss"] for n in (1, 2))
    assert abs(one - two) > 1e-3


def test_evaluation_of_a_batchnorm(trained: Path, leaves: Path, tmp_path: Path) -> None:
    """Both processes evaluate with the saved statistics: the last evaluation is that of the saved model."""
    folder = trained / "cla2"
    argv = ["--model_name_or_path", str(folder), "--dataset", str(leaves), "--output_dir", str(tmp_path), "--use_cpu"]
    metrics = run_ufgir.main([*argv, "--do_predict", "--num_pictures", "0"])
    (tmp_path / "predictions.csv").rename(tmp_path / "one.csv")
    for actual, wanted in zip(rows(folder), csv.DictReader((tmp_path / "one.csv").open(newline="")), strict=True):
        assert float(actual["probability_1"]) == pytest.approx(float(wanted["probability_1"]), abs=2e-6)
    said = json.loads((folder / "test_results.json").read_text())
    assert said["test_top1"] == pytest.approx(metrics["test"]["top1"], abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_unused(variant: str) -> None:
    """Every trainable parameter gets a gradient in each step, because DDP would wait for it."""
    model = variant_model(variant).train()
    model(images().float(), labels=labels()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation checkpointing"])
def test_loaded_checkpoints(checkpointing: bool, tmp_path: Path) -> None:
    """Loaded models train beyond the second step, in which DDP would report a missing gradient of the first: with heads that use CLS before
    the final norm, from a checkpoint of ours and from a stock ViT, with transformers' own Trainer."""
    stock = {k: v for k, v in TINY.items() if k != "reduction_layers"}
    ViTForImageClassification(ViTConfig(**stock)).save_pretrained(tmp_path / "stock")
    variants = {name: VARIANTS[name] for name in ("evit", "dyvit", "ifa", "vqt")}
    for name in variants:
        variant_model(name).save_pretrained(tmp_path / name)
    pixels = images(16).float()
    data = [{"pixel_values": pixels[i], "labels": i % 3} for i in range(16)]

    def run(rank: int) -> None:
        for name, options in variants.items():
            for source, changes in ((name, {}), ("stock", {"reduction_layers": [1, 2]} | options)):
                model = CLCAViTForImageClassification.from_pretrained(
                    tmp_path / source, ignore_mismatched_sizes=True, **changes
                )
                args = TrainingArguments(
                    str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=4, use_cpu=True
                )
                args.ddp_find_unused_parameters, args.save_strategy, args.report_to = False, "no", []
                args.disable_tqdm = True
                if checkpointing:
                    checkpoint_activations(model)
                trainer = Trainer(model, args, train_dataset=data)
                trainer.train()
                assert trainer.state.global_step == 4 and args.world_size == 2
                assert not any(p.isnan().any() for p in model.parameters())

    in_two_processes(run, tmp_path)


def test_resumed(leaves: Path, tmp_path: Path) -> None:
    """Two processes, each with its own random state, give exactly the result of an uninterrupted training. One process can resume from the
    same checkpoint."""
    plan = {
        "drop_path_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "no",
        "do_predict": False,
    }
    plan |= {"load_best_model_at_end": False, "save_total_limit": 9, "num_train_epochs": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def run(rank: int) -> None:
        run_ufgir.main([recipe(whole, leaves, per_device_train_batch_size=2, **plan)])
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
        torch.distributed.barrier()
        again = recipe(stopped, leaves, per_device_train_batch_size=2, **plan)
        run_ufgir.main([again, "--resume_from_checkpoint", "true"])

    in_two_processes(run, tmp_path)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(stopped).items())
    assert [f.name for f in checkpoint_folders(stopped)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    for folder in checkpoint_folders(whole):
        assert checkpoint_problem(folder) is None
        states = [torch.load(folder / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2)]
        assert not torch.equal(*states)
    one = recipe(stopped, leaves, per_device_train_batch_size=4, **plan | {"num_train_epochs": 3})
    run_ufgir.main([one, "--resume_from_checkpoint", "true"])
    assert checkpoint_folders(stopped)[-1].name == "checkpoint-12"


def test_each_process_draws_for_itself(tmp_path: Path) -> None:
    """Dropout differs between processes, and the order of images does not."""

    def run(rank: int) -> None:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, seed=3)
        args = dataclasses.replace(args, per_device_train_batch_size=2, dataloader_drop_last=True)
        data = [{"pixel_values": torch.zeros(3, 32, 32), "labels": i} for i in range(8)]
        batches = [
            batch["labels"].tolist()
            for batch in UFGIRTrainer(variant_model("ifa"), args, train_dataset=data).get_train_dataloader()
        ]
        (tmp_path / f"{rank}.json").write_text(json.dumps([batches, torch.rand(3).tolist()]))

    in_two_processes(run, tmp_path)
    (first, noise), (second, other) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert sorted(itertools.chain(*first, *second)) == list(range(8)) and first != second
    assert noise != other


# BatchNorm


def arguments(device: str, world_size: int = 2, **changes: Any) -> Any:
    """Return the attributes of TrainingArguments that are used."""
    known = {"device": torch.device(device), "world_size": world_size, "process_index": 0, "do_train": True}
    known |= {"do_predict": True, "fsdp": None, "deepspeed": None}
    return SimpleNamespace(**known | {"per_device_train_batch_size": 4} | changes)


def test_sync_batchnorm(caplog: pytest.LogCaptureFixture) -> None:
    """torch supports it on GPUs only, where no test runs."""
    model, names = variant_model("evit"), ("norm_in", "norm_out")
    synchronised = DistributedArguments(sync_batchnorm=True)
    with pytest.raises(ValueError, match="`sync_batchnorm` needs GPUs"):
        synchronised.prepare(model, arguments("cpu"))
    alone = synchronised.prepare(model, arguments("cuda", world_size=1))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in alone.modules()) and not caplog.text
    keys = list(model.state_dict())
    together = synchronised.prepare(model, arguments("cuda"))
    assert all(isinstance(getattr(together.classifier, name), nn.SyncBatchNorm) for name in names)
    assert list(together.state_dict()) == keys


def test_statistics_of_several_keep_rates_are_not_synchronised(caplog: pytest.LogCaptureFixture) -> None:
    """A warning reports it."""
    model = tiny_model(reduction="evit", head="cla", train_keep_rates=[0.25, 0.5])
    with pytest.raises(ValueError, match=r"`sync_batchnorm` .* `train_keep_rates`"):
        DistributedArguments(sync_batchnorm=True).prepare(model, arguments("cuda"))
    assert DistributedArguments().prepare(model, arguments("cuda")) is model
    assert "not the 8 of a step" in caplog.text and "`sync_batchnorm`" not in caplog.text


@pytest.mark.parametrize("device, words", [("cpu", "larger batch"), ("cuda", "(`sync_batchnorm` avoids this)")])
def test_warns_that_batches_are_normalized_separately(
    caplog: pytest.LogCaptureFixture, device: str, words: str
) -> None:
    plain = DistributedArguments()
    plain.prepare(variant_model("evit"), arguments(device))
    assert "the 4 images of its own process, not the 8 of a step" in caplog.text and words in caplog.text
    caplog.clear()
    for model, args in (
        (variant_model("ifa"), arguments(device)),
        (variant_model("evit"), arguments(device, world_size=1)),
        (variant_model("evit"), arguments(device, process_index=1)),
        (variant_model("evit"), arguments(device, do_train=False)),
    ):
        assert plain.prepare(model, args) is model
    assert not caplog.text


# FSDP and DeepSpeed: torch's `fully_shard`, which the former is made of, runs on CPUs, and so does ZeRO


SHARDED = [
    "evit",
    "dpcknn",
    "sit",
    "dyvit",
    "tome",
    "vqt",
    "map",
    "scaled",
]  # stages, probes and pooling with parameters


@pytest.mark.slow
def test_fully_sharded(tmp_path: Path) -> None:
    """With weights, gradients and optimizer in two shards, three steps are equal to those of one process with the whole batch, and
    `from_pretrained` loads the gathered state dict."""

    def model_of(variant: str) -> CLCAViTForImageClassification:
        options = VARIANTS[variant] | (
            {"head": "ifa"} if VARIANTS[variant].get("head") == "cla" else {}
        )  # no BatchNorm
        if variant == "dyvit":
            options |= {
                "reduction_kwargs": {"ratio_weight": 0.0}
            }  # a mean of squares over the batch is not a mean of means
        return tiny_model(**options).train(variant != "dyvit")  # whose draws are those of a process

    def train(model: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            loss = model(pixels, labels=targets).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    pixels, targets = images(4), torch.tensor([0, 1, 2, 0])

    def run(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        for variant in SHARDED:
            model = model_of(variant)
            for layer in model.vit.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            half = slice(2 * rank, 2 * rank + 2)
            losses = train(model, pixels[half], targets[half])
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            (tmp_path / f"{variant}{rank}.json").write_text(json.dumps(losses))
            if rank == 0:
                model_of(variant).save_pretrained(tmp_path / variant, state_dict=state)
            torch.distributed.barrier()

    in_two_processes(run, tmp_path)
    for variant in SHARDED:
        expected = model_of(variant)
        losses = train(expected, pixels, targets)
        halves = [json.loads((tmp_path / f"{variant}{rank}.json").read_text()) for rank in (0, 1)]
        assert np.mean(halves, axis=0).tolist() == pytest.approx(losses, abs=1e-6), variant
        loaded = CLCAViTForImageClassification.from_pretrained(tmp_path / variant, dtype=torch.float64)
        for name, tensor in expected.state_dict().items():
            assert (loaded.state_dict()[name] - tensor).abs().max() <= 1e-6, (variant, name)


# What is refused before they start


def test_no_prediction_from_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    options, model = DistributedArguments(), variant_model("ifa")
    with pytest.raises(ValueError, match="`do_predict`"):
        options.prepare(model, arguments("cuda", fsdp="full_shard"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="`do_predict`"):
        options.prepare(model, arguments("cuda"))
    assert options.prepare(model, arguments("cuda", do_predict=False)) is model
    assert options.prepare(model, arguments("cuda", do_train=False)) is model


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_accelerate_recipes(name: str) -> None:
    """accelerate can read them; the first lines contain the command and whether it was run."""
    file = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    assert file.read_text().startswith(
        f"# accelerate launch --config_file recipes/accelerate/{name}.yaml run_ufgir.py recipes/"
    )
    assert "# Tested:" in file.read_text()
    config = ClusterConfig.from_yaml_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    assert config.distributed_type == kinds[name] and config.num_processes == 2 and config.mixed_precision == "no"
    for layer in str(config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "")).split(","):
        assert not layer or layer in CLCAViTForImageClassification._no_split_modules


# Evaluation and prediction


NAMES = [f"class {i}" for i in range(7)]
PROCESSOR = make_image_processor(32)


@pytest.fixture(scope="module")
def model() -> CLCAViTForImageClassification:
    torch.manual_seed(0)
    return CLCAViTForImageClassification(CLCAViTConfig(**TINY | CACHES["clca"] | {"num_labels": 7}))


def make_images(count: int) -> TransformedImages:
    generator = np.random.default_rng(0)
    rows = [
        {"image": Image.fromarray(generator.integers(0, 256, (36, 36, 3), dtype=np.uint8)), "label": i % 7}
        for i in range(count)
    ]
    return TransformedImages(rows, EvalTransform(PROCESSOR))


def as_stream(data: TransformedImages, rank: int, world_size: int) -> StreamedImages:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = datasets.Dataset.from_list(data.dataset, features=features)
    stream = to_stream(datasets.DatasetDict({"test": rows}))["test"]
    return StreamedImages(stream, EvalTransform(PROCESSOR), batch_size=2, rank=rank, world_size=world_size)


COUNTS = (1, 3, 4, 11)  # one process has nothing, a part of a batch, a batch; the other a part of one


@pytest.fixture(scope="module")
def outcomes(model: CLCAViTForImageClassification, tmp_path_factory) -> Path:
    """Run two processes on data sets of several sizes, which write `<count>-<rank>.json`, `<count>.csv` and `stream.csv`."""
    folder = tmp_path_factory.mktemp("outcomes")

    def run(rank: int) -> None:
        if rank == 1:  # as BatchNorm's statistics are after a step of training
            for buffer in model.buffers():
                buffer.add_(1)
        for count in COUNTS:
            args = TrainingArguments(
                str(folder), per_device_eval_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
            )
            args.remove_unused_columns = False
            trainer = UFGIRTrainer(model, args, compute_metrics=compute_metrics)
            evaluated = trainer.evaluate(make_images(count))
            if rank == 1:
                for buffer in model.buffers():
                    buffer.add_(1)
            predicted = predict_to_file(model, make_images(count), folder / f"{count}.csv", NAMES, batch_size=2)
            said = {"evaluated": evaluated, "predicted": predicted.metrics, "images": predicted.images}
            (folder / f"{count}-{rank}.json").write_text(json.dumps(said))
        streamed = predict_to_file(
            model, as_stream(make_images(11), rank, 2), folder / "stream.csv", NAMES, batch_size=2
        )
        assert streamed.images == streamed.predicted == 11

    in_two_processes(run, folder)
    return folder


def assert_same_lines(actual: Path, wanted: Path) -> None:
    for one, other in zip(*(csv.DictReader(f.open(newline="")) for f in (actual, wanted)), strict=True):
        for name in one:
            if name.startswith("probability"):
                assert float(one[name]) == pytest.approx(float(other[name]), abs=2e-6)
            else:
                assert one[name] == other[name]


@pytest.mark.parametrize("count", COUNTS)
def test_every_image_counts_once(
    model: CLCAViTForImageClassification, outcomes: Path, tmp_path: Path, count: int
) -> None:
    """Metrics, including the loss, and predictions are those of one process, in both processes."""
    data = make_images(count)
    batch = torch.utils.data.default_collate([data[i] for i in range(count)])
    with torch.no_grad():
        output = model.eval()(**batch)
    expected = compute_metrics((output.logits.numpy(), batch["labels"].numpy())) | {"loss": output.loss.item()}
    assert set(expected) == {"top1", "top5", "macro_f1", "loss"}
    for rank in range(2):
        said = json.loads((outcomes / f"{count}-{rank}.json").read_text())
        assert {k: said["evaluated"][f"eval_{k}"] for k in expected} == pytest.approx(expected, abs=1e-5)
        assert said["predicted"] == pytest.approx(expected, abs=1e-5) and said["images"] == count
    alone = predict_to_file(model, data, tmp_path / "one.csv", NAMES, batch_size=2)
    assert_same_lines(outcomes / f"{count}.csv", alone.path)


def test_streams_in_two_processes(outcomes: Path) -> None:
    assert_same_lines(outcomes / "stream.csv", outcomes / "11.csv")


def test_begun_by_two_processes_and_finished_by_one(
    model: CLCAViTForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a stream stay as they are, because it cannot be distributed again."""
    whole = predict_to_file(model, make_images(11), tmp_path / "whole.csv", NAMES, batch_size=2)
    begin = prediction._begin
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "_begin", lambda folder, same, data, processes: begin(folder, same, data, 2))
        patch.setattr(prediction, "join", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_to_file(model, make_images(11), tmp_path / "p.csv", NAMES, batch_size=2)
    assert len(list((tmp_path / "_p.csv.partial").glob("lines-*"))) == 2
    again = predict_to_file(model, make_images(11), tmp_path / "p.csv", NAMES, batch_size=2)
    assert again.predicted == 1  # the last of 5 images of the first part was no whole batch
    assert again.metrics == pytest.approx(whole.metrics)
    assert_same_lines(again.path, whole.path)

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "_begin", lambda folder, same, data, processes: begin(folder, same, data, 2))
        with pytest.raises(ValueError, match="2 processes"):
            predict_to_file(model, as_stream(make_images(5), 0, 1), tmp_path / "s.csv", NAMES, batch_size=2)
