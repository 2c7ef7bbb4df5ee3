"""ONNX Runtime, from torch.onnx.export of the bare model."""

from pathlib import Path

import onnxruntime
import torch

from tests.clients.common import difference, logits_of, main, model, pixels


def check(folder: Path) -> str:
    classifier = model()
    file = folder / "model.onnx"
    torch.onnx.export(classifier, (pixels(),), file, input_names=["pixel_values"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels(6)[2:].numpy()})
    return f"bare model exported, {difference(logits, logits_of(classifier, pixels(6)[2:]), 1e-4)}"


if __name__ == "__main__":
    main(check)
