"""Every private name of other libraries that this project touches; tests/engines/test_compat.py looks for each of them.

A release that moves one of these names breaks here and nowhere else.
"""

import contextlib
import inspect
from functools import partial
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from torch.nn.attention.flex_attention import flex_attention

# module:class and names of the class, or module and names in its source; the release in which they were last seen
PRIVATE_NAMES = [
    (
        "transformers:Trainer",
        "_get_grad_norm _clip_grad_norm _maybe_log_save_evaluate _get_output_dir _save_checkpoint _save "
        "_save_optimizer_and_scheduler _load_optimizer_and_scheduler _load_from_checkpoint get_batch_samples "
        "evaluation_loop training_step compute_loss get_train_dataloader save_model "
        "create_model_card create_optimizer floating_point_ops",
        "transformers 5.17",
    ),
    ("transformers.training_args", "_setup_devices _n_gpu", "transformers 5.17"),
    ("transformers.configuration_utils", "_attn_implementation", "transformers 5.17"),
    ("transformers.cache_utils", "get_layer_types_and_kwargs", "transformers 5.17"),
    ("transformers.modeling_layers", "_gradient_checkpointing_func", "transformers 5.17"),
    ("trl.trainer.utils", "_ChunkedLogProbFunction final_logit_softcapping logit_scale", "trl 1.15"),
    ("trl.trainer.base_trainer", "loss_is_scaled_for_ga", "trl 1.15"),
    ("bitsandbytes.nn.modules", "support_avx512bf16_for_cpu", "bitsandbytes 0.50"),
    (
        "unsloth.utils.prefix_grouper_kernel",
        "_flex_attention_compiled _BLOCK_MASK_CACHE clear_block_mask_cache _create_block_mask_compiled "
        "_kernel_options_for_dtype",
        "unsloth 2026.10.9",
    ),
    ("unsloth.models.rl", "patch_trl_rl_trainers _patch_trl_rl_trainers sft_trainer", "unsloth 2026.10.9"),
    ("unsloth.models.llama", "get_cached _unsloth_gradient_checkpointing", "unsloth 2026.10.9"),
    ("unsloth_zoo.fused_losses.fused_linear", "_keep_index", "unsloth_zoo 2026.10.9"),
    ("unsloth_zoo.gradient_checkpointing", "_old_checkpoint", "unsloth_zoo 2026.10.9"),
]


def compile_attention(flash: bool) -> None:
    """Compile Unsloth's attention for exactly the lengths of streams: half the time of "any length".

    Streams have few lengths. With fullgraph, attention that cannot be compiled is an error (see check_sharing), and is
    not computed uncompiled, as Unsloth would. With `flash`, it is compiled to FlashAttention 4 instead of Triton.
    """
    from unsloth.utils import prefix_grouper_kernel

    prefix_grouper_kernel._flex_attention_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if flash:
        prefix_grouper_kernel._kernel_options_for_dtype = lambda dtype: {"BACKEND": "FLASH"}


def cache_block_mask(subtree_end) -> SimpleNamespace:
    """Return the `prefix_seg_info` by which Unsloth's attention finds the block mask of a stream in its cache.

    Unsloth's FlexAttention kernel shares one prefix per group (unsloth/utils/prefix_grouper_kernel.py). The tree of a
    stream is more general and its mask simpler, so the mask is made here and put where the kernel looks first.
    """
    from unsloth.utils import prefix_grouper_kernel as kernel

    def sees(batch, head, query, key):
        return (key <= query) & (query < subtree_end[key])

    length = len(subtree_end)
    seg_info = SimpleNamespace(signature=object(), T=length, T_pad=length)
    kernel.clear_block_mask_cache()  # one stream at a time
    kernel._BLOCK_MASK_CACHE[(seg_info.signature, str(subtree_end.device))] = kernel._create_block_mask_compiled(
        sees, B=1, H=None, Q_LEN=length, KV_LEN=length, device=subtree_end.device
    )
    return seg_info


@contextlib.contextmanager
def plain_checkpointing(decoder):
    """Checkpoint the decoder's layers as PyTorch does, without Unsloth's copies to the CPU."""
    checkpoint = getattr(torch.utils.checkpoint, "_old_checkpoint", torch.utils.checkpoint.checkpoint)
    former = getattr(decoder.layers[0], "_gradient_checkpointing_func", None)
    try:
        for layer in decoder.layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer in decoder.layers:
            layer._gradient_checkpointing_func = former


def set_checkpointing(model, on: bool) -> None:
    """Let a model of Unsloth compute its activations twice, or keep them."""
    model._unsloth_gradient_checkpointing = "unsloth" if on else False  # what its trainer goes back to in train()
    model.for_training(use_gradient_checkpointing=on)


def read_head_scale(forward) -> tuple:
    """Return (the cap of the logits or None, their factor) from the forward function that SFTTrainer gives a model."""
    found = inspect.getclosurevars(forward).nonlocals
    return found["final_logit_softcapping"], found["logit_scale"]


def take_all_targets() -> None:
    """Keep Unsloth's head from looking for tokens that are not supervised: it gets none, and would wait for the GPU."""
    from unsloth_zoo.fused_losses import fused_linear

    search = fused_linear._keep_index

    def keep_all(targets, mask, vocabulary, ignored):
        if mask is not None or ignored is not None:  # another loss than that of fuse_head
            return search(targets, mask, vocabulary, ignored)
        return torch.arange(len(targets), device=targets.device), len(targets)

    fused_linear._keep_index = keep_all


def list_rotations(decoder) -> list:
    """Return Unsloth's tables of rotations; a longer stream replaces them in the model."""
    return [module.get_cached() for module in decoder.modules() if hasattr(module, "get_cached")]


def keep_4_bit_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for bf16 on CPU.

    It would do so at the first inference, and train on them from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attends_by(config, name: str) -> bool:
    """Return whether a model of this config computes the attention of this name."""
    return config.get_text_config(decoder=True)._attn_implementation == name


def use_own_device(config) -> None:
    """Let a process use its own device alone: its GPU of several visible ones, or "cpu".

    Of several CPU processes, Transformers gives each a device "cpu:0", to which torch cannot load.
    """
    if torch.cuda.is_available():
        config._n_gpu = 1
    else:
        config.__dict__["_setup_devices"] = torch.device("cpu")
