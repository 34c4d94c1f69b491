"""A trainer of a small random Qwen3 over 24 rows, the same each time, in float32 on the CPU."""

from pathlib import Path

import torch
from conftest import TINY, patch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import train_qwen3_tool_calling as script
from tool_calling.engines.losses import compute_token_losses
from tool_calling.samples import Sample
from tool_calling.schedule import Schedule
from tool_calling.streams import Layout

COMPUTE = compute_token_losses
ANSWERS = [[5, 6], [7], [8, 9, 10], [11], [12, 13], [14]]
TRAIN = [
    Sample(f"rows.jsonl:{i + 1}", [1, 2, 3, 4, 30 + i, 20, *answer], 6) for i, answer in enumerate(ANSWERS * 4)
]  # 24 rows that share four tokens


def make_trainer(folder: Path, *flags: str, held_out=(), lengths=()):
    """Return a trainer of one epoch over TRAIN, of an adapter or with `--lora_rank 0` of all weights."""
    settings = ["--num_epochs", "1", "--warmup_steps", "0", "--learning_rate", "0.01", "--output_dir", str(folder)]
    args = script.parse_args([*settings, *flags])
    layout = Layout(args.batch_size, args.share_prefix, lengths)
    steps = {"epochs": args.num_epochs, "max_steps": args.max_steps, "seed": args.seed}
    schedule = Schedule(TRAIN, args.batch_size, args.gradient_accumulation_steps, layout, **steps)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=not args.lora_rank,
        )
    )
    if args.lora_rank:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=script.TARGET_MODULES, task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return script.build_run_trainer(args, model, tokenizer, schedule, list(held_out), "transformers")


def weights(trainer) -> torch.Tensor:
    """Return all weights that are trained, in one row."""
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters() if value.requires_grad])


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()


class FailsBackward(Identity):
    """The identity, whose gradient does not fit into memory."""

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("simulated")


def limit_memory(monkeypatch, tokens: int, backward: bool = False) -> list[int]:
    """Let every batch of more tokens fail, before or in its backward pass; return the list of those that fit."""
    sizes = []

    def compute(model, batch, engine):
        size = batch["input_ids"].numel()
        if size <= tokens:
            sizes.append(size)
            return COMPUTE(model, batch, engine)
        if not backward:
            raise torch.OutOfMemoryError("simulated")
        found, hits = COMPUTE(model, batch, engine)
        # Half of the loss reaches the weights before the other half fails.
        return torch.cat([FailsBackward.apply(found[:1]), found[1:]]), hits

    patch(monkeypatch, "compute_token_losses", compute)
    return sizes
