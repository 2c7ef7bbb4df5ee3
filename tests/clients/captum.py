"""captum: integrated gradients of the pixels and of the tokens that leave a layer."""

from pathlib import Path

import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerIntegratedGradients

from tests.clients.common import logits_of, main, model, pixels
from ufgir.interpret import LogitsOnly


def check(folder: Path) -> str:
    classifier = model(keep_rate=1.0)  # which tokens are kept is not differentiable
    logits, values = LogitsOnly(classifier), pixels(2)
    base = torch.zeros_like(values)
    wanted = (logits_of(classifier, values) - logits_of(classifier, base))[:, 1]
    found = IntegratedGradients(logits).attribute(values, base, target=1, n_steps=256, internal_batch_size=64)
    gap = float((found.flatten(1).sum(1) - wanted).abs().max())
    assert found.shape == values.shape and gap <= 0.02, f"attributions add up to {gap:.1e} off the logit"
    layer = classifier.vit.layers[1].tokens
    activation = LayerActivation(logits, layer).attribute(values)
    attribution = LayerIntegratedGradients(logits, layer).attribute(values, base, target=1, n_steps=8)
    assert attribution.shape == activation.shape and attribution.abs().sum() > 0
    return f"pixels: attributions add up to the logit within {gap:.0e}; layers: `vit.layers[i].tokens`"


if __name__ == "__main__":
    main(check)
