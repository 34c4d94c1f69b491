"""Samples of a few tokens, and small random Qwen3s with trainers over them: the same each time, in float32, on CPU."""

from pathlib import Path

import torch
from conftest import patch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import train_qwen3_tool_calling as script
from tool_calling.engines.losses import compute_token_losses
from tool_calling.samples import Sample
from tool_calling.schedule import Schedule
from tool_calling.streams import Layout

VOCABULARY = 61
ANSWERS = [[5, 6], [7], [8, 9, 10], [11], [12, 13], [14]]
TRAIN = [
    Sample(f"rows.jsonl:{i + 1}", [1, 2, 3, 4, 30 + i, 20, *answer], 6, row=i) for i, answer in enumerate(ANSWERS * 4)
]  # 24 rows that share four tokens
COMPUTE = compute_token_losses


def row(prompt: list[int], answer: list[int], index: int = 0) -> Sample:
    """Return a sample of these tokens, of the row with this index."""
    return Sample(f"x:{index + 1}", prompt + answer, len(prompt), row=index)


TOOLS_A, TOOLS_B = list(range(1, 21)), list(range(30, 45))
CASES = {
    "one tool set": [
        row(TOOLS_A + [22, 23], [24, 25]),
        row(TOOLS_A + [22, 26], [27]),
        row(TOOLS_A + [28], [29, 24, 1]),
    ],
    "several tool sets": [
        row(TOOLS_A + [22], [24]),
        row(TOOLS_B + [22], [24, 25]),
        row(TOOLS_A + [23], [24]),
        row(TOOLS_B + [50, 51], [52]),
    ],
    "a row that is a prefix of another": [row(TOOLS_A[:10], [11]), row(TOOLS_A, [21, 22]), row(TOOLS_A[:9], [10, 11])],
    "single rows": [row(TOOLS_A, [21]), row(TOOLS_B, [21]), row([59, 58, 57], [56, 55])],
    "turns of one conversation": [
        row(TOOLS_A, [21, 22]),
        row(TOOLS_A + [21, 22, 30, 31], [32]),
        row(TOOLS_A + [21, 22, 30, 31, 32, 33], [34, 35]),
    ],
    "the same row twice": [row(TOOLS_A, [21, 22])] * 2,
    "prompts of one token": [row([7], [8]), row([7], [9])],
}
token = st.integers(1, 3)  # few tokens, so that prefixes meet by chance
ROWS_OF_TOKENS = st.lists(
    st.builds(row, st.lists(token, min_size=1, max_size=8), st.lists(token, min_size=1, max_size=3)),
    min_size=1,
    max_size=7,
)


def make_schedule(samples: list[Sample], rows: int, lengths: tuple[int, ...] = (), **more) -> Schedule:
    """Return a schedule of one stream of `rows` samples per step."""
    return Schedule(samples, rows, 1, Layout(rows, lengths=lengths), **more)


def make_qwen3(tied: bool = False, size: int = VOCABULARY) -> Qwen3ForCausalLM:
    """Return a Qwen3 of two small layers, with `size` tokens."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def make_adapted(attention: str = "sdpa"):
    """Return a small Qwen3 with LoRA whose two factors are both alive, and with this attention of Transformers."""
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=script.TARGET_MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(make_qwen3(tied=True), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.get_base_model().set_attn_implementation(attention)
    return model


def make_trainer(folder: Path, tokenizer, *flags: str, held_out=(), lengths: tuple[int, ...] = (), tokens=None):
    """Return a trainer of one epoch over TRAIN: of an adapter, with rows of `tokens`, or with --lora_rank 0 of all."""
    args = script.parse_args(
        ["--num_epochs", "1", "--warmup_steps", "0", "--learning_rate", "0.01", "--output_dir", str(folder), *flags]
    )
    schedule = Schedule(
        TRAIN,
        args.batch_size,
        args.gradient_accumulation_steps,
        Layout(args.batch_size, args.share_prefix, lengths),
        epochs=args.num_epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        answers=args.num_generations or 1,
    )
    model = make_qwen3(tied=not args.lora_rank)
    if args.lora_rank:
        lora = {"r": 4, "target_modules": script.TARGET_MODULES, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**lora, trainable_token_indices=tokens))
    trainer = script.build_run_trainer(args, model, tokenizer, schedule, list(held_out), "transformers")
    trainer.args.adam_epsilon = 1e-2  # or Adam turns rounding into other steps: see train_small.ADAM_EPSILON
    return trainer


def weights(trainer) -> torch.Tensor:
    """Return all trained weights as one vector."""
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters() if value.requires_grad])


def losses(trainer) -> list[float]:
    """Return the training losses that a trainer has logged."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class Identity(torch.autograd.Function):
    """The identity, to be given another gradient."""

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
