"""optimum-intel: OVModelForImageClassification."""

from pathlib import Path

from optimum.intel import OVModelForImageClassification

from tests.clients.common import main, save


def check(folder: Path) -> str:
    save(folder)
    OVModelForImageClassification.from_pretrained(folder, export=True, trust_remote_code=True)
    return "exports"


if __name__ == "__main__":
    main(check)
