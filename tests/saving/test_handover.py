"""The end of a run: what is kept gets a card, is uploaded, and its command to serve is printed."""

import yaml

import train_qwen3_tool_calling as script
from tool_calling.saving.handover import Serving, hand_over
from tool_calling.saving.merge import Trained
from tool_calling.scores import Verdict, count_scores


def test_only_the_adapter_is_handed_over(tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "tools.json").write_text("[]")
    args = script.parse_args(["--save_method", "lora", "--lora_rank", "24", "--push_to_hub", "me/tools"])
    row = count_scores([Verdict(True, True, False, ("a",), ("a",)), Verdict(False, False, False, ("a",), ())])
    report = {
        "args": vars(args),
        "scores": {"base": row, "adapter": row},
        "data": {"train": 8, "held_out": 2},
        "train": {"last_step": 3, "kept_step": 3, "history": []},
        "command": "python x.py --output_dir=/home/me/out ~/a/b hf_abcdefghij",
        "device": "cpu",
        "finished": "2026-01-01 00:00",
    }
    pushed = []

    def push(repo, folder):
        pushed.append((repo, folder))
        return "address"

    monkeypatch.setattr("tool_calling.saving.handover.push_folder", push)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    base = args.model_id
    trained = Trained(base, base, None, "transformers", args.final_model_dir, "lora", vars(args), str(adapter))
    hand_over(report, trained, None, ([], []), Serving("hermes", True, "qwen3"))
    assert pushed == [("me/tools", str(adapter))]
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "adapter_config.json", "tools.json"]
    card = (adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "`Qwen/Qwen3-0.6B` taught to call tools by LoRA of rank 24: the adapter alone." in card
    assert "\npython x.py --output_dir=out b $HF_TOKEN\n" in card
    assert "8 samples of `data/synthetic_finetune_dataset.json`, 2 held out; 3 steps;\ncpu, 2026-01-01 00:00." in card
    served = (
        "vllm serve Qwen/Qwen3-0.6B --tokenizer {0} --generation-config {0} --enable-lora --max-lora-rank 32 "
        "--lora-modules tools={0} --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"
    )
    assert (
        f"\n{served.format('me/tools')}\n# requests send the tools in tools.json, as client.py beside it does\n" in card
    )
    assert capsys.readouterr().out.splitlines() == [
        "push     address",
        f"done     adapter: {adapter}",
        f"serve    {served.format(adapter)}",
        f"         # requests send the tools in {adapter}/tools.json, as client.py beside it does",
    ]
