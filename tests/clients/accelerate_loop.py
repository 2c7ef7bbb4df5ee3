"""Training loop with accelerate: prepare, backward, gather, save."""

from pathlib import Path

import torch
from accelerate import Accelerator

from tests.clients.common import Data, changed, main, model, parameters


def check(folder: Path) -> str:
    accelerator = Accelerator(cpu=True)
    classifier = model().train()
    before = parameters(classifier)
    optimizer = torch.optim.AdamW((p for p in classifier.parameters() if p.requires_grad), lr=1e-2)
    loader = torch.utils.data.DataLoader(Data(), batch_size=4)
    classifier, optimizer, loader = accelerator.prepare(classifier, optimizer, loader)
    for batch in loader:
        output = classifier(**batch)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
    assert accelerator.gather_for_metrics(output.logits).shape == (4, 3)
    plain = accelerator.unwrap_model(classifier)
    count = changed(plain, before)
    plain.save_pretrained(folder, state_dict=accelerator.get_state_dict(classifier))
    assert type(plain).from_pretrained(folder).config.reduction == "evit"
    return f"3 steps change all {count} trainable parameters; saved and loaded"


if __name__ == "__main__":
    main(check)
