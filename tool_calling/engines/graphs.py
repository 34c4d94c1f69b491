"""Streams in Unsloth's decoder, recorded as CUDA graphs."""

import weakref

import torch
from accelerate.utils import gather_object
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from tool_calling.data.literals import as_list
from tool_calling.engines.compat import cache_block_mask, list_rotations, plain_checkpointing
from tool_calling.engines.device import free_gpu
from tool_calling.schedule import Schedule
from tool_calling.terminal import UserError, say

HELD_SHARE = 0.5  # of the free GPU memory: activations and CUDA graphs that would take more are not held
# Held in training, measured with Unsloth on Qwen3-0.6B: GiB that every run needs beside its streams, and the work of
# one layer as a multiple of what its backward pass keeps. A recorded graph frees nothing between its kernels.
EAGER_MEMORY, RECORDED_MEMORY = (0.11, 0.7), (0.27, 1.25)
# Bytes for each number of a head some of whose rows are trained: a copy in 16 bits, and gradients in 32 and 16.
HEAD_COPIES = 2 + 4 + 2


def count_token_bytes(config, checkpointing: bool, working: float) -> float:
    """Return the bytes of GPU memory that a token of a stream takes in training.

    A layer's backward pass keeps the inputs of its norms and projections, 2 bytes each. With checkpointing it does so
    for one layer at a time, `working` times with what is computed from them, and keeps only the input of the others.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = max(as_list(config.intermediate_size))  # some models have one for each layer
    kept = 4 * config.hidden_size + 3 * head_dim * (heads + config.num_key_value_heads) + 2 * inner
    return 2 * layers * config.hidden_size + working * 2 * kept if checkpointing else 2 * layers * kept


def use_checkpointing(choice: str, engine: str, schedule: Schedule, model, recording: bool) -> bool:
    """Return whether activations are computed twice instead of kept: less memory, a third more time.

    With "auto" they are kept on CPU and, with Unsloth, where HELD_SHARE of each GPU's free memory holds those of the
    longest stream, or of all recorded ones. What the Transformers engine keeps on CUDA has not been measured.
    """
    if choice != "auto" or not torch.cuda.is_available():
        return choice == "on"
    if engine != "unsloth":
        return True
    free_gpu()
    tokens = sum(schedule.layout.lengths) if recording else max(schedule.measure_run())
    fixed, working = RECORDED_MEMORY if recording else EAGER_MEMORY
    held = fixed * 2**30 + tokens * count_token_bytes(model.config, False, working)
    if any(isinstance(module, TrainableTokensLayer) for module in model.modules()):
        held += HEAD_COPIES * model.config.vocab_size * model.config.hidden_size
    free = torch.cuda.mem_get_info()[0]
    twice = not all(gather_object([held <= HELD_SHARE * free]))  # all devices do alike
    verdict = "so they are computed twice" if twice else "and are kept"
    held, free = (f"{size / 2**30:.{digits}f}" for size, digits in ((held, 2), (free, 1)))
    say("gpu", f"to train with all activations of {tokens:,} tokens would take {held} of {free} GiB free, {verdict}")
    return twice


def find_recorded(schedule: Schedule, config, checkpointing: bool) -> tuple[int, ...]:
    """Return the lengths of streams to record: all of the schedule's, or none if they hold over HELD_SHARE.

    Each recorded length holds its memory as long as the model lives.
    """
    free_gpu()
    lengths = schedule.layout.lengths
    held = sum(lengths) * count_token_bytes(config, checkpointing, RECORDED_MEMORY[1])
    return lengths if held <= HELD_SHARE * torch.cuda.mem_get_info()[0] else ()


class Stream(torch.nn.Module):
    """Unsloth's decoder over streams of one length, as a module that a CUDA graph can record."""

    captured = False  # whether the last forward pass was recorded

    def __init__(self, decoder, forward, length: int):
        super().__init__()
        self.decoder, self.eager = decoder, forward
        self.packed_seq_lengths = torch.tensor([length])  # otherwise Unsloth waits for the GPU, which a graph cannot

    def forward(self, input_ids, position_ids, subtree_end):
        self.captured = torch.cuda.is_current_stream_capturing()
        return self.eager(
            input_ids=input_ids,
            position_ids=position_ids,
            packed_seq_lengths=self.packed_seq_lengths,
            prefix_seg_info=cache_block_mask(subtree_end),
        ).last_hidden_state


