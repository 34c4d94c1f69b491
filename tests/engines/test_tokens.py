"""Tokens that a base was made without get rows of their own, the same in every process."""

import pytest
import torch
from conftest import TINY
from small import make_qwen3
from transformers import AutoTokenizer

from tool_calling.engines.tokens import fit_vocabulary, start_row


@pytest.fixture
def more_tokens():
    """The embedded base's tokenizer with two tokens more."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<get_weather>", "</get_weather>"])
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_have_rows_and_the_others_keep_theirs(more_tokens, tied):
    size = len(more_tokens)
    models = [make_qwen3(tied) for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(size - 2, mean_resizing=False)
        torch.manual_seed(5)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(layer.weight)
    before = [models[0].get_input_embeddings().weight.clone(), models[0].get_output_embeddings().weight.clone()]
    first, second = (fit_vocabulary(model, more_tokens) for model in models)
    assert first is models[0] and first.config.vocab_size == size
    rows = [first.get_input_embeddings().weight, first.get_output_embeddings().weight]
    assert (rows[0] is rows[1]) == tied
    for row, old in zip(rows, before):
        assert torch.equal(row[:-2], old)
        words = more_tokens("get weather", add_special_tokens=False)["input_ids"]
        for new in row[-2:]:  # near the words it is made of, as long as others, and not the other tag
            away = new - old[words].mean(dim=0)
            assert away.norm().item() == pytest.approx(old[:1000].norm(dim=1).mean().item() / 2, rel=1e-5)
        assert (row[-2] - row[-1]).norm() > old[:1000].norm(dim=1).mean() / 2
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))


def test_a_base_with_more_rows_than_tokens_stays_as_it_is(more_tokens):
    model = make_qwen3()
    model.resize_token_embeddings(len(more_tokens) + 3, mean_resizing=False)
    embeddings = model.get_input_embeddings()
    assert fit_vocabulary(model, more_tokens) is model and model.get_input_embeddings() is embeddings


def test_a_token_without_words_starts_at_the_mean(tokenizer):
    rows = torch.arange(12.0).reshape(4, 3)
    row = start_row("<|>", tokenizer, rows)
    assert (row - rows.mean(dim=0)).norm().item() == pytest.approx(rows.norm(dim=1).mean().item() / 2)
    assert torch.equal(row, start_row("<|>", tokenizer, rows))
