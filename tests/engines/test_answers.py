"""Answers: a shared prefix changes none of what Transformers writes, and free exact match counts the same rows."""

import pytest
import torch
from conftest import ROOT, TINY
from small import TRAIN, make_adapted

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Reading, read_examples
from tool_calling.data.splits import split_examples
from tool_calling.engines import answers, attention
from tool_calling.engines.answers import Sampling, generate_answers, generate_tokens, sample_answers
from tool_calling.engines.loading import load_base, warn_if_spread
from tool_calling.engines.losses import score_batches, to_metrics
from tool_calling.engines.start import quiet_libraries
from tool_calling.samples import Sample, render_examples
from tool_calling.streams import build_padded, build_stream


@pytest.fixture(scope="module")
def model():
    quiet_libraries()
    return load_base(str(TINY), load_in_4bit=False).eval()


@pytest.fixture(scope="module")
def samples(tokenizer):
    """Held-out rows of the bundled data, of which the embedded base gets some right."""
    examples, _ = read_examples([str(ROOT / script.DATASET_PATH)], Reading(str(ROOT / script.TOOLS_PATH)))
    _, held_out = split_examples(examples, 0.1)
    groups, problems = render_examples(tokenizer, held_out[8:24], 2048)
    assert not problems
    return [sample for group in groups for sample in group]


def write_alone(model, tokenizer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return Transformers' own greedy answer to one prompt."""
    stop = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        temperature=None,
        top_p=None,
        top_k=None,
    )[0, len(prompt) :].tolist()
    return output[: output.index(stop)] if stop in output else output


@pytest.mark.slow
def test_free_exact_match_is_that_of_generation_row_by_row(model, tokenizer, samples):
    found = generate_answers(model, tokenizer, samples, 16, 60, "base")
    written = [answer == sample.completion for answer, sample in zip(found, samples)]
    assert 3 <= sum(written) <= 13  # both verdicts occur

    def count(batches):
        return to_metrics(score_batches(model, batches, "transformers"))["exact_match"]

    assert [count([build_stream([row])]) for row in samples] == written
    for batches in (
        [build_stream(samples[:8]), build_stream(samples[8:])],
        [build_padded(samples[:9]), build_padded(samples[9:])],
    ):
        assert count(batches) == sum(written) / len(written)


