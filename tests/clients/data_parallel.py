"""torch.nn.DataParallel, whose replicas' outputs are gathered here without a GPU: torch's own gathering is for GPUs."""

from pathlib import Path
from unittest import mock

import torch
from torch.nn.parallel import scatter_gather

from tests.clients.common import difference, logits_of, main, model, pixels


class Gather:
    """Concatenate on the CPU."""

    @staticmethod
    def apply(device: object, dim: int, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[None] if t.dim() == 0 else t for t in tensors], dim)


def check(folder: Path) -> str:
    classifier = model()
    with mock.patch.object(scatter_gather, "Gather", Gather), torch.no_grad():
        whole = scatter_gather.gather([classifier(half) for half in pixels().split(2)], "cpu")
        wrapped = torch.nn.DataParallel(classifier)(pixels()).logits
    difference(wrapped, logits_of(classifier, pixels()), 1e-6)
    return f"outputs of two replicas gathered on the CPU, {difference(whole.logits, logits_of(classifier, pixels()), 1e-5)}"


if __name__ == "__main__":
    main(check)
