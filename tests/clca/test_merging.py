"""ATC, PiToMe, MCTF and ToFu, which merge tokens without training: recorded results, and rules that these do not
cover.

The files of tests/goldens_free hold results of functions of the official code (for ToFu, of code that other papers
compare with) for random tensors: `tokens` (B, N, D), `keys` (B, H, N, d) or `metric` (B, N, D), `received` (B, N) and
`sizes` (B, N) to `out.*`.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import nn

from clca import REDUCTIONS, CLCAViTConfig, token_schedule
from clca.attention_clca import AttentionContext
from clca.reduction_atc import cluster, cosine_distance
from clca.reduction_base import Merging, TokenState, descending_order, match_halves
from clca.reductions_clca import initial_state
from tests.helpers import images, tiny_config, tiny_model
from ufgir.profiling.macs import macs_in_advance


GOLDENS = Path(__file__).parents[1] / "goldens_free"
FILES = sorted(path.stem for path in GOLDENS.glob("*.safetensors"))
OPTIONS = ("linkage", "matching", "tau_sim", "tau_info", "tau_size", "bidirectional")

# All ways to choose what is merged, by name.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {}),
    "average": ("atc", {"linkage": "average"}),
    "single": ("atc", {"linkage": "single"}),
    "complete": ("atc", {"linkage": "complete"}),
    "protect": ("pitome", {"matching": "protect"}),
    "ordered": ("pitome", {"matching": "ordered"}),
    "mctf": ("mctf", {}),
    "one_way": ("mctf", {"bidirectional": False}),
    "drop": ("tofu", {"merge_from": 2}),
    "mlerp": ("tofu", {"merge_from": 0}),
}
LINKAGES = ["average", "single", "complete"]


def make_stage(method: str, layer: int = 1, **options: Any) -> Merging:
    """Return a stage without parameters, of a model with 5 layers."""
    config = tiny_config(reduction=method, reduction_layers=[layer], reduction_kwargs=options, keep_rate=0.5)
    return REDUCTIONS[method](config, 0, **options)


def make_context(
    keys: torch.Tensor, sizes: torch.Tensor | None = None, received: torch.Tensor | None = None
) -> tuple[AttentionContext, TokenState]:
    """Return the context and state for a stage, with `keys` (B, H, N, d), which are also the input of the layer,
    `sizes` (B, N) and `received` attention (B, N)."""
    state = initial_state(tiny_config(), (1, keys.shape[2] - 1), record_assignments=True)
    if sizes is not None:
        state = state.with_tracks(size=sizes)
    context = AttentionContext(nn.Identity(), keys[:, 0], keys, keys, None, state)
    context.layer_input = keys.mean(dim=1)
    context.received_attention = lambda: received
    return context, state


def random_tokens(batch: int, num_tokens: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_tokens, width, generator=generator, dtype=torch.float64)


class Reduced:
    """Result of a stage for tokens (B, N, D)."""

    def __init__(
        self,
        stage: Merging,
        tokens: torch.Tensor,
        removed: int,
        context: AttentionContext,
        state: TokenState,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(type(stage), "num_merged", staticmethod(lambda *_: removed))
        self.tokens, self.state = stage.before_mlp(tokens, state, context)
        self.assignment = self.state.report["assignment"]
        share, target = self.assignment.max(dim=1)  # each token goes to one
        self.target, self.share = target.masked_fill(share == 0, -1), share
        self.sizes = self.state.tracks.get("size", torch.ones_like(self.tokens[..., 0]))


@pytest.mark.parametrize("name", [*FILES, *(f"{name} without scipy" for name in FILES if name.startswith("atc"))])
def test_goldens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are equal; tokens, sizes, shares and assignment agree to 1e-12 in float64 and 2e-6 in float32."""
    name, _, without_scipy = name.partition(" ")
    if without_scipy:
        monkeypatch.setattr("clca.reduction_atc.scipy_functions", lambda: None)
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
        golden = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    method, tolerance = settings["method"], {"float64": 1e-12, "float32": 2e-6}[settings["dtype"]]
    tokens, keys = golden["tokens"], golden["keys" if "keys" in golden else "metric"]
    keys = keys if keys.dim() == 4 else keys.unsqueeze(1)
    hidden = (
        0 if settings["class_token"] else 1
    )  # token 0 is never merged: where the function knew none, there is one more
    tokens, keys = nn.functional.pad(tokens, (0, 0, hidden, 0)), nn.functional.pad(keys, (0, 0, hidden, 0))

    options = {name: settings[name] for name in OPTIONS if name in settings}
    if method == "mctf":
        options["pooling"] = {"attention*size": "attention", "size": "size"}[settings["pooling"]]
    if method == "tofu":
        options["merge_from"] = 2 if settings["mode"] == "prune" else 0
    stage = make_stage(method, **options)
    if method == "pitome":
        stage.margin = settings["margin"]
        metric = nn.functional.normalize(keys.mean(dim=1)[:, 1:], dim=-1)
        assert (stage.energy(metric @ metric.transpose(1, 2)) - golden["out.energy"]).abs().max() <= tolerance
    context, state = make_context(keys, golden.get("sizes"), golden.get("received"))

    got = Reduced(stage, tokens, settings["removed"], context, state, monkeypatch)
    target = torch.where(got.target[:, hidden:] < 0, -1, got.target[:, hidden:] - hidden)
    assert torch.equal(target, golden["out.target"])
    if settings.get("mode") in ("mean", "tofu"):
        return  # the matching is ToFu's, the mean is not
    for part, value in (
        ("tokens", got.tokens[:, hidden:]),
        ("sizes", got.sizes[:, hidden:]),
        ("share", got.share[:, hidden:]),
        ("assignment", got.assignment[:, hidden:, hidden:]),
    ):
        expected = golden.get(f"out.{part}")
        if expected is not None:
            assert value.dtype == expected.dtype
            assert ((value - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), part


# What holds for all.


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9])
@pytest.mark.parametrize("way", WAYS)
def test_every_number_that_can_be_removed(way: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For zero up to the maximum number of removed tokens: token 0 is not merged, no new token is empty, sizes are
    preserved, and images do not affect each other."""
    method, options = WAYS[way]
    stage = make_stage(method, **options)
    most = type(stage).max_merged(num_tokens)
    assert most == (num_tokens - 2 if method == "atc" else (num_tokens - 1) // 2)
    tokens, keys = random_tokens(3, num_tokens), random_tokens(6, num_tokens, seed=1).unflatten(0, (3, 2))
    keys[2] = keys[1]  # equal images
    sizes, received = (
        random_tokens(3, num_tokens, 1, seed=2).exp().squeeze(2),
        random_tokens(3, num_tokens, 1, seed=3).exp().squeeze(2),
    )
    tokens[2], sizes[2], received[2] = tokens[1], sizes[1], received[1]
    for removed in range(most + 1):
        got = Reduced(stage, tokens, removed, *make_context(keys, sizes, received), monkeypatch)
        alone = Reduced(stage, tokens[:1], removed, *make_context(keys[:1], sizes[:1], received[:1]), monkeypatch)
        assert got.tokens.shape == (3, num_tokens - removed, 4) and got.assignment.shape == (
            3,
            num_tokens - removed,
            num_tokens,
        )
        assert (got.assignment.sum(dim=2) - 1).abs().max() <= 1e-12
        assert torch.equal(got.assignment[:, 0], torch.eye(num_tokens, dtype=tokens.dtype)[:1].expand(3, -1))
        if removed == 0:
            assert torch.equal(got.tokens, tokens) and torch.equal(got.sizes, sizes)
            assert torch.equal(got.assignment, torch.eye(num_tokens, dtype=tokens.dtype).expand(3, -1, -1))
        if way == "drop":
            kept = got.assignment.argmax(dim=2)
            assert torch.equal(got.sizes, sizes.gather(1, kept))  # what is dropped is lost
            assert torch.equal(got.tokens, tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, 4)))
        else:
            assert (got.target >= 0).all()
            assert (got.sizes.sum(dim=1) - sizes.sum(dim=1)).abs().max() <= 1e-12
        if way not in ("drop", "mlerp"):
            assert (got.assignment @ tokens - got.tokens).abs().max() <= 1e-12
        assert torch.equal(got.tokens[1], got.tokens[2]) and torch.equal(got.tokens[:1], alone.tokens)


@pytest.mark.parametrize("way", WAYS)
def test_equal_tokens_merge_the_same_way_twice(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, options = WAYS[way]
    stage, keys = make_stage(method, **options), random_tokens(2, 12)
    keys[:, 4:8] = keys[:, 8:12] = keys[:, 3:4]
    results = [
        Reduced(stage, keys, 4, *make_context(keys.unsqueeze(1), received=torch.ones(2, 12)), monkeypatch)
        for _ in range(2)
    ]
    assert torch.equal(results[0].target, results[1].target) and torch.equal(results[0].tokens, results[1].tokens)


def test_equal_values_are_sorted_by_position() -> None:
    """There are more values than the sorting networks and insertion sorts handle, which are stable by chance."""
    values = torch.tensor([1.0, 3.0, 2.0] * 100).expand(2, -1)
    expected = [*range(1, 300, 3), *range(2, 300, 3), *range(0, 300, 3)]
    assert descending_order(values).tolist() == [expected] * 2
    scores = torch.zeros(1, 4, 3)
    assert match_halves(scores, 2).target.tolist() == [[0, 2, 2, 3, 2, 4, 1]]  # tokens 2 and 4 go to token 1


@pytest.mark.parametrize(
    ("method", "rate", "after"),
    [
        ("atc", 0.25, [50, 13, 4]),  # 49, 12, 3 clusters
        ("pitome", 0.7, [139, 98, 69]),  # 1 + ceil(0.7 * 196), of 138, of 97
        ("mctf", 0.7, [139, 98, 69]),
        ("tofu", 0.7, [138, 97, 68]),  # 137, 96, 67 patches
        ("pitome", 1.0, [197, 197, 197]),
    ],
)
def test_counts(method: str, rate: float, after: list[int]) -> None:
    """ViT-B/16 at 224 px. Rates of ATC and ToFu are shares of the patches, those of the others shares of the current
    tokens."""
    schedule = token_schedule(CLCAViTConfig(reduction=method, keep_rate=rate))
    assert [schedule.after[layer] for layer in (3, 6, 9)] == after


def test_costs_of_the_half_limit() -> None:
    """GMACs of ViT-B/16 at 224 px and keep rate 0.1: methods that merge pairs cannot remove more than half of the
    tokens."""
    costs = {
        method: macs_in_advance(CLCAViTConfig(reduction=method, keep_rate=0.1, num_labels=1000)) / 1e9
        for method in ("topk", "atc", "pitome", "mctf", "tome", "tofu")
    }
    expected = {"topk": 5.55, "atc": 5.51, "pitome": 8.72, "mctf": 8.76, "tome": 10.43, "tofu": 10.43}
    assert costs == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("method", "options"), [("pitome", {}), ("tofu", {"merge_from": 0})])
def test_sizes_that_attention_does_not_see_weigh_means(
    method: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are stored in a track with another name, and the merged tokens are the same."""
    tokens, keys, sizes = (
        random_tokens(2, 11),
        random_tokens(2, 11, seed=1).unsqueeze(1),
        random_tokens(2, 11, 1).exp()[..., 0],
    )
    results = []
    for proportional in (True, False):
        stage = make_stage(method, proportional=proportional, **options)
        context, state = make_context(keys)
        state = state.with_tracks(**{"size" if proportional else "silent_size": sizes})
        results.append(Reduced(stage, tokens, 4, context, state, monkeypatch))
    seen, silent = (result.state for result in results)
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert torch.equal(seen.tracks["size"], silent.tracks["silent_size"]) and len(silent.tracks) == 1
    mask = REDUCTIONS[method].attention_mask
    assert torch.equal(mask(seen), seen.tracks["size"].log()[:, None, None, :]) and mask(silent) is None


@pytest.mark.parametrize("method", ["pitome", "tofu"])
def test_attention_is_proportional_by_default(method: str) -> None:
    options = {"merge_from": 0} if method == "tofu" else {}
    logits = [
        tiny_model(reduction=method, keep_rate=0.5, reduction_kwargs=options | more)(images()).logits
        for more in ({}, {"proportional": True}, {"proportional": False})
    ]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


# ATC.


def merge_by_hand(distance: torch.Tensor, merged: int, method: str) -> list[int]:
    """Compute the first member of each token's cluster by definition, from the distances (n, n) of tokens."""
    clusters = [[token] for token in range(len(distance))]

    def between(one: list[int], other: list[int]) -> float:
        values = distance[one][:, other]
        return float({"average": values.mean(), "single": values.min(), "complete": values.max()}[method])

    for _ in range(merged):
        # Clusters are in the order of their first members, and `min` gives the first of several.
        one, other = min(combinations(clusters, 2), key=lambda pair: between(*pair))
        clusters.remove(other)
        one += other
    return [min(cluster) for token in range(len(distance)) for cluster in clusters if token in cluster]


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_of_equal_distances_the_first_pair_counts(method: str, seed: int) -> None:
    """Distances are small integers, most of them equal. Their averages are exact."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(1, 4, (3, 9, 9), generator=generator).double().triu(1)
    distance = upper + upper.transpose(1, 2)
    diagonal = torch.eye(9, dtype=torch.bool)
    for merged in range(9 - 1):
        if method == "average" and merged > 3:
            break  # means of three are not exact
        expected = [merge_by_hand(one, merged, method) for one in distance]
        got = cluster(distance.masked_fill(diagonal, torch.inf), merged, method)
        assert got.tolist() == expected


@pytest.mark.parametrize("method", LINKAGES)
def test_images_with_equal_tokens_do_not_go_to_scipy(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of the exact algorithm. For images without equal distances both algorithms agree."""
    stage = make_stage("atc", linkage=method)
    metric = torch.cat([random_tokens(2, 30), random_tokens(2, 30, seed=1).round()])  # the last two: points of a grid
    exact: list[int] = []
    monkeypatch.setattr(
        "clca.reduction_atc.cluster", lambda distance, *args: exact.append(len(distance)) or cluster(distance, *args)
    )
    for merged in (10, 20, 28):
        exact.clear()
        with_scipy = stage.match(metric, merged)
        assert exact == [1, 1]
        with monkeypatch.context() as without:
            without.setattr("clca.reduction_atc.scipy_functions", lambda: None)
            assert torch.equal(stage.match(metric, merged)[:2], with_scipy[:2])
            assert torch.equal(
                cluster(cosine_distance(normed(metric[2:, 1:])), merged, method), first_members(with_scipy[2:])
            )


def normed(tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(tokens, dim=-1)


def first_members(target: torch.Tensor) -> torch.Tensor:
    """Return the first member of the cluster of each token except token 0: (B, N) to (B, N - 1)."""
    return (target[:, 1:].unsqueeze(1) == target[:, 1:].unsqueeze(2)).long().argmax(dim=2)


@pytest.mark.parametrize("way", ["scipy", "torch"])
@pytest.mark.parametrize("method", LINKAGES)
def test_clusters_are_those_of_a_dendrogram(method: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters are numbered by their first members. Token 0 is its own cluster."""
    if way == "torch":
        monkeypatch.setattr("clca.reduction_atc.scipy_functions", lambda: None)
    metric = random_tokens(2, 41, 8)
    target = make_stage("atc", linkage=method).match(metric, 27)
    assert (target[:, 0] == 0).all() and (target[:, 1:] > 0).all()
    for image, got in zip(metric, target, strict=True):
        distance = 1 - normed(image[1:]) @ normed(image[1:]).T
        labels = fcluster(linkage(squareform(distance.numpy(), checks=False), method), 13, "maxclust")
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels), start=1)}
        assert got[1:].tolist() == [numbers[label] for label in labels]


def test_distances_are_symmetric_to_the_last_bit() -> None:
    """Otherwise the first minimum would not belong to the first pair. Matrix products need not be symmetric."""
    distance = cosine_distance(normed(random_tokens(2, 197, 64).float()))
    assert torch.equal(distance, distance.transpose(1, 2))


def test_no_numbers_are_clustered_in_some_way() -> None:
    """NaN in the keys does not raise an error: the loss becomes NaN, as with all methods."""
    metric = random_tokens(2, 9)
    metric[0, 3] = torch.inf
    target = make_stage("atc").match(metric, 4)
    assert (target.sort(dim=1).values.diff(dim=1) <= 1).all() and target.amax(dim=1).tolist() == [4, 4]


# PiToMe.


def test_both_matchings_merge_half_alike() -> None:
    metric = random_tokens(3, 13)
    protect, ordered = (make_stage("pitome", matching=way).match(metric, 6) for way in ("protect", "ordered"))
    assert torch.equal(protect, ordered)


def test_margin_and_matching_follow_the_layer() -> None:
    """They depend on the index of the layer, not of the stage: of five layers the first three match all tokens."""
    model = tiny_model(
        reduction="pitome", keep_rate=0.9, reduction_layers=[0, 2, 3, 4], reduction_kwargs={"margin": -2.0}
    )
    stages = [layer.reduction for layer in model.vit.layers if layer.reduction is not None]
    assert [stage.margin for stage in stages] == pytest.approx([-2.0, -1.2, -0.8, -0.4])
    assert [stage.protects for stage in stages] == [False, False, True, True]
    assert make_stage("pitome", layer=2).margin == pytest.approx(0.75 * 3 / 5)
    assert make_stage("pitome", layer=0, matching="protect").protects
    assert not make_stage("pitome", layer=4, matching="ordered").protects


def test_energy_is_a_mean_of_elus() -> None:
    stage = make_stage("pitome", margin=0.5)
    similarity = random_tokens(2, 7, 7)
    expected = nn.functional.elu(similarity - stage.margin).mean(dim=2)
    assert (stage.energy(similarity) - expected).abs().max() <= 1e-12


def test_isolated_tokens_are_protected() -> None:
    """Of three similar and two isolated tokens, the similar ones are merged."""
    metric = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-0.9, -1.0]]])
    target = make_stage("pitome", matching="protect", margin=0.9).match(metric, 1)
    assert len(set(target[0, 1:4].tolist())) == 2 and len(set(target[0].tolist())) == 5


# MCTF.


def test_without_other_criteria_it_is_tome(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"tau_info": 0.0, "tau_size": 0.0, "bidirectional": False, "pooling": "size"}
    tokens, keys, sizes = (
        random_tokens(3, 14),
        random_tokens(3, 14, seed=1),
        random_tokens(3, 14, 1, seed=2).exp()[..., 0],
    )
    context = make_context(keys.unsqueeze(1), sizes, torch.ones(3, 14).double())
    results = [
        Reduced(stage, tokens, 5, *context, monkeypatch)
        for stage in (make_stage("mctf", **options), make_stage("tome"))
    ]
    assert torch.equal(results[0].target, results[1].target)
    assert torch.equal(results[0].tokens, results[1].tokens) and torch.equal(results[0].sizes, results[1].sizes)


@pytest.mark.parametrize("tau_sim", [0.0, 1.0, 2.0, 0.1])
def test_extremes_of_every_criterion(tau_sim: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens without attention, opposite tokens, and very different sizes cause no division by zero and no root of a
    negative number."""
    keys = normed(random_tokens(2, 10).float())
    keys[:, 1::2] = -keys[:, ::2]
    received, sizes = torch.zeros(2, 10), torch.ones(2, 10)
    received[1, :3], sizes[:, 4] = 1e30, 1e6
    stage = make_stage("mctf", tau_sim=tau_sim, tau_info=1.0, tau_size=0.1)
    got = Reduced(stage, keys, 4, *make_context(keys.unsqueeze(1), sizes, received), monkeypatch)
    assert got.tokens.isfinite().all()
    assert (got.assignment.sum(dim=2) - 1).abs().max() <= 1e-6


def test_equal_scores_go_to_the_first_in_both_directions() -> None:
    """Of tokens 0 to 6, first token 2 of the sources 2, 4 and 6 is merged into token 1; then tokens 1 and 3 are merged
    into token 4, together with token 2."""
    assert make_stage("mctf").match_by(torch.ones(1, 4, 3), 3).tolist() == [[0, 1, 1, 1, 1, 3, 2]]


def test_similarity_is_that_of_what_enters_the_layer() -> None:
    """It is computed before the norm, in each stage."""
    model = tiny_model(reduction="mctf", keep_rate=0.5, num_register_tokens=1)
    entered, compared = [], []
    for layer in model.vit.layers[1:3]:
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        scores = layer.reduction.scores
        layer.reduction.scores = lambda tokens, *args, scores=scores: compared.append(tokens) or scores(tokens, *args)
    model(images())
    assert len(entered) == 2 and all(torch.equal(a, b) for a, b in zip(entered, compared, strict=True))


# ToFu.


def test_matching_is_tomes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_tokens(3, 15).unsqueeze(1)
    tome, mlerp, drop = (
        Reduced(make_stage(*way), keys[:, 0], 6, *make_context(keys), monkeypatch).target
        if isinstance(way, tuple)
        else Reduced(make_stage("tofu", merge_from=way), keys[:, 0], 6, *make_context(keys), monkeypatch).target
        for way in (("tome",), 0, 2)
    )
    assert torch.equal(mlerp, tome)
    assert torch.equal(drop.where(drop >= 0, tome), tome) and (drop < 0).sum(dim=1).tolist() == [6, 6, 6]


def test_merged_tokens_are_as_long_as_their_longest_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the direction of the mean. Unmerged tokens do not change, and a mean of zero stays zero."""
    tokens, keys = random_tokens(2, 12), random_tokens(2, 12, seed=1)
    tokens[1, 4], keys[1, 4], keys[1, 7] = -tokens[1, 7], 100, 100  # these merge, and cancel out
    tokens.requires_grad_()
    got = Reduced(make_stage("tofu", merge_from=0), tokens, 4, *make_context(keys.unsqueeze(1)), monkeypatch)
    members, means = got.assignment > 0, got.assignment @ tokens
    longest = (members * tokens.norm(dim=2).unsqueeze(1)).amax(dim=2)
    zero = means.norm(dim=2) < 1e-12
    assert zero.sum() == 1 and torch.equal(got.tokens[zero], torch.zeros(1, 4, dtype=tokens.dtype))
    assert (got.tokens.norm(dim=2) - longest)[~zero].abs().max() <= 1e-12
    assert (normed(means) - normed(got.tokens))[~zero].abs().max() <= 1e-12
    alone = members.sum(dim=2) == 1
    assert alone.sum() >= 2 * 4 and torch.equal(got.tokens[alone], means[alone])
    got.tokens.square().sum().backward()
    assert tokens.grad.isfinite().all()


def test_gradients_of_merged_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They flow through the mean, its norm, and the norm of the longest member."""
    keys, stage = random_tokens(2, 8, seed=1).unsqueeze(1), make_stage("tofu", merge_from=0)
    tokens = random_tokens(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda tokens: Reduced(stage, tokens, 3, *make_context(keys), monkeypatch).tokens, (tokens,)
    )


def test_late_layers_merge() -> None:
    """Merging starts in the second layer of the second half."""
    for depth, drops in ((12, [True, True, False]), (18, [True] * 3)):
        config = CLCAViTConfig(num_hidden_layers=depth, reduction="tofu", reduction_layers=[3, 6, 9])
        assert [REDUCTIONS["tofu"](config, stage).merges_early for stage in range(3)] == drops
    config = CLCAViTConfig(reduction="tofu", reduction_layers=[6, 7])
    assert [REDUCTIONS["tofu"](config, stage).merges_early for stage in (0, 1)] == [True, False]