@pytest.mark.slow
def test_a_batch_answers_as_each_prompt_alone(model, tokenizer, samples, monkeypatch):
    rows = samples[:6]
    prompts = [row.input_ids[: row.prompt_length] for row in rows]
    stop = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    alone = [write_alone(model, tokenizer, prompt, 40) for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 1  # rows leave the batch at different steps
    with torch.inference_mode():
        assert generate_tokens(model, prompts, [stop], 40) == alone
        assert generate_tokens(model, prompts[::-1], [stop], 40) == alone[::-1]
        assert generate_tokens(model, prompts[:1], [stop], 40) == alone[:1]  # one prompt shares all but its end
        monkeypatch.setattr(attention, "HELD_SCORES", 1)  # one row at a time
        assert generate_tokens(model, prompts, [stop], 40) == alone
        strangers = [prompts[0], prompts[1][300:], prompts[2][5:]]  # nothing in common: no prefix, much padding
        assert generate_tokens(model, strangers, [stop], 12) == [
            write_alone(model, tokenizer, prompt, 12) for prompt in strangers
        ]


def test_rows_with_the_same_tools_and_prompts_of_like_length_are_answered_together(model, monkeypatch):
    asked = []

    def answer(model, prompts, *more):
        asked.append([len(prompt) for prompt in prompts])
        return [[len(prompt)] for prompt in prompts]

    monkeypatch.setattr(answers, "generate_tokens", answer)
    lists = [{"type": "a"}], [{"type": "b"}]
    rows = [Sample(f"x:{n}", [1] * (n + 1), n, tools=lists[n % 2]) for n in (9, 2, 4, 3, 8, 7)]
    found = [answer for batch, said in answers.answer_in_parts(model, rows, 2) for answer in zip(batch, said)]
    assert asked == [[2, 4], [8, 3], [7, 9]]
    assert all(said == [row.prompt_length] for row, said in found) and len(found) == len(rows)


@pytest.mark.slow
def test_rows_for_which_memory_runs_out_are_answered_in_smaller_batches(model, tokenizer, samples, monkeypatch):
    tried, generate = [], answers.generate_tokens

    def run_out(model, prompts, *more):
        tried.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("full")
        return generate(model, prompts, *more)

    monkeypatch.setattr(answers, "generate_tokens", run_out)
    limit = 16
    whole = generate_answers(model, tokenizer, samples[:5], None, 8, "base")
    limit = 2
    assert generate_answers(model, tokenizer, samples[:5], None, 8, "base") == whole
    assert tried == [5, 5, 3, 2, 1, 2]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate_answers(model, tokenizer, samples[:1], None, 8, "base")


def test_as_many_rows_are_answered_at_once_as_fit(model, samples, monkeypatch):
    assert answers.count_rows(model, samples, 50) == 64
    prompts = [sample.input_ids[: sample.prompt_length] for sample in samples]
    own = max(map(len, prompts)) + 50 - answers.count_shared([*map(list, prompts)])
    config, free = model.config, {}
    row = own * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # bytes in fp32
    monkeypatch.setattr(answers, "is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["bytes"], 2**40))
    for rows in (3, 255):
        free["bytes"] = 2 * row * rows
        assert answers.count_rows(model, samples, 50) == rows
    free["bytes"] = 2**40
    assert answers.count_rows(model, samples, 50) == 256
    free["bytes"] = row
    assert answers.count_rows(model, samples, 50) == 1


def test_a_model_partly_outside_of_the_device_answers_alike_and_says_so(model, tokenizer, samples, capsys):
    outside = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(model.config.num_hidden_layers)}
    spread = load_base(
        str(TINY),
        False,
        place={
            "model.embed_tokens": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
            **outside,
        },
    )
    assert {weight.device.type for weight in spread.parameters()} == {"cpu", "meta"}
    found = generate_answers(spread, tokenizer, samples[:3], 64, 12, "spread")
    assert found == generate_answers(model, tokenizer, samples[:3], 64, 12, "whole")
    warn_if_spread(model)
    assert capsys.readouterr().err == ""
    warn_if_spread(spread)
    assert capsys.readouterr().err.startswith("warning: the 16-bit model is larger than the GPU's memory: ")


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_drawn_answers_are_as_likely_as_the_model_finds_them(attention):
    """Rows of several lengths share a beginning, which "blocks" computes once; each copy of a prompt draws for itself.

    The temperatures are low, as the probabilities of a small random model hardly differ.
    """
    small, prompts = make_adapted(attention).eval(), [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 30, 8, 7]]
    with torch.no_grad():
        alone = [small(input_ids=torch.tensor([prompt[3:]])).logits[0, -1] for prompt in prompts]
    for temperature in (0.1, 0.05):
        blind = [(each / temperature).softmax(dim=0) for each in alone]  # to the common beginning
        sampling = Sampling(temperature, torch.Generator().manual_seed(3))
        with torch.no_grad():
            answers = generate_tokens(small, [prompt for prompt in prompts for _ in range(2000)], [], 2, sampling)
            logits = [small(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        wanted = [(each / temperature).softmax(dim=0) for each in logits]
        assert max((a - b).abs().max() for a, b in zip(blind, wanted)) > 0.07
        assert len(answers) == 6000 and {len(answer) for answer in answers} == {2}
        for number, each in enumerate(wanted):
            drawn = torch.tensor([answer[0] for answer in answers[2000 * number : 2000 * (number + 1)]])
            found = drawn.bincount(minlength=61) / 2000
            assert (found - each).abs().max() < 0.035  # 3 deviations of a half


def test_the_same_numbers_draw_the_same_answers_and_cold_ones_are_greedy(model, tokenizer, samples):
    prompts, stops = [list(row.input_ids[: row.prompt_length]) for row in samples[:4]], [tokenizer.eos_token_id]
    twice = [prompt for prompt in prompts for _ in range(2)]
    with torch.inference_mode():
        greedy = generate_tokens(model, prompts, stops, 8)
        cold = generate_tokens(model, twice, stops, 8, Sampling(1e-4, torch.Generator()))
        same, again, other = (
            generate_tokens(model, twice, stops, 8, Sampling(1.0, torch.Generator().manual_seed(seed)))
            for seed in (1, 1, 2)
        )
    ended = [answer + stops if len(answer) < 8 else answer for answer in greedy]
    assert cold == [answer for answer in ended for _ in range(2)]
    assert same == again != other


def test_drawn_answers_for_which_memory_runs_out_are_drawn_in_smaller_batches(monkeypatch):
    small, tried, generate = make_adapted(), [], answers.generate_tokens

    def run_out(model, prompts, *more):
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("full")
        return generate(model, prompts, *more)

    monkeypatch.setattr(answers, "generate_tokens", run_out)
    sampling = Sampling(1e-4, torch.Generator().manual_seed(3))
    found = sample_answers(small, [], TRAIN[:2], 4, 5, sampling)
    assert tried == [8, 4, 2, 2, 4, 2, 2]
    for sample, group in zip(TRAIN, found):
        with torch.no_grad():
            assert group == generate(small, [sample.input_ids[:6]], [], 5) * 4  # at this temperature all are greedy
