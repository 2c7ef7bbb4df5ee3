"""DeepSpeed ZeRO-2 on a CPU, one process."""

import os
from pathlib import Path

import deepspeed
import torch

from tests.clients.common import Data, changed, main, model, parameters


def check(folder: Path) -> str:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29541",
    }
    deepspeed.init_distributed("gloo")
    classifier = model().train()
    before = parameters(classifier)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=classifier, optimizer=optimizer, model_parameters=trained, config=settings)
    for batch in torch.utils.data.DataLoader(Data(), batch_size=4):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    return f"3 steps change all {changed(engine.module, before)} trainable parameters"


if __name__ == "__main__":
    main(check)
