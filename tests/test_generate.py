"""Answers: generation with a shared prefix writes what Transformers writes, and free exact match counts the same rows."""

import pytest
from conftest import ROOT, TINY, patch

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Reading, read_examples, split_examples
from tool_calling.engines.answers import generate_answers, generate_tokens
from tool_calling.engines.attention import attend_with_prefix
from tool_calling.engines.loading import load_adapter, load_base, warn_if_spread
from tool_calling.engines.losses import score_batches, to_metrics
from tool_calling.engines.start import quiet_libraries
from tool_calling.prompts import render_examples
from tool_calling.streams import build_padded, build_stream

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model():
    quiet_libraries()
    return load_base(str(TINY), load_in_4bit=False).eval()


@pytest.fixture(scope="module")
def samples(tokenizer):
    """Held-out rows of the bundled data, of which the embedded base gets some right."""
    args = script.parse_args(
        ["--dataset_path", str(ROOT / script.DATASET_PATH), "--tools_path", str(ROOT / script.TOOLS_PATH)]
    )
    _, held_out = split_examples(read_examples(args.dataset_path, Reading(args.tools_path))[0], 0.1)
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


def test_free_exact_match_is_that_of_generation_row_by_row(model, tokenizer, samples):
    args = script.parse_args(["--eval_batch_size", "16", "--max_new_tokens", "60"])
    answers = generate_answers(model, tokenizer, samples, args, "base")
    written = [answer == sample.completion for answer, sample in zip(answers, samples)]
    assert 3 <= sum(written) <= 13  # both verdicts occur

    def count(batches):
        return to_metrics(score_batches(model, batches, "transformers"))["exact_match"]

    assert [count([build_stream([row])]) for row in samples] == written
    for batches in (
        [build_stream(samples[:8]), build_stream(samples[8:])],
        [build_padded(samples[:9]), build_padded(samples[9:])],
    ):
        assert count(batches) == sum(written) / len(written)


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
        patch(monkeypatch, "HELD_SCORES", 1)  # one row at a time
        assert generate_tokens(model, prompts, [stop], 40) == alone
        strangers = [prompts[0], prompts[1][300:], prompts[2][5:]]  # nothing in common: no prefix, much padding
        assert generate_tokens(model, strangers, [stop], 12) == [
            write_alone(model, tokenizer, prompt, 12) for prompt in strangers
        ]


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
    args = script.parse_args(["--max_new_tokens", "12"])
    assert generate_answers(spread, tokenizer, samples[:3], args, "spread") == generate_answers(
        model, tokenizer, samples[:3], args, "whole"
    )
    warn_if_spread(model)
    assert capsys.readouterr().err == ""
    warn_if_spread(spread)
    assert capsys.readouterr().err.startswith("warning: the 16-bit model is larger than the GPU's memory: ")


def test_an_adapter_leaves_the_parts_of_its_base_where_they_are(tmp_path, samples, monkeypatch):
    """By what is free with the base already there, PEFT would find no room for it."""
    from peft import LoraConfig, get_peft_model

    trained = get_peft_model(
        load_base(str(TINY), False),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    trained.save_pretrained(tmp_path)
    ids = torch.tensor([samples[0].input_ids[:50]])
    expected = trained.eval()(ids).logits
    monkeypatch.setattr("peft.peft_model.infer_auto_device_map", lambda *_, **__: pytest.fail("spread anew"))
    for place in (
        None,
        {"": "cpu"},
        {
            "model.embed_tokens": "cpu",
            "model.layers": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    ):
        model = load_adapter(load_base(str(TINY), False, place=place), str(tmp_path)).eval()
        assert torch.equal(model(ids).logits, expected)


def test_grouped_query_attention_with_a_prefix_is_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    prefix_key, prefix_value = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(2))
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    got = attend_with_prefix(query, key, value, mask, 0.3, prefix_key, prefix_value)
    keys, values = (
        torch.cat([prefix.expand(3, -1, -1, -1), own], dim=2)
        for prefix, own in ((prefix_key, key), (prefix_value, value))
    )
    whole = torch.cat([torch.ones(3, 1, 5, 7, dtype=torch.bool), mask], dim=3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, whole, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))
