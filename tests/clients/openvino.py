"""OpenVINO, from torch.export.export of the bare model."""

from pathlib import Path

import openvino
import torch

from tests.clients.common import difference, logits_of, main, model, pixels


def check(folder: Path) -> str:
    classifier = model()
    with torch.no_grad():
        program = torch.export.export(classifier, (), {"pixel_values": pixels()})
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", options)
    logits = compiled([pixels(6)[2:].numpy()])[0]
    return f"through torch.export, {difference(logits, logits_of(classifier, pixels(6)[2:]), 1e-4)}"


if __name__ == "__main__":
    main(check)
