"""Callbacks: processes agree on a signal before any of them stops; a best checkpoint that is gone rules no more."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from jobs import STOPPING, make_checkpoint
from transformers import TrainerState, TrainingArguments

from tool_calling.engines.losses import to_metrics
from tool_calling.training.callbacks import ProgressBar, Stopper


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


def test_where_the_best_checkpoint_is_gone_the_best_is_sought_anew(tmp_path, capsys):
    best, last = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    state = {"global_step": 3, "best_global_step": 2, "best_metric": 0.9, "stateful_callbacks": {}}
    (last / "trainer_state.json").write_text(json.dumps(state))
    for there in (True, False):
        loaded = TrainerState.load_from_json(str(last / "trainer_state.json"))
        Stopper(str(last)).on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), loaded, None)
        assert (loaded.best_global_step, loaded.best_metric) == ((2, 0.9) if there else (None, None))
        warning = "warning: the best checkpoint, of step 2, is gone: the search for the best starts anew\n"
        assert capsys.readouterr().err == ("" if there else warning)
        shutil.rmtree(best, ignore_errors=True)


def test_a_share_of_held_out_rows_is_shown_with_its_interval(capsys):
    state, metrics = (
        SimpleNamespace(global_step=57, max_steps=57, epoch=1.0),
        to_metrics(torch.tensor([2.0, 40, 8, 10])),
    )
    assert metrics == {"loss": 0.05, "exact_match": 0.8} | {
        "exact_low": pytest.approx(0.4902, abs=5e-5),
        "exact_high": pytest.approx(0.9433, abs=5e-5),
    }
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    ProgressBar().on_evaluate(None, state, None, metrics)
    assert capsys.readouterr().out == (
        "         step    57 of 57  epoch 1: held-out loss 0.0500, exact match 80.0 % (49.0–94.3)\n"
    )
