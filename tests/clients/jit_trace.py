"""torch.jit.trace, which PyTorch deprecates, of the bare model."""

import warnings
from pathlib import Path

import torch

from tests.clients.common import difference, logits_of, main, model, pixels


def check(folder: Path) -> str:
    classifier = model()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(classifier, pixels(), strict=False)
        traced.save(str(folder / "model.pt"))
        found = torch.jit.load(str(folder / "model.pt"))(pixels(6)[2:])
    logits = found["logits"] if isinstance(found, dict) else found[0]
    return difference(logits, logits_of(classifier, pixels(6)[2:]), 1e-5)


if __name__ == "__main__":
    main(check)
