"""CUDA graphs: which streams are recorded, and how their memory is given back. What replays them needs a GPU."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import CASES, make_adapted, make_qwen3, make_schedule

from tool_calling.engines import graphs
from tool_calling.engines.graphs import empty_weights, find_recorded, make_room, read_streams, use_checkpointing

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


@pytest.mark.parametrize(
    "lengths, recording, tokens",
    [((128, 256), True, 384), ((128, 256), False, 128), ((), False, 30)],  # all recorded, or the longest of the run
)
@pytest.mark.parametrize("rows", [None, [3, 5]])
def test_activations_are_kept_where_half_of_the_free_memory_holds_them(
    monkeypatch, capsys, lengths, recording, tokens, rows
):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=rows)
    model, schedule = get_peft_model(make_qwen3(tied=True), lora), make_schedule(CASES["one tool set"], 8, lengths)
    given = ("unsloth", schedule, model, recording)
    head = 8 * model.config.vocab_size * 32 if rows else 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not use_checkpointing("auto", *given) and use_checkpointing("on", *given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "free_gpu", lambda: None)
    needed = 2 * (tokens * 2 * 2 * KEPT + (0.27 if recording else 0.11) * 2**30 + head)
    for free, twice in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**40))
        monkeypatch.setattr(graphs, "gather_object", lambda found: found)
        assert use_checkpointing("auto", *given) is twice
        verdict = "so they are computed twice" if twice else "and are kept"
        sizes = f"{needed / 2**31:.2f} of {needed / 2**30:.1f} GiB free"
        found = f"to train with all activations of {tokens:,} tokens would take {sizes}, {verdict}"
        assert capsys.readouterr().out == f"gpu      {found}\n"
        assert use_checkpointing("on", *given) and not use_checkpointing("off", *given)
    assert use_checkpointing("auto", "transformers", *given[1:])  # what it keeps has not been measured
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed, 2**40))
    monkeypatch.setattr(graphs, "gather_object", lambda found: [*found, False])  # another device has less
    assert use_checkpointing("auto", *given)


def test_a_replay_over_an_output_in_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    decoder = torch.nn.Linear(1, 1)
    read_streams(types.SimpleNamespace(get_base_model=lambda: types.SimpleNamespace(model=decoder)), (8, 16))
    decoder.graphs = dict.fromkeys((8, 16), lambda *tensors: torch.ones(1))
    given = {"input_ids": None, "position_ids": None}
    output = decoder.forward(subtree_end=torch.zeros(8), **given).last_hidden_state
    with pytest.raises(RuntimeError, match="replayed over the output of the one before"):
        decoder.forward(subtree_end=torch.zeros(16), **given)
    view = output[None]  # holds it, too
    del output
    with pytest.raises(RuntimeError):
        decoder.forward(subtree_end=torch.zeros(8), **given)
    del view
    assert decoder.forward(subtree_end=torch.zeros(16), **given).last_hidden_state == 1


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
