"""bitsandbytes: 8 bit, through from_pretrained."""

from pathlib import Path

from transformers import AutoModelForImageClassification, BitsAndBytesConfig

from tests.clients.common import difference, logits_of, main, pixels, save


def check(folder: Path) -> str:
    expected = logits_of(save(folder, keep_rate=1.0), pixels())
    quantized = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    ).eval()
    kinds = {type(module).__name__ for module in quantized.modules()}
    assert "Linear8bitLt" in kinds, "nothing is quantized"
    return f"load_in_8bit, {difference(logits_of(quantized, pixels()).float(), expected, 0.5)} of float32"


if __name__ == "__main__":
    main(check)
