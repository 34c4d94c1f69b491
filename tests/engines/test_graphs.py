"""CUDA graphs: which streams are recorded, and how their memory is given back. What replays them needs a GPU."""

import types

import pytest
import torch
from small import CASES, make_adapted, make_schedule

from tool_calling.engines.graphs import can_record, empty_weights, find_recorded, make_room
from tool_calling.schedule import Schedule
from tool_calling.streams import Layout

KEPT = 4 * 32 + 3 * 16 * 3 + 2 * 64  # inputs of norms and projections of one layer


@pytest.mark.parametrize(
    "checkpointing, token",
    [
        (True, 2 * 2 * 32 + 1.25 * 2 * KEPT),  # bytes, layers, width; and one layer at work
        (False, 2 * 2 * KEPT),
    ],
)
def test_streams_are_recorded_where_half_of_the_free_memory_holds_them(monkeypatch, checkpointing, token):
    lengths, config = (128, 256), make_adapted().config
    schedule = make_schedule(CASES["one tool set"], 8, lengths)
    for free, found in ((2 * 384 * token, lengths), (2 * 384 * token - 1, ())):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**40))
        assert find_recorded(schedule, config, checkpointing) == found


def test_only_one_stream_per_step_without_dropout_is_recorded():
    rows = CASES["one tool set"]
    assert can_record(make_schedule(rows, 8), dropout=0)
    assert not can_record(make_schedule(rows, 8), dropout=0.1)
    assert not can_record(Schedule(rows, 8, 2, Layout(8)), dropout=0)
    assert not can_record(Schedule(rows, 8, 1, Layout(8, share_prefix=False)), dropout=0)


def test_recorded_graphs_are_dropped_when_memory_runs_out():
    decoder = torch.nn.Linear(1, 1)
    decoder.graphs = {128: "a graph"}
    weight = decoder.weight
    weight.grad = torch.ones(1, 1)
    model = types.SimpleNamespace(
        get_base_model=lambda: types.SimpleNamespace(model=decoder), zero_grad=decoder.zero_grad
    )
    make_room(model)
    assert decoder.graphs is None and weight.grad is None


def test_emptied_weights_hold_no_memory_also_if_something_holds_them():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    kept, view = [*model.parameters(), *model.buffers()], model[0].weight.detach()
    empty_weights(model)
    assert [tensor.untyped_storage().nbytes() for tensor in [*kept, view]] == [0] * 8
