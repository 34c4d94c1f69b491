"""The split: exact, independent of the order of the file, a prompt on one side only."""

import random

import pytest
from conftest import ALARM, WEATHER

from tool_calling.data.examples import Example
from tool_calling.data.splits import (
    digest_prompts,
    find_first_answer,
    find_leaks,
    find_warnings,
    is_thinking,
    split_examples,
    split_folds,
)


def example(request: str, answer: str = "ok") -> Example:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return Example(f"x:{request}", messages, [])


def requests(examples) -> set[str]:
    return {example.messages[0]["content"] for example in examples}


def test_split_is_exact_and_independent_of_order():
    examples = [example(f"request {i}") for i in range(200)]
    train, held_out = split_examples(examples, 0.1)
    assert (len(train), len(held_out)) == (180, 20)
    shuffled = random.Random(0).sample(examples, len(examples))
    again = split_examples(shuffled, 0.1)
    assert (requests(again[0]), requests(again[1])) == (requests(train), requests(held_out))
    assert [e.source for e in train] == [e.source for e in examples if e in train]  # file order is kept


def test_both_sides_keep_the_order_of_the_file_also_where_prompts_repeat():
    examples = [example(f"request {i % 20}", f"answer {i}") for i in range(60)]
    for side in split_examples(examples, 0.3):
        assert side and side == [example for example in examples if example in side]


def test_one_prompt_is_never_on_both_sides():
    examples = [example(f"request {i % 50}", f"answer {i}") for i in range(200)]
    train, held_out = split_examples(examples, 0.25)
    assert len(held_out) in range(47, 51) and len(train) + len(held_out) == 200
    assert not requests(train) & requests(held_out)


def test_appended_rows_move_few_others():
    examples = [example(f"request {i}") for i in range(1000)]
    before = requests(split_examples(examples[:900], 0.1)[1])
    after = requests(split_examples(examples, 0.1)[1])
    assert len(before - after) <= 15  # of 90; chance alone would move 81


def test_equal_requests_are_in_one_fold_and_folds_are_of_one_size():
    examples = [example(f"request {i % 50}", f"answer {i}") for i in range(200)]
    folds = split_folds(examples, 3)
    assert [folds.count(fold) for fold in range(3)] == [68, 68, 64]
    assert folds[:50] == folds[50:100] == folds[100:150] == folds[150:]
    shuffled = random.Random(0).sample(range(200), 200)
    assert split_folds([examples[i] for i in shuffled], 3) == [folds[i] for i in shuffled]
    assert split_folds([example("a"), example("a")], 2) == [0, 0]


def test_nothing_is_held_out_at_zero():
    assert split_examples([example("a"), example("b")], 0.0) == ([example("a"), example("b")], [])


def test_the_same_request_with_other_tools_is_another_request():
    one, other = example("rain?")._replace(tools=[WEATHER]), example("rain?")._replace(source="y:1", tools=[ALARM])
    assert find_leaks([one], [other]) == [] and len({*digest_prompts([one, other, example("rain?")])}) == 3
    same = example("rain?", "another answer")._replace(source="y:2", tools=[dict(reversed(WEATHER.items()))])
    assert find_leaks([one, same, one], [same, other]) == [("y:2", "x:rain?")]  # the first place in training


def test_a_row_that_is_taken_twice_stays_on_one_side():
    examples = [example(f"request {i % 100}") for i in range(200)]
    train, held_out = split_examples(examples, 0.1)
    assert (len(train), len(held_out)) == (180, 20) and not requests(train) & requests(held_out)


GREETING, ASK, SAYS = ({"role": role, "content": "x"} for role in ("assistant", "user", "assistant"))


@pytest.mark.parametrize(
    "messages, first",
    [
        ([ASK, SAYS], 1),
        ([{"role": "system", "content": "x"}, ASK, SAYS, ASK, SAYS], 2),
        ([GREETING, ASK, SAYS], 2),
        ([GREETING], 0),
        ([GREETING, ASK], 0),
        ([{"role": "system", "content": "x"}, GREETING], 1),
    ],
)
def test_the_request_ends_at_the_first_answer_to_a_user(messages, first):
    assert find_first_answer(Example("x:1", messages, [])) == first


def test_rows_that_begin_with_a_greeting_are_held_out_by_what_the_user_says():
    hello = {"role": "assistant", "content": "Hello!"}
    examples = [Example(f"x:{i}", [hello, *example(f"request {i}").messages], []) for i in range(100)]
    assert [*map(len, split_examples(examples, 0.1))] == [90, 10]


def thinking(count: int, total: int) -> list[Example]:
    """Rows of which `count` have reasoning in a trained answer, and each in a turn of weight 0."""
    dropped = {"role": "assistant", "content": "x", "reasoning_content": "Hm.", "weight": 0}
    rows = [[ASK, dropped, ASK, {**SAYS, "reasoning_content": "Hm."} if i < count else SAYS] for i in range(total)]
    return [Example(f"x:{i}", messages, []) for i, messages in enumerate(rows)]


@pytest.mark.parametrize(
    "count, served", [(0, None), (1, "without"), (19, "without"), (20, "with"), (39, "with"), (40, None)]
)
def test_a_mix_of_reasoning_is_counted_and_served_as_most_rows_are_trained(count, served):
    examples = thinking(count, 40)
    assert is_thinking(examples) == (count >= 20)
    assert find_warnings(examples, []) == [
        f"{count} of 40 rows have reasoning: the model is served {served} it, as most rows are trained; --thinking off "
        "drops it, --thinking on requires it"
    ] * (served is not None)
