"""Losses and gradients of trained rows by TRL's fused head, against the stock head: prints how far they are apart.

Run with TRITON_INTERPRET=1: then its kernels need no GPU.
"""

from peft import LoraConfig, get_peft_model
from small import make_qwen3, row
from trl.trainer.utils import add_fused_lm_head

from tool_calling.engines.heads import fuse_head, has_fused_head
from tool_calling.engines.losses import compute_token_losses
from tool_calling.engines.tokens import compute_rows_alone
from tool_calling.streams import build_padded, build_stream


def compare_heads(tied: bool, build) -> float:
    """Return the largest difference between the heads, of losses and of gradients of the rows that `build` lays out."""
    tables = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(tables, [3, 7]),
    )
    model, found = get_peft_model(make_qwen3(tied), lora), []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data += 0.1
    compute_rows_alone(model)
    for fused in (False, True):
        if fused:
            add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer
            fuse_head(model)
        assert has_fused_head(model) is fused
        model.zero_grad()
        rows = [row([1, 3, 5], [7, 2, 3]), row([1, 4], [9])]
        losses, hits = compute_token_losses(model, build(rows), "transformers")
        losses.sum().backward()
        found.append([losses.detach(), hits.float(), *(weight.grad.clone() for weight in trained)])
    return max((one - other).abs().max().item() for one, other in zip(*found))


if __name__ == "__main__":
    print(max(compare_heads(tied, build) for tied in (True, False) for build in (build_padded, build_stream)))
