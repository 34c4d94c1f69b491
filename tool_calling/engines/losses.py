"""Losses of the supervised tokens of a batch, the scores and gradients that follow from them."""

import torch
from torch.nn.functional import cross_entropy

from tool_calling.engines.attention import to_attention_mask, to_key_blocks
from tool_calling.engines.device import autocast
from tool_calling.engines.fsdp import held_part
from tool_calling.engines.heads import has_fused_head
from tool_calling.scores import find_interval
from tool_calling.streams import IGNORED

NOT_INPUTS = ("labels", "subtree_end", "places", "weights", "temperature")  # of a batch: the model takes the rest
COMPARED_NUMBERS = 2**27  # of a larger gradient every n-th number is compared: half a GiB each time it is held


def compute_token_losses(model, batch: dict, engine: str):
    """Return (loss in nats, fp32 with gradient; whether greedy decoding would choose the token), each [supervised].

    In a stream, attention is limited to each token's ancestors. The vocabulary projection, the largest of all
    multiplications, is computed only where a token is supervised. Logits are divided by the batch's `temperature`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in NOT_INPUTS}
    if "subtree_end" in batch and engine == "unsloth":
        inputs["subtree_end"] = batch["subtree_end"][0]
    elif "subtree_end" in batch:
        inputs["attention_mask"] = to_attention_mask(batch["subtree_end"][0])
        inputs["key_blocks"] = to_key_blocks(inputs["attention_mask"])
    temperature = batch.get("temperature", 1.0)
    if has_fused_head(model):
        places = batch["places"]
        targets = batch["labels"].flatten()[places + 1]
        log_probs, likeliest = model(**inputs, places=places, targets=targets, temperature=temperature)
        return -log_probs.float(), likeliest
    labels = batch["labels"][:, 1:]
    supervised = labels != IGNORED
    columns = supervised.any(dim=0).nonzero()[:, 0].tolist()  # a tensor would be on another GPU if layers are spread
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits[supervised[:, columns]]
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    losses = cross_entropy(scaled, labels[supervised], reduction="none")
    return losses, logits.detach().argmax(dim=-1) == labels[supervised]


def score_batches(model, batches: list[dict], engine: str):
    """Return sums over batches, float64 [4]: loss in nats, supervised tokens, samples reproduced, samples.

    Greedy decoding writes a completion exactly if and only if each of its tokens is the most likely one after those
    before it. So this forward pass, which knows the completion, counts token exact matches without generating.
    """
    losses, exact, tokens, samples = [], [], 0, 0
    for batch in batches:
        loss, reproduced = score_batch(model, batch, engine)
        losses.append(loss.sum())
        exact.append(reproduced.sum(dtype=torch.float64))
        tokens, samples = tokens + len(batch["places"]), samples + len(reproduced)
    zero = torch.zeros((), dtype=torch.float64, device=model.device)
    return torch.stack([sum(losses, zero), zero + tokens, sum(exact, zero), zero + samples])


def score_batch(model, batch: dict, engine: str):
    """Return (loss in nats, float64; whether greedy decoding reproduces it) of each sample, in a batch's order."""
    supervised = batch["labels"] != IGNORED
    starts = supervised & ~supervised.roll(1, dims=1)  # before each completion stands its prompt
    index = starts.flatten().cumsum(dim=0)[supervised.flatten()] - 1  # the completion that each token is of
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(model):
        loss, hits = compute_token_losses(model, to_device(batch, model), engine)
    model.train(was_training)
    sums = torch.zeros(2, int(starts.sum()), dtype=torch.float64, device=loss.device)
    loss, misses = sums.index_add_(1, index.to(loss.device), torch.stack([loss, ~hits]).double())
    return loss, misses == 0


def to_device(batch: dict, model) -> dict:
    """Return a batch on the device of the model; what is no tensor stays as it is."""
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}


def to_metrics(sums) -> dict:
    """Return the mean loss in nats per supervised token, and the share of samples that greedy decoding reproduces.

    `exact_low` and `exact_high` are the ends of the 95 % interval of that share.
    """
    loss, tokens, exact, samples = sums.tolist()
    low, high = find_interval(exact, samples)
    return {"loss": loss / tokens, "exact_match": exact / samples, "exact_low": low, "exact_high": high}


def measure_loss(model, batches: list[dict], engine: str) -> float:
    """Return the mean loss in nats per supervised token over batches."""
    return to_metrics(score_batches(model, batches, engine))["loss"]


def compute_gradient(model, batches: list[dict], engine: str):
    """Return (losses of the supervised tokens, the gradient of their sum as one fp32 vector), on the CPU, of batches.

    The gradient of a large model is every n-th number, since its errors are not in a few of them; that of a split model
    is the part on this device.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = -(-sum(parameter.numel() for parameter in parameters) // COMPARED_NUMBERS)
    losses, gradient = [], 0.0
    for batch in batches:
        model.zero_grad()
        with autocast(model):
            found = compute_token_losses(model, to_device(batch, model), engine)[0]
        found.sum().backward()
        losses.append(found.detach().cpu())
        # Added here and not in .grad, where a CUDA graph writes the next gradient over the last.
        gradient += torch.cat([held_part(parameter.grad).flatten()[::step].float() for parameter in parameters]).cpu()
    model.zero_grad()
    return torch.cat(losses), gradient
