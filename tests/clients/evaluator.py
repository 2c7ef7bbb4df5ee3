"""evaluate.evaluator for image classification."""

from pathlib import Path

from evaluate import evaluator

from tests.clients.common import main


def check(folder: Path) -> str:
    evaluator("image-classification")
    return "imports"


if __name__ == "__main__":
    main(check)
