"""optimum-onnx: ORTModelForImageClassification."""

from pathlib import Path

from optimum.onnxruntime import ORTModelForImageClassification

from tests.clients.common import main, save


def check(folder: Path) -> str:
    save(folder)
    ORTModelForImageClassification.from_pretrained(folder, export=True, trust_remote_code=True)
    return "exports"


if __name__ == "__main__":
    main(check)
