"""Keep rates for a given cost, and the methods that need no training."""

import pytest

from clca import REDUCTIONS, CLCAViTConfig, TokenReduction, register_reduction, token_schedule
from tests.helpers import FIRST_OF_FAMILIES, slow_unless, tiny_config
from ufgir.cli import entry as cli
from ufgir.profiling import count_macs, keep_rate_for
from ufgir.profiling.macs import dense_config, on_meta
from ufgir.profiling.targets import (
    GIGA,
    STEPS,
    at_rate,
    bounded,
    check_target,
    options_with,
    own_parameters,
    spend,
    static_options,
    training_free_options,
)


HIDES = {name for name in REDUCTIONS if name == "heuristic"}


def network(method, layers, **changes):
    """Return a network with enough patches for a fine choice of rates."""
    more = {"num_hidden_layers": 4, "image_size": 64, "patch_size": 4, "reduction_layers": layers, "reduction": method}
    return tiny_config(**more | changes)


def cost(config, rate):
    return count_macs(on_meta(bounded(at_rate(config, rate))))


def first_above(config, rate):
    """Return the smallest rate with other counts."""
    counts = token_schedule(at_rate(config, rate))
    low, high = round(rate * STEPS), STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if token_schedule(at_rate(config, middle / STEPS)) == counts else (low, middle)
    return high / STEPS


LAYERS = ([1, 2], "all")
# The search asks each method for its counts; where its stages are makes them more or fewer, whatever the method.
EACH_ONCE = [(m, LAYERS[i % 2]) for i, m in enumerate(sorted(REDUCTIONS)) if m in FIRST_OF_FAMILIES]


@pytest.mark.parametrize(
    "case",
    slow_unless(EACH_ONCE.__contains__, [(m, layers) for m in sorted(REDUCTIONS) for layers in LAYERS]),
    ids=str,
)
def test_the_largest_rate_within_the_target(case):
    method, layers = case
    config = network(method, layers)
    if method in HIDES:
        with pytest.raises(ValueError, match="always"):
            keep_rate_for(config, 0.5 * cost(config, 1.0) / GIGA)
        return
    least, most = cost(config, 1 / STEPS), cost(config, 1.0)
    target = least + 0.6 * (most - least)
    rate = keep_rate_for(config, target / GIGA)
    assert cost(config, rate) <= target < cost(config, first_above(config, rate))
    assert cost(config, rate) > target - 0.1 * (most - least)  # counts are whole numbers, of few tokens here
    assert round(rate, 6) == rate


def test_the_paper_counts_so():
    """The cost of a rate leads back to this rate: EViT at 0.25, ViT-B/16 at 224 px."""
    config = CLCAViTConfig(reduction="evit", keep_rate=0.25, num_labels=1110)
    macs = count_macs(on_meta(config))
    assert keep_rate_for(config, macs / GIGA) == 0.25
    assert keep_rate_for(config, macs / GIGA - 1e-6) < 0.25


@pytest.mark.parametrize("share", [0.01, 1.01])
def test_targets_out_of_reach_are_refused(share):
    """The message contains the target, the smallest cost, and the dense network's."""
    config = network("evit", [1, 2])
    target = share * cost(config, 1.0) / GIGA
    dense = count_macs(on_meta(dense_config(config))) / GIGA
    with pytest.raises(ValueError, match="`target_gmacs`") as caught:
        keep_rate_for(config, target)
    message = str(caught.value)
    assert f"{target:g}" in message and f"{dense:.3f} without" in message and "evit" in message
    assert f"from {cost(config, 1 / STEPS) / GIGA:.3f} to" in message


def test_the_dense_cost_is_keep_rate_one():
    config = network("topk", [1, 2])
    assert keep_rate_for(config, cost(config, 1.0) / GIGA) == 1.0


def test_cache_and_head_are_counted():
    """They have a cost, so fewer tokens are kept."""
    plain = network("evit", [1, 2])
    clca = network("evit", [1, 2], cross_layer_cache=True, num_clr_tokens=1, head="cla")
    target = 0.8 * cost(plain, 1.0) / GIGA
    assert keep_rate_for(clca, target) < keep_rate_for(plain, target)


def test_what_the_configuration_keeps_is_not_read():
    config = network("evit", [1, 2])
    target = 0.8 * cost(config, 1.0) / GIGA
    assert keep_rate_for(at_rate(config, 0.1), target) == keep_rate_for(config, target)
    counted = network("evit", [1, 2], keep_tokens=[100, 50])
    assert keep_rate_for(counted, target) == keep_rate_for(config, target)
    spend(counted, target)
    assert counted.keep_tokens is None and counted.keep_rate == [keep_rate_for(config, target)]


def test_no_reduction_has_no_rate():
    with pytest.raises(ValueError, match=r"`target_gmacs` 1 .*`reduction`"):
        keep_rate_for(tiny_config(), 1.0)


