"""peft's AutoPeftModel on an adapter of ours."""

from pathlib import Path

from peft import AutoPeftModel, LoraConfig, get_peft_model

from tests.clients.common import main, save


def check(folder: Path) -> str:
    base = save(folder / "base")
    base.config.name_or_path = base.name_or_path = str(folder / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    AutoPeftModel.from_pretrained(folder / "adapter", trust_remote_code=True)
    return "loads"


if __name__ == "__main__":
    main(check)
