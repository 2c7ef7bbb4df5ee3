"""Recipes parse; those of the paper have the published values and train; docs/migrating.md refers to existing options."""

import csv
import json
import re
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import run_ufgir
from clca import REDUCTIONS
from tests.helpers import tiny_config, tiny_model
from ufgir.cli.entry import COMMANDS
from ufgir.training.optimization import OptimizationArguments, make_schedule
from ufgir.utils.arguments import RecipeParser


ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
PUBLISHED = {
    (row["pretraining"], row["method"], float(row["keep_rate"]), row["dataset"]): f"{row['mean']} ± {row['std']}"
    for row in csv.DictReader((Path(__file__).parents[1] / "published_accuracy.csv").open())
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(*argv: Any) -> run_ufgir.Options:
    return run_ufgir.Options(*RecipeParser(run_ufgir.GROUPS, prog="run_ufgir.py").parse([str(word) for word in argv]))


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_parses(path: Path) -> None:
    """The options are consistent, and the first lines contain the command, the cost and the expected result."""
    options = parse(path)
    options.optimization.check(options.training)
    options.model.model_name_or_path = None  # the network's shape is the checkpoint's
    run_ufgir.make_config(options.model)
    head = path.read_text(encoding="utf-8").splitlines()
    assert head[0].startswith(f"# python run_ufgir.py {name_of(path)}")
    assert head[1].startswith("# Cost") and any(line.startswith("# Expect") or "ccuracy" in line for line in head[1:4])


def test_there_is_a_recipe_for_each_published_data_set() -> None:
    assert {key[3] for key in PUBLISHED} | {"soygene_clip"} == {path.stem for path in PAPER}


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_recipes_say_the_published_numbers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    dataset, pretraining = path.stem.removesuffix("_clip"), "CLIP-laion2b" if "clip" in path.stem else "DeiT3-IN1k"
    assert (
        re.search(r"^# Expect: test top-1 (\S+ ± \S+) %", text, re.M)[1]
        == PUBLISHED[pretraining, "clca", 0.1, dataset]
    )
    rows = re.findall(r"^# ([\d.]+) +(\S+ ± \S+) +(\S+ ± \S+) +(\S+ ± \S+)$", text, re.M)
    table = {
        (pretraining, method, float(rate), dataset): cell
        for rate, *cells in rows
        for method, cell in zip(("base", "cla", "clca"), cells, strict=True)
    }
    assert len(table) == 15 and table.items() <= PUBLISHED.items()
    assert (
        re.search(r"^#   ufgir prepare (\S+) --source RAW --output data/(\S+)$", text, re.M).groups() == (dataset,) * 2
    )
    source = "vit_base_patch16_clip_224.laion2b" if "clip" in path.stem else "deit3_base_patch16_224.fb_in1k"
    folder = parse(path).model.model_name_or_path
    assert f"#   ufgir convert timm/{source} --output {folder}\n" in text
    assert set(re.findall(r"ufgir ([a-z-]+) ", text)) <= set(COMMANDS)


def test_paper_recipes_are_one_recipe() -> None:
    """They differ only in the data, the backbone, and whether checkpoints of a gigabyte are kept."""
    own = ("dataset", "output_dir", "model_name_or_path", "save_strategy", "save_total_limit")
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in PAPER]
    shared = [{name: value for name, value in recipe.items() if name not in own} for recipe in recipes]
    assert all(recipe == shared[0] for recipe in shared)
    assert [recipe["dataset"] for recipe in recipes] == [f"data/{path.stem.removesuffix('_clip')}" for path in PAPER]


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_recipes_train_as_the_original(path: Path) -> None:
    """They have the hyper-parameters of the paper, and the original's schedule and groups."""
    options = parse(path)
    args, model = options.training, options.model
    assert (args.learning_rate, args.weight_decay, args.per_device_train_batch_size) == (1e-4, 0.05, 32)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.999, 1e-8, 0)
    assert args.optim.value.startswith("adamw_torch") and args.num_train_epochs == 50 and args.seed == 1
    assert args.gradient_accumulation_steps == 1 and args.dataloader_drop_last and not args.load_best_model_at_end
    assert (model.image_size, options.data.resize_size, model.reduction, model.keep_rate) == (448, 512, "evit", [0.1])
    assert (model.reduction_layers, model.head, model.num_clr_tokens) == ([3, 6, 9], "cla", 1)
    assert model.cross_layer_cache and model.cache_gap is None and model.cache_recover_at_last is None  # both on
    assert options.data.train_on_trainval and args.do_train and args.do_predict and not args.do_eval
    assert options.optimization.parameter_groups == "original" and options.optimization.mixed_precision == "auto"
    with safe_open(ROOT / "tests" / "goldens_misc" / "sched_cosine_epochs.safetensors", "pt") as file:
        expected = file.get_tensor("lr")[:, 0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
    schedule, rates = make_schedule(optimizer, options.optimization, 10, 500), []
    for _ in range(500):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        "--keep_rate 0.7",
        "--reduction none",
        "--cross_layer_cache false --num_clr_tokens 0",
        "--head linear --cross_layer_cache false --num_clr_tokens 0 --reduction none",
    ],
)
def test_other_cells_of_the_table_by_overriding(changes: str) -> None:
    for words in changes.split(" --"):  # the recipe tells the user exactly these
        text = PAPER[0].read_text(encoding="utf-8")
        assert words.removeprefix("--") in text
    options = parse(PAPER[0], *changes.split())
    options.model.model_name_or_path = None
    config = run_ufgir.make_config(options.model)
    assert config.reduction == (None if "none" in changes else "evit")
    assert config.head == ("linear" if "linear" in changes else "cla")
    assert config.keep_rate == ([0.7] if "0.7" in changes else [0.1])


