"""Interleaved timing, and the memory of tensors, which `ufgir benchmark` relies on."""

import gc
import weakref

import pytest
import torch
from torch import nn

from ufgir.profiling import backends, timing
from ufgir.profiling.timing import (
    InterleavedTiming,
    OtherLoad,
    Quartiles,
    TensorMemory,
    peak_memory_increase,
    quartiles,
    steady,
)


CPU = torch.device("cpu")


class TestTiming:
    def test_quartiles(self):
        assert quartiles([5.0]) == Quartiles(5.0, 5.0, 5.0)
        assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(3.0, 2.0, 4.0)
        assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]).spread == pytest.approx(2 / 3)

    def test_every_round_times_each_once_in_changing_order(self):
        calls = []
        timed = InterleavedTiming({name: lambda name=name: calls.append(name) for name in "abcd"}, CPU)
        timed.run(20)
        rounds = ["".join(calls[i : i + 4]) for i in range(0, 80, 4)]
        assert all(sorted(r) == list("abcd") for r in rounds)
        assert len(set(rounds)) > 5
        assert all(len(seconds) == 20 for seconds in timed.seconds.values())
        again = []
        InterleavedTiming({name: lambda name=name: again.append(name) for name in "abcd"}, CPU).run(20)
        assert again == calls  # the order is that of the seed

    def test_pause(self, monkeypatch):
        """Between runtimes, quick functions are called once more without being timed."""
        slept, called = [], []
        monkeypatch.setattr(timing.time, "sleep", slept.append)
        runs = {name: lambda name=name: called.append(name) for name in "ab"}
        timed = InterleavedTiming(runs, CPU, pause=True)
        timed.quick.add("a")
        timed.run(3)
        assert slept == [timing.PAUSE] * 6
        assert (called.count("a"), called.count("b")) == (6, 3)
        assert {name: len(seconds) for name, seconds in timed.seconds.items()} == {"a": 3, "b": 3}

    def test_what_fails_leaves_and_the_others_go_on(self):
        timed = InterleavedTiming({"bad": lambda: 1 / 0, "good": lambda: None}, CPU)
        timed.warm_up()
        timed.run(2)
        assert isinstance(timed.failures["bad"], ZeroDivisionError) and timed.seconds["bad"] == []
        assert len(timed.seconds["good"]) == 2

    def test_what_fails_leaves_no_tensors_behind(self):
        """On a GPU, the other functions would lack the memory."""
        alive = []

        def bad():
            large = torch.zeros(1000)
            alive.append(weakref.ref(large))
            raise RuntimeError("out of memory")

        timed = InterleavedTiming({"bad": bad, "good": lambda: None}, CPU)
        timed.warm_up(after=lambda: None)
        assert len(alive) == 1 and alive[0]() is None
        assert str(timed.failures["bad"]) == "out of memory"

    def test_a_gpu_finishes_a_call_before_the_next(self, monkeypatch):
        order = []
        monkeypatch.setattr(timing, "synchronize", lambda device: order.append("wait"))
        timing.time_call(lambda: order.append("call"), torch.device("cuda"), calls=2)
        assert order == ["wait", "call", "wait", "call", "wait"]

    def test_quick_calls_are_repeated_within_one_timing(self, monkeypatch):
        monkeypatch.setattr(timing, "time_call", lambda run, device, calls: run() / calls)
        timed = InterleavedTiming({"short": lambda: 0.003, "long": lambda: 1.0}, CPU)
        timed.warm_up()
        assert timed.calls == {"short": 7, "long": 1}  # 20 ms are enough

    def test_without_warm_up(self):
        """Nothing is known about the speed, so that each timing is one call."""
        timed = InterleavedTiming({"a": lambda: None}, CPU)
        timed.warm_up(rounds=0)
        assert timed.calls == {"a": 1}

    def test_interrupted_rounds_are_kept(self):
        calls = []

        def run():
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        timed = InterleavedTiming({"a": run}, CPU)
        with pytest.raises(KeyboardInterrupt):
            timed.run(5)
        assert len(timed.seconds["a"]) == 2

    def test_steady(self):
        threads = torch.get_num_threads()
        with pytest.raises(RuntimeError, match="inside"), steady(1) as used:
            assert used == torch.get_num_threads() == 1 and not gc.isenabled()
            raise RuntimeError("inside")
        assert torch.get_num_threads() == threads and gc.isenabled()

    def test_load_of_others_leaves_out_this_process(self, monkeypatch):
        moments = iter([(100.0, 10.0), (130.0, 20.0)])
        monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: next(moments)))
        assert OtherLoad().cores(10.0) == pytest.approx(2.0)
        monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: None))
        assert OtherLoad().cores(10.0) is None


class TestMemory:
    def test_peak_of_living_tensors(self):
        given = torch.zeros(1000)
        with TensorMemory() as memory:
            first = given + 1  # 4000 bytes
            view = first[:10].reshape(2, 5)  # no storage of its own
            first.mul_(2)
            second = first * 2
            assert memory.now == 8000
            del first, view, second
            third = given.double()
            assert (memory.now, memory.peak) == (8000, 8000)
            del third
        assert (memory.now, memory.peak) == (0, 8000)

    def test_what_training_keeps_for_backward(self):
        first, second = nn.Linear(64, 128, bias=False), nn.Linear(128, 1, bias=False)
        images = torch.zeros(32, 64)

        def gradients():
            second(first(images).relu()).sum().backward()

        model = nn.Sequential(first, second)
        hidden = 32 * 128 * 4
        grown = backends.activation_memory(model, gradients, CPU)
        # forward keeps relu's output; backward adds its gradient, that of the row before, and those of the weights
        assert 2 * hidden <= grown <= 4 * hidden + (64 * 128 + 128) * 4 + 32 * 8
        assert all(p.grad is None for p in model.parameters())

    def test_growth_of_a_run(self):
        assert peak_memory_increase(lambda: torch.zeros(10) + 1, CPU) == 80
