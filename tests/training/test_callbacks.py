"""Callbacks: processes agree on a signal before any of them stops."""

import signal
from types import SimpleNamespace

import pytest
from jobs import STOPPING

from tool_calling.training.callbacks import Stopper


@pytest.mark.parametrize("decide", ["on_step_end", "on_evaluate", "on_epoch_end"])
def test_a_signal_of_another_process_stops_this_one_wherever_it_decides(decide, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda number, op, group: number.fill_(signal.SIGTERM))
    stopper = Stopper()
    stopper.group = "all"
    control = SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=True)
    getattr(stopper, decide)(None, SimpleNamespace(epoch=1.0, global_step=3, max_steps=9), control)
    assert control.should_training_stop and stopper.agree() == signal.SIGTERM
    stopper.note(signal.SIGTERM, None)  # its own comes a moment later, and is no second one
    assert capfd.readouterr().err.count(STOPPING) == 1
