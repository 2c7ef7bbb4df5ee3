"""run_ufgir.py with the cost of an image instead of a keep rate."""

import json

import pytest

from clca import CLCAViTConfig
from tests.script.helpers import mistake, recipe, run
from ufgir.profiling import keep_rate_for


QUICK = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
TARGET = 0.00012  # GMACs


def test_the_keep_rate_follows_and_is_recorded(leaves, tmp_path):
    """It depends on the number of classes in the data, and is recorded as an option of the run."""
    out = tmp_path / "out"
    changes = {"keep_rate": None, "reduction_layers": "all", "target_gmacs": TARGET, "max_steps": 1}
    run(recipe(tmp_path, leaves, out, **QUICK, **changes))
    config = CLCAViTConfig.from_pretrained(out)
    assert config.num_labels == 3 and config.reduction_layers == [0, 1, 2]
    assert config.keep_rate == [keep_rate_for(config, TARGET)] and config.keep_rate[0] < 1
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["target_gmacs"] == TARGET and record["config"]["keep_rate"] == config.keep_rate
    assert record["macs"] <= TARGET * 1e9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_rate": 0.5}, "`keep_rate`"),
        ({"keep_rate": None, "keep_tokens": 3}, "`keep_tokens`"),
        ({"keep_rate": None, "reduction": "none"}, "`reduction`"),
        ({"keep_rate": None, "target_gmacs": 5}, "`target_gmacs` 5 "),
    ],
    ids=str,
)
def test_contradictions(leaves, tmp_path, capsys, changes, words):
    path = recipe(tmp_path, leaves, tmp_path / "out", **QUICK, **{"target_gmacs": TARGET} | changes)
    assert words in mistake(capsys, path)
    assert not (tmp_path / "out").exists()
