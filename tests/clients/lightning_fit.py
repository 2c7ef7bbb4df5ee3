"""Lightning: a LightningModule around our model."""

from pathlib import Path
from typing import Any

import lightning
import torch

from tests.clients.common import Data, changed, main, model, parameters


class Module(lightning.LightningModule):
    """Minimal LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def check(folder: Path) -> str:
    module = Module()
    before = parameters(module.model)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=3, default_root_dir=folder, devices=1, **options)
    trainer.fit(module.train(), torch.utils.data.DataLoader(Data(), batch_size=4))
    count = changed(module.model, before)
    trainer.save_checkpoint(folder / "last.ckpt")
    return f"3 steps change all {count} trainable parameters"


if __name__ == "__main__":
    main(check)
