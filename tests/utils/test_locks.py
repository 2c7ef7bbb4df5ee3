"""Two processes never write the same target at once: the second one gets an error, and a killed one blocks nobody."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.helpers import images, tiny_model
from ufgir.analysis.dataset_pass import analyze
from ufgir.evaluation.prediction import predict_to_file
from ufgir.utils import locks as locking
from ufgir.utils.locks import exclusive_lock


HOLD = """
import sys
from pathlib import Path
from ufgir.utils.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "PATIENCE", 0.1)


def hold(target: Path) -> subprocess.Popen:
    """Start another process that holds the lock."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    return other


@pytest.mark.parametrize("killed", [False, True])
def test_one_at_a_time(tmp_path: Path, killed: bool) -> None:
    target = tmp_path / "new" / "thing.csv"
    other = hold(target)
    with pytest.raises(ValueError, match="wait for it"), exclusive_lock(target, "wait for it"):
        pass
    with exclusive_lock(target.with_name("another.csv"), ""):
        pass
    if killed:
        other.send_signal(signal.SIGKILL)
    other.communicate("")
    with exclusive_lock(target, "wait for it"):
        assert list(target.parent.iterdir()) == [target.with_name(".thing.csv.lock")]
    assert list(target.parent.iterdir()) == []


def test_what_a_block_raises_comes_out(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive_lock(tmp_path / "thing", ""):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


class Pictures(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": super().__getitem__(index)[0]}


@pytest.mark.parametrize("kind", ["predictions", "analysis"])
def test_results_of_two_do_not_mix(kind: str, tmp_path: Path) -> None:
    """The second process does not touch the results of the first, and can use the target later."""
    model, data = tiny_model(reduction="evit", keep_rate=0.5).float(), Pictures(images(6).float())
    partial = tmp_path / ("_out.csv.partial" if kind == "predictions" else "_out.partial")

    def write() -> int:
        if kind == "predictions":
            return predict_to_file(model, data, tmp_path / "out.csv", ["a", "b", "c"], batch_size=2).images
        return analyze(model, data, tmp_path / "out", batch_size=2).images

    other = hold(tmp_path / ("out.csv" if kind == "predictions" else "out"))
    partial.mkdir()
    (partial / "work").write_text("the first one's")
    with pytest.raises(ValueError, match=r"out.* by another process"):
        write()
    assert (partial / "work").read_text() == "the first one's"
    other.communicate("")
    assert write() == 6
    assert not partial.exists()
