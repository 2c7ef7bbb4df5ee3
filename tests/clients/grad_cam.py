"""pytorch-grad-cam on a layer after tokens were dropped."""

from pathlib import Path

import torch
from pytorch_grad_cam import GradCAM

from tests.clients.common import main, model, pixels
from ufgir.interpret import LogitsOnly, PatchGrid


def check(folder: Path) -> str:
    classifier = model()
    layer = classifier.vit.layers[-2].tokens
    with PatchGrid(classifier) as grid, GradCAM(LogitsOnly(classifier), [layer], reshape_transform=grid) as cam:
        heat = torch.as_tensor(cam(pixels(2), None))
    assert heat.shape == (2, 32, 32) and heat.max() > 0 and torch.isfinite(heat).all()
    return "GradCAM with `ufgir.interpret.PatchGrid` after tokens were dropped"


if __name__ == "__main__":
    main(check)
