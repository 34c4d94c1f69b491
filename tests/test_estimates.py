"""GPU memory as it was measured, and disk as it is needed."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from conftest import TINY, qwen3_config

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.engines.hub import check_model, count_parameters
from tool_calling.estimates import SMALL_FILES, Footprint, Saving
from tool_calling.plan import list_writes
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.terminal import UserError

WHOLE = 11_475_264  # weights of the embedded base
LORA = 8 * 16 * (4 * (320 + 320) + 3 * (320 + 896))  # of rank 16 on it: four square projections, three wide

MEASURED = [  # settings, tokens of the longest micro-batch, GiB reserved at peak while training Qwen3-0.6B with Unsloth
    ({}, 1790, 1.05),
    ({}, 8950, 1.76),
    ({"four_bit": False, "checkpointing": False}, 8950, 10.65),
    ({"recorded": False}, 2 * 1120, 0.89),  # padded batches
    ({"recorded": False}, 16 * 1151, 2.18),
    ({"recorded": False}, 32 * 1175, 3.70),
    ({"recorded": False}, 64 * 1196, 6.73),
]


@pytest.mark.parametrize("settings, tokens, measured", MEASURED)
def test_memory_is_estimated_as_it_was_measured(settings, tokens, measured):
    config = qwen3_config(1024, 3072, 28, 16, True)
    parameters = count_parameters(config, rank=16)
    assert parameters == {"linear": 440_401_920, "other": 155_648_000, "adapter": 10_092_544}
    footprint = Footprint(config, parameters, True, "adamw_8bit", recorded=True)
    footprint = replace(footprint, **settings)
    found = footprint.estimate(tokens)
    assert found["total"] == pytest.approx(measured, rel=0.05)
    assert found["base"] == (0.51 if footprint.four_bit else 1.11) and found["adapter"] == 0.09
    if not settings:  # streams of a second length are recorded too, in memory of their own
        two = footprint.estimate(tokens, (1024, tokens))
        kept = 4 * 1024 + 3 * 128 * (16 + 8) + 2 * 3072
        token = 28 * 2 * 1024 + 1.25 * 2 * kept
        assert two["total"] - found["total"] == pytest.approx(1024 * token / 2**30, abs=0.011)
        saved = 0.16 + 0.55 * 2 * kept * tokens / 2**30
        assert found["total"] - found["without_graphs"] == pytest.approx(saved, abs=0.011)
        assert two["without_graphs"] == found["without_graphs"]  # of eager streams, the longest counts
    # PyTorch's optimizer has 8 bytes of moments instead of 2.
    assert replace(footprint, optim="adamw_torch_fused").estimate(tokens)["adapter"] == 0.15


@pytest.mark.parametrize(
    "hidden, inner, layers, heads, tied, in_4, in_16",
    [  # Qwen3 of 0.6B to 32B, on an H200
        (1024, 3072, 28, 16, True, 1.42, 2.04),
        (2048, 6144, 28, 16, True, 2.82, 4.68),
        (2560, 9728, 36, 32, True, 4.91, 9.78),
        (4096, 12288, 36, 32, False, 9.12, 18.51),
        (5120, 17408, 40, 40, False, 13.92, 31.71),
        (5120, 25600, 64, 64, False, 25.10, 67.62),
    ],
)
def test_memory_of_all_sizes_is_estimated_as_it_was_measured(hidden, inner, layers, heads, tied, in_4, in_16):
    config = qwen3_config(hidden, inner, layers, heads, tied)
    parameters = count_parameters(config, rank=16)
    for four_bit, measured in ((True, in_4), (False, in_16)):
        footprint = Footprint(config, parameters, four_bit, "adamw_torch_fused", recorded=True)
        assert footprint.estimate(5248, (5248,))["total"] == pytest.approx(measured, rel=0.05)


def test_split_weights_take_a_share_of_each_device():
    config = qwen3_config(1024, 3072, 28, 16, True)
    for rank, split_adapter in ((16, 1), (0, 4)):  # an adapter stays whole on each
        whole = Footprint(config, count_parameters(config, rank), False, "adamw_torch")
        one, four = (replace(whole, split_over=devices).estimate(1000) for devices in (1, 4))
        assert four["base"] == pytest.approx(one["base"] / 4, abs=0.01)
        assert four["adapter"] == pytest.approx(one["adapter"] / split_adapter, abs=0.01)
        assert four["longest_stream"] == one["longest_stream"]


def test_disk_and_memory_are_reckoned_for_what_is_trained_and_saved(tmp_path):
    config = check_model(str(TINY))
    parameters = count_parameters(config, 0)
    linear, whole = parameters["linear"], parameters["linear"] + parameters["other"]
    assert parameters["adapter"] == 0 and whole == WHOLE
    out, final = str(tmp_path / "out"), str(tmp_path / "final")

    def count(**settings):
        return Saving(out, final, **settings).count_final_bytes(parameters)

    assert count() == 2 * whole and count(save_method="lora") == 0
    assert count(save_method="merged_4bit") == pytest.approx(2 * whole + 0.53 * linear + 2 * parameters["other"], abs=1)
    assert count(save_gguf="q8_0") == pytest.approx(3.1 * whole, abs=1)
    assert count(save_gguf="f16,q4_k_m") == pytest.approx((2 + 2 + 2 + 1.1) * whole, abs=1)
    # weights, gradients and moments in fp32
    memory = Footprint(config, parameters, False, "adamw_torch").estimate(1000)
    assert (memory["base"], memory["adapter"]) == (round(2 * whole / 2**30, 2), round(16 * whole / 2**30, 2))
    saving = Saving(out, final)
    assert saving.estimate_disk(parameters, "adamw_torch", 3)["checkpoints"] == 3 * 12 * whole
    with pytest.raises(UserError, match="3,000,000 checkpoints and the trained model need 4"):
        saving.check_disk(parameters, "adamw_torch", 3_000_000)
    written = list_writes(saving, False, [3])["written"]
    assert not [path for path in written if path.endswith("adapter")] and written[-1] == final
    written = list_writes(Saving(out, final, "lora"), True, [3])["written"]
    assert written[-1].endswith("report.html") and [path for path in written if path.endswith("adapter")]


def test_a_full_disk_is_seen_before_training(tmp_path, monkeypatch):
    free = {"value": 0}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free["value"]))
    out, final = tmp_path / "out", tmp_path / "a" / "b"
    parameters = count_parameters(check_model(str(TINY)), 16)
    assert (parameters["linear"] + parameters["other"], parameters["adapter"]) == (WHOLE, LORA)
    # The adapter in fp32; three checkpoints of it with Adam's two moments; the model in 16 bits; small files of each.
    needed = 4 * LORA + 3 * (4 + 8) * LORA + 2 * WHOLE + 5 * SMALL_FILES
    saving, free["value"] = Saving(str(out), str(final)), needed
    saving.check_disk(parameters, "adamw_torch", 3)
    free["value"] = needed - 1
    with pytest.raises(UserError) as error:
        saving.check_disk(parameters, "adamw_torch", 3)
    assert str(error.value) == (
        f"--output_dir {out} and --final_model_dir {final}: the adapter and 3 checkpoints and the merged model need "
        f"{needed / 1e9:.2f} GB, and the disk has {needed / 1e9:.2f} GB free; free some space or choose another disk, "
        "or keep fewer checkpoints with --save_total_limit"
    )
    saving, free["value"] = Saving(str(out), str(final), "lora"), needed - 2 * WHOLE - SMALL_FILES
    saving.check_disk(parameters, "adamw_torch", 3)
    free["value"] -= 1
    with pytest.raises(UserError, match=f"^--output_dir {out}: the adapter and 3 checkpoints need "):
        saving.check_disk(parameters, "adamw_torch", 3)


def test_checkpoints_on_the_disk_at_once_are_counted():
    samples = [Sample(f"row:{n}", [1, 2, 3], 2) for n in range(40)]  # 5 steps an epoch

    def count(*flags, first_step=0):
        args = script.parse_args([*flags])
        saves = plan_schedule(samples, pick(Batching, args), engine="transformers").list_saves(args.save_steps)
        return pick(Saving, args).count_checkpoints(saves, first_step)

    assert count("--num_epochs", "4") == 4
    assert count("--num_epochs", "4", "--save_steps", "3") == 7  # the last step is saved too
    assert count("--num_epochs", "4", "--save_total_limit", "2") == 3
    assert count("--num_epochs", "4", "--save_total_limit", "2", "--metric_for_best", "loss") == 4
    assert count("--num_epochs", "4", first_step=10) == 2
    # Stopped by a signal after step 3: the run goes on to save steps 4, 8 and 10.
    assert count("--max_steps", "10", "--save_steps", "4", first_step=3) == 3


def test_where_activations_may_be_kept_both_totals_are_known():
    config = qwen3_config(1024, 3072, 28, 16, True)
    footprint = Footprint(config, count_parameters(config, rank=16), True, "adamw_torch_fused", recorded=True)
    least = footprint.estimate(1792, (1792,))
    found = replace(footprint, may_keep=True).estimate(1792, (1792,))
    kept = replace(footprint, checkpointing=False).estimate(1792, (1792,))
    assert found == {**least, "keeping_activations": kept["total"], "free_to_keep": 2 * kept["longest_stream"]}
    assert (least["total"], kept["total"], found["free_to_keep"]) == (1.1, 2.75, 4.18)
