"""How the answers of a server agree with those of the same model here, row by row, and why they do not."""

from typing import NamedTuple

from tool_calling.samples import Sample
from tool_calling.scores import Proof, Said, is_same, read_reference


class Reply(NamedTuple):
    """What a server has sent for a sample: an answer as a client gets it, or an error."""

    text: str = ""  # calls stand below it as JSON
    calls: list[dict] | None = []  # None: one is broken
    prompt_tokens: int | None = None  # as the server counts them
    cut: bool = False  # at the length that was asked for
    unread: bool = False  # whether the text holds a call that the server has not read
    error: str | None = None


def compare_served(proof: Proof) -> dict[str, dict]:
    """Return {server: its model, and how it agrees with the first model that answered here, if one did}."""
    here = next((model for model, result in proof.results.items() if "replies" not in result), None)
    return {
        model: {"model": result["served"]} | (compare(proof, here, model) if here else {})
        for model, result in proof.results.items()
        if "replies" in result
    }


def compare(proof: Proof, here: str, server: str) -> dict:
    """Return how many verdicts and answers of two models are equal, and the rows that differ, other verdicts first."""
    replies, samples = proof.results[server]["replies"], proof.asked(server)
    verdicts = [ours[:3] == theirs[:3] for ours, theirs in zip(proof.verdicts[here], proof.verdicts[server])]
    answers = [*map(is_equal, proof.said[here], proof.said[server])]
    counted = [reply.prompt_tokens == sample.prompt_length for reply, sample in zip(replies, samples)]
    different = [
        {
            "where": samples[index].source,
            "request": samples[index].request,
            "expected": read_reference(samples[index]).text,
            "here": proof.said[here][index].text,
            "served": replies[index].text,
            "exact": [proof.verdicts[model][index].exact for model in (here, server)],
            "why": explain_difference(replies[index], samples[index]),
        }
        for index in sorted(range(len(samples)), key=verdicts.__getitem__)
        if not (verdicts[index] and answers[index])
    ]
    counts = {"verdicts": sum(verdicts), "answers": sum(answers)}
    if any(reply.prompt_tokens for reply in replies):  # not all servers count them
        counts["prompt_lengths"] = sum(counted)
    return {"against": here, "rows": len(samples), "equal": counts, "different": different}


def is_equal(ours: Said, theirs: Said) -> bool:
    """Say whether two answers are the same to a client: the same calls in order, or the same text."""
    if ours.calls and theirs.calls:
        return is_same(ours.calls, theirs.calls)
    return ours.text.strip() == theirs.text.strip()


def explain_difference(reply: Reply, sample: Sample) -> str:
    """Return why a server answers a sample in another way, as far as its reply can tell."""
    found = []
    if reply.error:
        found.append(f"the request failed: the server {reply.error}")
    elif reply.prompt_tokens is None:
        found.append("the server does not say how long its prompt is")
    elif reply.prompt_tokens != sample.prompt_length:
        lengths = f"{reply.prompt_tokens:,} tokens, the trained one {sample.prompt_length:,}"
        found.append(f"its prompt has {lengths}: it has another chat template, or renders the tools otherwise")
    if reply.cut:
        found.append("the answer is cut at its longest length")
    if reply.unread:
        found.append(f"its text holds a call that the server does not read; start it with the parser {sample.parser} ")
        found[-1] += f"(vLLM: --tool-call-parser {sample.parser})"
    return "; ".join(found) or "the prompts are equally long: rounding, or a server that samples at temperature 0"
