"""Train with parts of the CLA head, for the ablation in docs/study.md.

    python docs/study_heads.py recipes/study_pretrained.yaml --set keep_rate=0.1 --set seed=1 --output outputs/study_heads
    ufgir results outputs/study_heads

It is `ufgir sweep` with three more heads and these variants:

| variant | head | cache |
| --- | --- | --- |
| `linear_bn` | BatchNorm, then the linear layer of the linear head | none |
| `cla_last` | the CLA head on CLS of the last layer only | none |
| `cla_conv` | the CLA head without its two BatchNorms | none |
| `clc_linear_bn` | as `linear_bn` | GAP and one CLR |
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import run_ufgir
from clca import CLCAViTConfig
from clca.heads_clca import HEADS, CLAHead, Head, LayerConvolution
from ufgir.runs.queue import RunQueue, make_slots
from ufgir.runs.sweep import Grid


class NormedLinear(nn.Module):
    """BatchNorm and a linear layer, (B, D) to (B, K)."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(features))


class NormedLinearHead(Head):
    """The linear head with a BatchNorm before it."""

    @classmethod
    def build(cls, config: CLCAViTConfig) -> nn.Module:
        return NormedLinear(config.hidden_size, config.num_labels)


class LastLayerHead(CLAHead):
    """The CLA head on CLS of the last layer: its depth-wise convolution has a kernel of size 1."""

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__(config, num_labels)
        width, inner = self.aggregate.in_channels, self.aggregate.out_channels
        self.aggregate = LayerConvolution(width, inner, kernel_size=1, groups=width)

    def forward(self, cls_tokens: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        """CLS tokens (B, layers, D) to logits (B, K)."""
        return super().forward(cls_tokens[:, -1:], rate)


class ConvolutionHead(CLAHead):
    """The CLA head without its two BatchNorms."""

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__(config, num_labels)
        self.norm_in, self.norm_out = nn.Identity(), nn.Identity()


ABLATIONS = {"linear_bn": NormedLinearHead, "cla_last": LastLayerHead, "cla_conv": ConvolutionHead}
NO_CACHE, CACHE = "cross_layer_cache=false,num_clr_tokens=0", "cross_layer_cache=true,num_clr_tokens=1"
VARIANTS = {name: f"{NO_CACHE},head={name}" for name in ABLATIONS} | {"clc_linear_bn": f"{CACHE},head=linear_bn"}
RUN = "run"  # first argument of the processes that the sweep starts


def main(argv: Sequence[str]) -> int:
    """Run the grid; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE,VALUE", help="as in `ufgir sweep`")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="variants to train [all]")
    parser.add_argument("--output", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent processes [%(default)s]")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, level=logging.INFO)
    try:
        script = [sys.executable, str(Path(__file__).resolve()), RUN]
        variants = [f"{name}:{VARIANTS[name]}" for name in args.variant]
        queue = RunQueue(Grid(args.recipe, args.set, variants), args.output, script)
        queue.work(make_slots([], args.jobs))
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{queue.summary()}\n")
    return 1 if queue.failed else 0


if __name__ == "__main__":
    HEADS |= ABLATIONS
    if sys.argv[1:2] == [RUN]:
        run_ufgir.main(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
