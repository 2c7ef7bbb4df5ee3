"""torchao: int8 weights."""

from pathlib import Path

from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.clients.common import difference, logits_of, main, model, pixels


def check(folder: Path) -> str:
    classifier = model(keep_rate=1.0)
    expected = logits_of(classifier, pixels())
    quantize_(classifier, Int8WeightOnlyConfig())
    kinds = {type(p.data).__name__ for p in classifier.parameters()}
    assert any("Int8" in kind or "Affine" in kind for kind in kinds), f"nothing is quantized: {kinds}"
    return f"Int8WeightOnlyConfig, {difference(logits_of(classifier, pixels()), expected, 0.3)} of float32"


if __name__ == "__main__":
    main(check)