def test_paper_recipe_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of the paper trains a tiny backbone on tiny images from the given weights with the schedule; only the test images are
    evaluated, once, at the end."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 2), ("test", 4)):
        for channel, name in enumerate("rgb"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (40, 40, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    backbone = tiny_model(num_labels=5, layerscale_value=1.0, prefix_position_embeddings=False).float()
    backbone.save_pretrained(tmp_path / "backbone")
    tiny = "--model_name_or_path backbone --dataset data --image_size 32 --resize_size 36 --reduction_layers 1 2"
    tiny += (
        " --keep_rate 0.5 --per_device_train_batch_size 6 --num_train_epochs 8 --schedule_epochs 6 --logging_steps 1"
    )
    tiny += " --warmup_epochs 1 --learning_rate 1e-3 --dataloader_num_workers 0 --use_cpu true --disable_tqdm true"
    metrics = run_ufgir.main([str(ROOT / "recipes" / "paper" / "soygene.yaml"), *tiny.split(), "--output_dir", "out"])
    assert list(metrics) == ["test"] and metrics["test"]["top1"] > 0.8
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in log if "learning_rate" in line]
    assert len(steps) == 32  # 18 + 6 images, train and validation, in batches of 6, for eight epochs
    cosine = [1e-5 + 99e-5 * (1 + np.cos(np.pi * epoch / 6)) / 2 for epoch in range(1, 6)]
    expected = np.repeat([1e-6, *cosine, 1e-5, 1e-5], 4)
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert not any("eval_loss" in line for line in log)
    trained = load_file(tmp_path / "out" / "model.safetensors")
    started = load_file(tmp_path / "backbone" / "model.safetensors")
    moved = (trained["vit.layers.0.mlp.fc1.weight"] - started["vit.layers.0.mlp.fc1.weight"]).abs().max()
    assert 0 < moved < 0.1 < started["vit.layers.0.mlp.fc1.weight"].abs().max()  # it was not re-initialized
    assert tiny_config().num_hidden_layers == 5 and trained["classifier.aggregate.weight"].shape[-1] == 3


# --- docs/training.md, and make demo ---------------------------------------------------------------------------------


def test_examples_have_folders_of_their_own() -> None:
    """No example writes to the folder of the demo model, and no two write to the same folder, unless the second resumes the first; folders
    are written before they are read."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    written = {"outputs/demo"}
    commands = [
        shlex.split(line, comments=True)[2:] for line in lines if "run_ufgir.py" in line and "paper/" not in line
    ]
    assert len(commands) > 10
    for words in commands:
        options = parse(*(ROOT / word if word.endswith(".yaml") else word for word in words))
        args = options.training
        assert (args.output_dir in written) == (args.resume_from_checkpoint in ("true", "auto")), words
        read = {options.model.model_name_or_path, options.distillation.teacher} - {None}
        assert read <= written, words
        written.add(args.output_dir)


def test_pictures_of_the_gallery_are_those_that_make_demo_draws() -> None:
    """They are in a folder without a model."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folder = re.search(r"^LEAVES := (outputs/\w+)/test/\*/00000\.png$", makefile, re.M)[1]
    assert f"--output {folder} --images_per_class 1 1 1" in makefile
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    copied = re.findall(r"^cp (\S+) (outputs/\w+\.png)$", gallery, re.M)
    assert len(copied) == 2 and all(
        re.fullmatch(rf"{folder}/test/cultivar_0\d/00000\.png", source) for source, _ in copied
    )
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert not [path for path in documents if f"--output_dir {folder}" in path.read_text(encoding="utf-8")]


# --- docs/migrating.md -----------------------------------------------------------------------------------------------
# What the original's command line offers, read off it.
ORIGINAL_OPTIONS = re.findall(
    r"\w+",
    """
    batch_size epochs bce_loss scale_lr eval_freq pretrained model input_size resize_size drop drop_path model_ema opt opt_eps
    opt_betas weight_decay clip_grad momentum sched lr warmup_lr min_lr decay_epochs warmup_epochs cooldown patience decay_rate
    trivial_aug smoothing re_prob re_mult re_size re_r1 repeated_aug train_mode mixup cutmix distillation finetune resume
    start_epoch eval num_workers pin_mem seed backbone_lr_scale backbone_freeze_steps constant_cls grad_accum
    save_more_than_best output_dir serial debugging plot_gradients ifa_head ifa_dws_conv_groups clc clc_pool_cls clc_pool_clr
    num_clr lasso_loss_weight lasso_inner_dim num_query_tokens reduction_loc keep_rate use_amp fp16 clc_include_gap
    clc_recover_at_last no_dyvit_teacher mse_token token_distill_weight cls_distill_weight ratio_weight cls_weight dyvit_distill
    k_neighbors equal_weight cluster_iters sinkhorn_eps heuristic_pattern min_radius not_contiguous color_jitter aa
    train_interpolation ThreeAugment src remode recount resplit attn_only freeze_backbone unfreeze_cls
    unfreeze_positional_embedding cfg train_trainval custom_mean_std
    """,
)


def cells() -> list[list[str]]:
    """Return the rows of the tables, split into cells."""
    lines = [line for line in MIGRATING.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_option_of_the_original_is_mapped() -> None:
    left = {name for row in cells() for name in re.findall(r"`--(\w+)", row[0])}
    assert set(ORIGINAL_OPTIONS) <= left


def test_every_option_that_is_named_exists() -> None:
    """In the right column and in the text, options exist and values have the correct type."""
    known = RecipeParser(run_ufgir.GROUPS, prog="run_ufgir.py").options
    rows = [row for row in cells() if row[1:] and "--" in row[-1]]
    named = [(name, value) for row in rows for name, value in re.findall(r"`--(\w+)(?: ([^`]+))?`", row[-1])]
    assert len(named) > 80 and {name for name, _ in named} <= set(known)
    for name, value in named:
        if value:
            parse(f"--{name}", *shlex.split(value), *_beside(name))
    commands = set(re.findall(r"`ufgir ([a-z-]+)", MIGRATING)) | set(re.findall(r"^ufgir ([a-z-]+)", MIGRATING, re.M))
    assert commands and commands <= set(COMMANDS)


def _beside(name: str) -> list[str]:
    """Return the options that an option requires."""
    if name in ("schedule_epochs", "schedule_per"):
        return ["--schedule", "cosine_epochs"]
    if name == "lr_scheduler_type":
        return ["--do_train", "--eval_strategy", "epoch"]
    return ["--freeze", "backbone"] if name == "unfreeze" else []


def test_keys_of_methods_exist() -> None:
    table = MIGRATING.split("key in `--reduction_kwargs`")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert len(rows) > 8
    for theirs, methods, ours in rows:
        keys = re.findall(r"`--(\w+)" if "the same" in ours else r"`(\w+)`", theirs if "the same" in ours else ours)
        for key in set(keys) - {"mse", "kl"}:
            named = [name for name in REDUCTIONS if name in methods]
            assert any(key in signature(REDUCTIONS[name]).parameters for name in named), (key, named)


def test_worked_commands_parse() -> None:
    """The three commands of this version and the three of the original parse."""
    blocks = re.findall(r"```bash\n(.*?)```", MIGRATING, re.S)
    ours = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "run_ufgir.py" in line]
    theirs = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if " train.py " in line]
    assert len(ours) == len(theirs) == 3
    for line in ours:
        options = parse(*shlex.split(line)[2:])
        options.optimization.check(options.training)
        options.model.model_name_or_path = None
        run_ufgir.make_config(options.model)
    for line in theirs:
        assert {word[2:] for word in shlex.split(line) if word.startswith("--")} <= set(ORIGINAL_OPTIONS)


def test_the_first_command_is_the_recipe() -> None:
    line = next(line for line in MIGRATING.replace("\\\n", " ").splitlines() if "models/clip_base --ignore" in line)
    command, recipe = parse(*shlex.split(line)[2:]), parse(ROOT / "recipes" / "paper" / "soygene_clip.yaml")
    assert command.model == recipe.model and command.optimization == _defaults_filled(recipe.optimization)
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "seed", "do_predict"):
        assert getattr(command.training, name) == getattr(recipe.training, name)
    assert command.data.train_on_trainval and command.data.image_mean == recipe.data.image_mean


def _defaults_filled(args: OptimizationArguments) -> OptimizationArguments:
    """Remove `schedule_per: epoch`, the default, which the recipe sets explicitly."""
    assert args.schedule_per == "epoch"
    args.schedule_per = None
    return args
