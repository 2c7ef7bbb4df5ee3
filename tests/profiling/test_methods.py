"""Facts about methods, from their classes, and the page that helps to choose one."""

import re
from pathlib import Path

import pytest

from clca import REDUCTIONS
from clca.reduction_base import AttentionPruning, LearnedSlots
from tests.helpers import tiny_config
from ufgir.profiling.methods import HEAD, collect_facts, facts_table, place_of, share_of


PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"


@pytest.fixture(scope="module")
def facts():
    config = tiny_config(num_hidden_layers=4, reduction_layers=[1, 2], image_size=64, patch_size=8)
    return {name: collect_facts(config, name, 0.25) for name in sorted(REDUCTIONS)}


def test_known_methods(facts):
    assert facts["topk"].does == "drops"
    assert facts["evit"].does == "drops, fuses the rest"
    assert facts["tome"].does == facts["dpcknn"].does == "merges"
    assert facts["sit"].does == "mixes all"
    assert facts["heuristic"].does == "hides"
    assert [facts[name].place for name in ("ats", "topk", "kmedoids")] == [
        "in attention", "before the MLP", "before the layer",
    ]  # fmt: skip
    assert facts["dpcknn"].training == "no with equal_weight=True" and facts["dpcknn"].parameters > 0
    assert facts["ats"].same_for_all == "yes with pad_to_bound=True"
    assert facts["evit"].share == "the current tokens" and facts["dyvit"].share == "the image's patches"


def test_they_follow_from_the_classes(facts):
    for name, cls in REDUCTIONS.items():
        assert facts[name].rate_later == (not issubclass(cls, LearnedSlots))
        assert (facts[name].training == "no") == (facts[name].parameters == 0)
        assert facts[name].macs <= facts[name].dense_macs
        if issubclass(cls, AttentionPruning):
            assert place_of(cls) == "before the MLP"


@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_the_share_does_not_depend_on_the_network(method):
    small = tiny_config(reduction=method, keep_rate=0.75)
    large = tiny_config(reduction=method, keep_rate=0.75, image_size=128)
    assert share_of(small) == share_of(large)


def test_the_page_has_what_the_code_says(facts):
    """Facts that do not depend on the network are compared with the page; GMACs come from the command in the page."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- table: methods -->\n(.*?)<!-- end: methods -->", text, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    ours = facts_table(list(facts.values()))
    command = "ufgir profile --methods all --keep-rate 0.25 --into docs/choosing.md"
    assert rows[0] == HEAD, f"run `{command}`"
    same = [i for i, name in enumerate(HEAD) if name not in ("parameters", "in the end", "GMACs", "of dense")]
    written = {row[0]: [row[i] for i in same] for row in rows[2:]}
    for row in ours[1:]:
        assert written.get(row[0]) == [row[i] for i in same], f"run `{command}`"
    assert command in text