def test_targets_of_another_rate_go():
    """DynamicViT's own targets belong to the rates that they were set with."""
    options = {"ratio_targets": [0.5, 0.25], "ratio_weight": 1.0}
    config = network("dyvit", [1, 2], reduction_kwargs=options)
    target = 0.8 * cost(config, 1.0) / GIGA
    spend(config, target)
    assert config.reduction_kwargs == {"ratio_weight": 1.0}
    config.reduction_kwargs = options
    spend(config, target, keep_options=True)
    assert config.reduction_kwargs == options


@pytest.mark.parametrize("name", ["keep_rate", "keep_tokens"])
def test_a_target_beside_a_rate_is_refused(name):
    with pytest.raises(ValueError, match=f"--it .*`{name}`"):
        check_target({name: [1]}, 1.0, "--it")
    check_target({name: [1]}, None, "--it")
    check_target({name: None}, 1.0, "--it")


class TestTrainingFree:
    @pytest.mark.parametrize("method", sorted(REDUCTIONS))
    def test_it_means_no_parameters(self, method):
        config = network(method, [1, 2])
        options = training_free_options(config)
        parameters = own_parameters(config)
        assert (options == {}) == (parameters == 0)
        if options:
            assert own_parameters(network(method, [1, 2], reduction_kwargs=options)) == 0

    def test_which(self):
        """The expected methods at the time of writing; new methods need no line here."""
        free = {name for name in REDUCTIONS if training_free_options(network(name, [1, 2])) == {}}
        assert {"evit", "topk", "ats", "tome", "kmedoids"} <= free
        assert training_free_options(network("dpcknn", [1, 2])) == {"equal_weight": True}
        for name in ("dyvit", "patchmerger", "sinkhorn", "sit"):
            assert training_free_options(network(name, [1, 2])) is None

    def test_of_a_method_from_outside(self):
        """The class is queried, and its boolean options are tried."""

        class Own(TokenReduction):
            name = "own"
            static_shapes = False

            def __init__(self, config, stage, *, pad: bool = False):
                super().__init__(config, stage)

        try:
            register_reduction(Own)
            config = network("own", [1, 2])
            assert training_free_options(config) == {} and static_options(config) is None
            with pytest.raises(ValueError, match="differ by image"):
                keep_rate_for(config, 1.0)
            assert options_with(config, lambda other: bool(other.reduction_kwargs)) == {"pad": True}
        finally:
            del REDUCTIONS["own"]

    def test_ats_is_bounded_by_its_option(self):
        assert static_options(network("ats", [1, 2])) == {"pad_to_bound": True}
        assert static_options(network("evit", [1, 2])) == {}


class TestProfile:
    OPTIONS = ("--image-size", "32", "--patch-size", "4", "--hidden-size", "16", "--num-hidden-layers", "4")
    OPTIONS += ("--num-attention-heads", "2", "--num-labels", "3", "--reduction-layers", "1", "2")

    def test_a_rate_by_cost(self, capsys):
        assert cli.main(["profile", *self.OPTIONS, "--reduction", "evit", "--target_gmacs", "0.0009"]) == 0
        out = capsys.readouterr().out
        rate = keep_rate_for(
            CLCAViTConfig(
                image_size=32, patch_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_labels=3,
                intermediate_size=64, reduction="evit", reduction_layers=[1, 2],
            ), 0.0009,
        )  # fmt: skip
        assert f"keep rate {rate}" in out and rate < 1

    def test_all_methods_in_one_table(self, capsys, tmp_path):
        document = tmp_path / "page.md"
        document.write_text("<!-- table: methods -->\n<!-- end: methods -->\n")
        argv = ["profile", *self.OPTIONS, "--methods", "all", "--keep-rate", "0.25", "--into", str(document)]
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines if line} >= set(REDUCTIONS)
        assert [f"| {name} |" in document.read_text() for name in REDUCTIONS] == [True] * len(REDUCTIONS)

    def test_in_every_layer_and_left_out(self, capsys):
        argv = ["profile", *self.OPTIONS[:-3], "--reduction-layers", "all", "--target-gmacs", "0.0009"]
        assert cli.main([*argv, "--methods", "topk", "heuristic"]) == 0
        out = capsys.readouterr().out
        assert "layers 0, 1, 2, 3" in out and "`target_gmacs` 0.0009" in out

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            ("--reduction evit --keep-rate 0.5 --target-gmacs 1", "`keep_rate`"),
            ("--target-gmacs 1", "`reduction`"),
            ("--methods all --layers", "`--layers` cannot be combined"),
            ("--methods all --reduction evit", "`--reduction` cannot be combined"),
            ("--methods all --keep-rate 0.5 0.25", "must be one number"),
            ("--methods evti", "Unknown `reduction`"),
            ("--paper --target-gmacs 1", "`--paper`"),
        ],
    )
    def test_contradictions(self, capsys, argv, words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["profile", *argv.split()])
        assert stop.value.code == 2 and words in capsys.readouterr().err