def record(stream: Stream, tensors: tuple, pool):
    """Return forward and backward of a stream of these shapes as CUDA graphs.

    RuntimeError in the trial before the recording, after which the run can go on; UserError in the recording itself.
    """
    torch.cuda.empty_cache()
    inputs = tuple(tensor.clone() for tensor in tensors)
    try:
        with (
            plain_checkpointing(stream.decoder),  # a graph cannot hold copies to the CPU
            torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False),
        ):
            graph = torch.cuda.make_graphed_callables(stream, inputs, num_warmup_iters=1, pool=pool)
    except RuntimeError as error:
        if not stream.captured:
            raise
        if isinstance(error, torch.OutOfMemoryError):  # now the state of CUDA's allocator cannot be trusted
            advice = "run again with --gradient_checkpointing on or --no-cuda_graphs, slower, or lower --batch_size"
            raise UserError(f"out of GPU memory while the step was recorded as a CUDA graph; {advice}") from None
        reason, advice = str(error).splitlines()[0], "run again with --no-cuda_graphs, slower"
        raise UserError(f"the step cannot be recorded as a CUDA graph ({reason}); {advice}") from None
    graph.rotations = list_rotations(stream.decoder)  # the graph reads these, even when the model replaces them
    return graph


def read_streams(model, recorded: tuple[int, ...]) -> None:
    """Make Unsloth's decoder take streams (`subtree_end`), and replay those of the `recorded` lengths as CUDA graphs.

    Most of a small model's step is spent launching 6,000 kernels one by one, and several processes launch more slowly
    than one, so that large models wait too. Forward and backward of each length are therefore recorded when it first
    comes in training, and from then on replayed by two launches.
    """
    decoder = find_decoder(model)
    eager, pool, last = decoder.forward, torch.cuda.graph_pool_handle(), []
    decoder.graphs = {} if recorded else None  # see drop_graphs

    def forward(*inputs, subtree_end=None, **kwargs):
        if subtree_end is None:
            return eager(*inputs, **kwargs)
        length, tensors = len(subtree_end), (kwargs["input_ids"], kwargs["position_ids"], subtree_end)
        graph = None
        if decoder.graphs is not None and length in recorded:
            if length not in decoder.graphs and decoder.training and torch.is_grad_enabled():
                decoder.graphs[length] = record(Stream(decoder, eager, length), tensors, pool)
            graph = decoder.graphs.get(length)
        if graph is None:
            return BaseModelOutputWithPast(last_hidden_state=Stream(decoder, eager, length)(*tensors))
        if any(output() is not None for output in last):
            raise RuntimeError("a recorded stream would be replayed over the output of the one before, which is in use")
        output = graph(*tensors)
        last[:] = [weakref.ref(output)]
        return BaseModelOutputWithPast(last_hidden_state=output)

    decoder.forward = forward


def find_decoder(model):
    """Return the decoder of a model, with or without an adapter; None if it has another structure."""
    return getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "model", None)


def replays(model) -> bool:
    """Return whether streams are replayed as CUDA graphs; then a gradient lies where the next one will be written."""
    return getattr(find_decoder(model), "graphs", None) is not None


def drop_graphs(model) -> None:
    """Free the recorded CUDA graphs of a model, for memory; from then on its streams are launched kernel by kernel."""
    if replays(model):
        find_decoder(model).graphs = None


def make_room(model) -> None:
    """Free what a computation that ran out of memory left behind, gradients included."""
    model.zero_grad()
    drop_graphs(model)
    free_gpu()


def empty_weights(model) -> None:
    """Free the memory of a model's weights, even if a library still holds them, as after training with Unsloth."""
    drop_graphs(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.untyped_storage().resize_(0)
