"""Unmodified Trainer of transformers: training, evaluation, prediction, and saving and loading a checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from tests.clients.common import Data, changed, difference, logits_of, main, model, parameters, pixels, same_weights


def check(folder: Path) -> str:
    classifier = model()
    before = parameters(classifier)
    options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, "save_steps": 3}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, **options
    )
    trainer = Trainer(classifier, arguments, train_dataset=Data(), eval_dataset=Data())
    loss = trainer.train().training_loss
    assert torch.isfinite(torch.tensor(loss))
    count = changed(classifier, before)
    assert trainer.evaluate()["eval_loss"] > 0
    predicted = trainer.predict(Data()).predictions
    assert predicted.shape == (12, 3)
    loaded = AutoModelForImageClassification.from_pretrained(folder / "checkpoint-3", trust_remote_code=True).eval()
    same_weights(loaded.state_dict(), classifier.state_dict())
    told = difference(logits_of(loaded, pixels()), logits_of(classifier.eval(), pixels()), 1e-6)
    return f"3 steps change all {count} trainable parameters; its checkpoint loads, {told}"


if __name__ == "__main__":
    main(check)
