"""Memory, shapes and synchronization: which tensors are never computed, and that no operator waits for the device."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clca import (
    token_schedule,
)
from tests.clca.speed import CACHE, every_method, make
from tests.helpers import images


# Memory, shapes and the host.


class Watch(TorchDispatchMode):
    """Record every tensor that an operator creates: size of its storage, number of large tensors alive at the same
    time, device, and operators that wait for the device or have data-dependent shapes."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self, large: int = 0) -> None:
        super().__init__()
        self.large, self.most, self.peak = large, 0, 0
        self.living: dict[int, weakref.ref] = {}
        self.devices: set[str] = set()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or by_mask:
            self.waiting.append(name)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.devices.add(tensor.device.type)
                size = tensor.untyped_storage().nbytes()
                self.most = max(self.most, size)
                if size >= self.large:
                    self.living[id(tensor)] = weakref.ref(tensor)
        alive = [t for t in (ref() for ref in self.living.values()) if t is not None]
        self.peak = max(self.peak, len({t.untyped_storage().data_ptr() for t in alive}))
        return result


LARGE = {"image_size": 144, "reduction_layers": [1, 2], "num_hidden_layers": 4}  # 324 patches


@pytest.mark.parametrize("cache", [{}, CACHE | {"head": "cla"}], ids=["plain", "clca"])
@every_method
def test_no_attention_map_is_made(method: str | None, cache: dict[str, Any]) -> None:
    """The largest tensor in evaluation is smaller than an attention map (B, H, N, N). (With sdpa; k-medoids computes
    the attention in chunks of queries.)"""
    model = make(method, **LARGE | cache)
    num_tokens = token_schedule(model.config).before[0]
    with torch.no_grad(), Watch() as watch:
        model(images(2, 144, 144))
    assert 0 < watch.most < 2 * 2 * num_tokens * num_tokens * 8
    with torch.no_grad(), Watch() as watch:
        model(images(2, 144, 144), output_attentions=True)
    assert watch.most >= 2 * 2 * num_tokens * num_tokens * 8  # which the watch would see


@pytest.mark.parametrize("method", ["dpcknn", "kmedoids"])
def test_clustering_keeps_one_distance_matrix(method: str) -> None:
    """No second tensor of this size exists at the same time."""
    model = make(method, **LARGE, reduction_kwargs={"equal_weight": True})
    stage = model.vit.layers[1].reduction
    tokens = torch.randn(2, 600, 16, dtype=torch.float64)
    arguments = (tokens, 300) if method == "dpcknn" else (tokens, 300, None)
    with Watch(large=2 * 600 * 600 * 8) as watch:
        stage.label(*arguments)
    assert watch.peak == 1
    with Watch(large=2 * 300 * 600 * 8) as watch:  # and nothing of half of it but a piece at a time
        stage.label(*arguments)
    assert watch.peak <= 2


def test_sinkhorn_keeps_one_plan() -> None:
    """At most two plans exist at the same time: the current and the next."""
    stage = make("sinkhorn").vit.layers[1].reduction
    similarity = torch.randn(2, 400, 200, dtype=torch.float64)
    with torch.no_grad(), Watch(large=2 * 400 * 200 * 8) as watch:
        plan = stage.transport(similarity)
    assert watch.peak == 2
    assert torch.allclose(plan, stage.transport(similarity.clone().requires_grad_()))


@pytest.mark.parametrize("keep_rate", [None, 0.25])
@every_method
def test_the_host_waits_for_nothing(method: str | None, keep_rate: float | None) -> None:
    """No operator copies a value to the host, has a data-dependent shape, or creates a tensor on the host. At another
    keep rate than the model's own, this holds from the second forward pass on."""
    options = {"reduction_kwargs": {"pad_to_bound": True}} if method == "ats" else {}
    model = make(method, **CACHE | {"head": "cla"} | options).to("meta")
    if keep_rate is not None and (method is None or model.vit.method.fixed_rate(model.config)):
        pytest.skip("its keep rate is fixed")
    pixels = images().to("meta")
    with torch.no_grad():
        if keep_rate is not None:
            model(pixels, keep_rate=keep_rate)
        with Watch() as watch:
            output = model(pixels, keep_rate=keep_rate)
    assert not watch.waiting
    assert watch.devices == {"meta"}
    assert output.token_counts == tuple(token_schedule(model.config, keep_rate=keep_rate).before)


def test_ats_waits_once_a_stage() -> None:
    """It waits for the length of the longest image, unless it pads to the bound."""
    model = make("ats", **CACHE)
    with torch.no_grad(), Watch() as watch:
        model(images())
    assert watch.waiting == ["_local_scalar_dense"] * 2


def test_padding_to_the_bound_changes_nothing_but_shapes() -> None:
    model, padded = (make("ats", **CACHE, reduction_kwargs={"pad_to_bound": bound}) for bound in (False, True))
    padded.load_state_dict(model.state_dict())
    with torch.no_grad():
        output = padded(images())
        assert (output.logits - model(images()).logits).abs().max() <= 1e-10
    assert output.token_counts == tuple(token_schedule(model.config).before)
