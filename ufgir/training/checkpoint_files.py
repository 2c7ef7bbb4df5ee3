"""The files and folders that a training writes: their names, contents, writers and readers.

A checkpoint, the folder `checkpoint-<step>` in `output_dir`, is complete or absent (`ufgir.training.checkpointing`):

| file | holds | written by | read by |
| --- | --- | --- | --- |
| `model.safetensors`, `config.json` | the weights and the configuration | `Trainer` | `Trainer`, `from_pretrained` |
| `adapter_model.safetensors`, `adapter_config.json` | with `lora_rank`, instead of these: adapter and new modules | peft | peft |
| `preprocessor_config.json` | the image processor | `Trainer` | `AutoImageProcessor` |
| `optimizer.pt`, `scheduler.pt`, `scaler.pt` | state of optimizer, learning rate schedule and fp16 scaler | `Trainer` | `Trainer` |
| `rng_state*.pth` | random states, one file per process | `Trainer` | `Trainer` |
| `trainer_state.json` | step, log, best metric, state of early stopping | `checkpointing.CheckpointMixin` | `Trainer`, `checkpointing` |
| `training_args.bin` | transformers' TrainingArguments | `Trainer` | - |
| `ema.safetensors` (`EMA_FILE`) | averaged weights, number of updates | `ema.EMACallback` | `ema.EMACallback` |
| `checkpoint_files.json` (`ufgir.utils.checksums.FILE_LIST`) | sizes and checksums of all files; options and checksum of the images | `checkpointing` | `checkpointing`, `ufgir.checkpoints.loading` |

A checkpoint is written in `output_dir/_incomplete` (`INCOMPLETE`). FSDP and DeepSpeed use other names for weights and
optimizer (`PARTS`).

In addition to checkpoints, `output_dir` holds the results of the run:

| file or folder | holds | written by | read by |
| --- | --- | --- | --- |
| `model.safetensors`, `config.json`, `preprocessor_config.json`, code | the model: the best or last weights | `run_ufgir.train` | `from_pretrained`, all commands |
| `checkpoint_files.json` (`ufgir.utils.checksums.FILE_LIST`) | sizes and checksums of the weights; also in `ema/`, `last/` and `adapter/` | `checkpointing`, `ema` | `ufgir.checkpoints.loading` |
| `ema/` (`EMA_FOLDER`) | the model with averaged weights | `ema.EMACallback` | `from_pretrained` |
| `last/` (`LAST_FOLDER`) | the model with the last weights | `callbacks.LastModel` | `from_pretrained` |
| `adapter/` (`ADAPTER_FOLDER`) | the LoRA adapter alone | `run_ufgir.train` | peft |
| `trainer_state.json` | the log of the training | `run_ufgir.train` | `ufgir.runs.figures` |
| `<split>_results.json`, `all_results.json` (`METRICS_FILES`) | metrics | `Trainer.save_metrics` | `ufgir.runs.tables` |
| `gradients.csv`, `gradients.png` (`GRADIENTS_FILE`, `GRADIENTS_FIGURE`) | gradient magnitudes | `gradients.GradientRecorder` | `ufgir.runs.details` |
| `predictions.csv` (`ufgir.utils.provenance.PREDICTIONS_FILE`) | predictions of the test images | `run_ufgir.predict` | `ufgir.evaluation`, `ufgir.runs.details` |
| `kept_patches.png` (`KEPT_PATCHES_FILE`) | figure of the patches kept in some test images | `run_ufgir.predict` | - |
| `README.md` | the model card | `ufgir.checkpoints.model_card` | the Hub |
| `run.json` (`ufgir.runs.records.RECORD`) | the record of the run, written last | `ufgir.runs.records` | `ufgir sweep`, `ufgir results` |
"""

from ..utils.checksums import FILE_LIST


# In a checkpoint
EMA_FILE = "ema.safetensors"
# Required to resume from a checkpoint: at least one file of each line, * stands for numbers and shards. The later names are those
# of FSDP and DeepSpeed.
PARTS = {
    "weights": ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*"),
    "optimizer state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "random state": ("rng_state*.pth",),
}

# In output_dir
INCOMPLETE = "_incomplete"  # names that begin with _ are not uploaded to the Hub
EMA_FOLDER = "ema"
LAST_FOLDER = "last"
ADAPTER_FOLDER = "adapter"
GRADIENTS_FILE = "gradients.csv"
GRADIENTS_FIGURE = "gradients.png"
KEPT_PATCHES_FILE = "kept_patches.png"
ALL_METRICS = "all_results.json"  # of all splits
METRICS_FILES = tuple(f"{name}_results.json" for name in ("all", "train", "validation", "test", "test_ema"))

# Files and folders in output_dir
FILES = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "trainer_state.json",
    FILE_LIST,
    "README.md",
    *METRICS_FILES,
)
FILES += (GRADIENTS_FILE, GRADIENTS_FIGURE, KEPT_PATCHES_FILE)
FOLDERS = (INCOMPLETE, EMA_FOLDER, LAST_FOLDER, ADAPTER_FOLDER)
