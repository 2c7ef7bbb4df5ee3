"""peft: get_peft_model, a training step, merge_and_unload."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.clients.common import difference, logits_of, main, model, pixels, same_weights


def check(folder: Path) -> str:
    adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    before = logits_of(adapted.eval(), pixels())
    for _ in range(2):
        adapted.train()(pixel_values=pixels(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits_of(adapted.eval(), pixels())
    assert not torch.equal(before, expected)
    merged = adapted.merge_and_unload()
    told = difference(logits_of(merged, pixels()), expected, 1e-4)
    merged.save_pretrained(folder)
    loaded = type(merged).from_pretrained(folder).eval()
    same_weights(loaded.state_dict(), merged.state_dict())
    difference(logits_of(loaded, pixels()), logits_of(merged, pixels()), 1e-6)
    return f"get_peft_model (LoRA) trains; merged, {told}"


if __name__ == "__main__":
    main(check)
