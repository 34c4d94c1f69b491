"""Streams in Unsloth's decoder, recorded as CUDA graphs."""

import argparse
from functools import partial
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from tool_calling.engines.start import free_gpu
from tool_calling.schedule import Plan
from tool_calling.terminal import UserError

RECORDED_SHARE = 0.5  # of the free GPU memory: CUDA graphs that would hold more are not recorded


def to_prefix_seg_info(subtree_end):
    """Return the object by which Unsloth's attention finds the block mask of this stream in its cache.

    Unsloth's FlexAttention kernel shares one prefix per group (unsloth/utils/prefix_grouper_kernel.py). The tree is
    more general and its mask simpler, so the mask is made here and put where the kernel looks first.
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


# Held while training, measured with Unsloth on Qwen3-0.6B: GiB that no stream needs but every run has, and the work of
# one layer as a multiple of what its backward pass keeps. A recorded graph frees nothing between its kernels.
EAGER_MEMORY, RECORDED_MEMORY = (0.11, 0.7), (0.27, 1.25)


def count_token_bytes(args: argparse.Namespace, config, working: float) -> float:
    """Return the bytes of GPU memory that a token of a stream takes in training.

    A layer's backward pass keeps the inputs of its norms and projections, 2 bytes each. With checkpointing that is so
    for one layer at a time, `working` times with what is computed from them, and of the others only the input is kept.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 4 * config.hidden_size + 3 * head_dim * (heads + config.num_key_value_heads) + 2 * config.intermediate_size
    if args.gradient_checkpointing == "off":
        return 2 * config.num_hidden_layers * kept
    return 2 * config.num_hidden_layers * config.hidden_size + working * 2 * kept


def can_record(args: argparse.Namespace, plan: Plan) -> bool:
    """Return whether streams may be recorded as CUDA graphs (see read_streams).

    A recorded gradient lies where the next one will be written, so there must be one stream per step; and dropout would
    be the recorded one.
    """
    return args.cuda_graphs and plan.share_prefix and plan.accumulation == 1 and not args.lora_dropout


def find_recorded(args: argparse.Namespace, plan: Plan, config) -> tuple[int, ...]:
    """Return the lengths of streams that are recorded: all of the plan's, or none if they hold over RECORDED_SHARE.

    Each recorded length holds for good what it needs.
    """
    if not can_record(args, plan):
        return ()
    free_gpu()
    held = sum(plan.lengths) * count_token_bytes(args, config, RECORDED_MEMORY[1])
    return plan.lengths if held <= RECORDED_SHARE * torch.cuda.mem_get_info()[0] else ()


def read_streams(model, recorded: tuple[int, ...]) -> None:
    """Make Unsloth's decoder take streams (`subtree_end`), and replay those of some lengths as CUDA graphs.

    Most of a small model's step is spent launching 6,000 kernels one by one; and on several GPUs, the processes launch
    more slowly than one does, so that large models wait too. Forward and backward of each length of `recorded` are
    therefore recorded when it first comes in training, and from then on replayed by two launches. Layers are then
    checkpointed without Unsloth's copies to the CPU, which a graph cannot hold.
    """
    decoder = model.get_base_model().model
    eager, pool = decoder.forward, torch.cuda.graph_pool_handle()
    decoder.graphs = {} if recorded else None  # see drop_graphs

    class Stream(torch.nn.Module):
        captured = False

        def __init__(self, length: int):
            super().__init__()
            self.decoder, self.packed_seq_lengths = decoder, torch.tensor([length])

        def forward(self, input_ids, position_ids, subtree_end):
            self.captured = torch.cuda.is_current_stream_capturing()
            # Given packed_seq_lengths, Unsloth need not wait for the GPU to find them, which a graph cannot.
            return eager(
                input_ids=input_ids,
                position_ids=position_ids,
                packed_seq_lengths=self.packed_seq_lengths,
                prefix_seg_info=to_prefix_seg_info(subtree_end),
            ).last_hidden_state

    def to_graph(*tensors):
        checkpoint = getattr(torch.utils.checkpoint, "_old_checkpoint", torch.utils.checkpoint.checkpoint)
        unsloth_checkpoint = getattr(decoder.layers[0], "_gradient_checkpointing_func", None)
        torch.cuda.empty_cache()
        stream = Stream(len(tensors[-1]))
        try:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
                graph = torch.cuda.make_graphed_callables(
                    stream, tuple(t.clone() for t in tensors), num_warmup_iters=1, pool=pool
                )
            # A stream longer than Unsloth's tables of rotations replaces them, but the graph goes on reading these.
            graph.rotations = [module.get_cached() for module in decoder.modules() if hasattr(module, "get_cached")]
            return graph
        except RuntimeError as error:
            if not stream.captured:  # in the trial before the recording, after which the run can go on
                raise
            if isinstance(error, torch.OutOfMemoryError):  # now CUDA's allocator is in a state not to be trusted
                raise UserError(
                    "out of GPU memory while the step was recorded as a CUDA graph; run again with "
                    "--no-cuda_graphs, slower, or lower --batch_size"
                ) from None
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); "
                "run again with --no-cuda_graphs, slower"
            ) from None
        finally:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = unsloth_checkpoint

    def forward(*inputs, subtree_end=None, **kwargs):
        if subtree_end is None:
            return eager(*inputs, **kwargs)
        length, tensors = len(subtree_end), (kwargs["input_ids"], kwargs["position_ids"], subtree_end)
        stream = None
        if decoder.graphs is not None and length in recorded:
            if length not in decoder.graphs and decoder.training and torch.is_grad_enabled():
                decoder.graphs[length] = to_graph(*tensors)
            stream = decoder.graphs.get(length)
        return BaseModelOutputWithPast(last_hidden_state=(stream or Stream(length))(*tensors))

    decoder.forward = forward


def drop_graphs(model) -> None:
    """Free the recorded CUDA graphs of a model; from then on its streams are launched kernel by kernel.

    Where memory ran out, that of the graphs is needed; and a step of several streams cannot use them (see can_record).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, "model", None)
    if getattr(decoder, "graphs", None) is not None:
        decoder.graphs = None


def empty_weights(model) -> None:
    """Free the memory of a model's weights, also if a library holds on to them, as after training with Unsloth."""
    drop_graphs(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.untyped_storage().resize_(0)


def make_room(model) -> None:
    """Free all that a computation that ran out of memory left behind; gradients are dropped too."""
    model.zero_grad()
    drop_graphs(model)
    free_gpu()
