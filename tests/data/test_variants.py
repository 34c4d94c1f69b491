"""Variants of examples: other names that can be undone, lists that lack what they say, refusals, tools held out."""

import copy
import random
from collections import Counter

import pytest
from conftest import ALARM, WEATHER
from conversations import calls, says
from hypothesis import given, settings
from hypothesis import strategies as st

from tool_calling.data.examples import Example
from tool_calling.data.messages import check_calls
from tool_calling.data.tools import check_tools
from tool_calling.data.variants import (
    FOLDS,
    LISTS,
    REFUSAL,
    SHARES,
    Listing,
    Names,
    Variants,
    find_held_out,
    find_refusal,
    is_tree,
    leave_out,
    list_called,
    make_listings,
    make_names,
)
from tool_calling.terminal import UserError

KINDS = ",".join(SHARES)


def tool(name: str, description: str | None = "Does it.", **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": [*properties][:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def ask(text: str) -> dict:
    return {"role": "user", "content": text}


def call(*named: tuple, content: str = "", **more) -> dict:
    """Return an assistant's message with calls (name, arguments)."""
    called = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in named]
    return {"role": "assistant", "content": content, **more, "tool_calls": called}


def invert(names: Names) -> Names:
    """Return the names that undo these."""
    return Names(*({new: old for old, new in part.items()} for part in names))


def names(tools: list[dict]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


TAXI = tool(
    "book_taxi",
    "Book a taxi; not for find_train.",
    trip={
        "type": "object",
        "description": "Way",
        "properties": {"from_place": {"type": "string", "description": "Start"}, "to": {"type": "string"}},
        "required": ["from_place", "to"],
    },
    stops={
        "type": "array",
        "items": {"type": "object", "properties": {"at": {"type": "string", "description": "Hour"}}},
    },
    seats={"type": "integer", "maximum": 6},
)
NEW = Names(
    {"book_taxi": "do_ba", "search": "ka_ri"}, {"trip": "tu_le", "from_place": "mo_ni", "at": "zi_po", "seats": "ne_fa"}
)


# ----------------------------------------------------------------------------------------------------------------------
# Other names
# ----------------------------------------------------------------------------------------------------------------------
def test_names_change_where_a_description_is_left_and_order_and_rules_stay():
    assert NEW.rename_tool(TAXI)["function"] == {
        "name": "do_ba",
        "description": "Book a taxi; not for find_train.",
        "parameters": {
            "type": "object",
            "properties": {
                "tu_le": {
                    "type": "object",
                    "description": "Way",
                    "properties": {"mo_ni": {"type": "string", "description": "Start"}, "to": {"type": "string"}},
                    "required": ["mo_ni", "to"],
                },
                "stops": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"zi_po": {"type": "string", "description": "Hour"}}},
                },
                "seats": {"type": "integer", "maximum": 6},  # nothing else says what it is
            },
            "required": ["tu_le"],
        },
    }
    assert [*NEW.rename_tool(TAXI)["function"]["parameters"]["properties"]] == ["tu_le", "stops", "seats"]


def test_calls_of_the_whole_conversation_and_texts_follow():
    arguments = {"trip": {"to": "Rome", "from_place": "Oslo"}, "stops": [{"at": "6"}, {"else": 1}], "seats": 2}
    messages = [
        {"role": "system", "content": "Use book_taxi, not my_book_taxi; from_place is a street. Never search."},
        ask("search for a taxi"),
        call(
            ("book_taxi", arguments), ("other", {"trip": 1}), content="I call book_taxi", reasoning_content="book_taxi!"
        ),
        {"role": "tool", "content": "book_taxi: done"},
        says("Done."),
    ]
    example = Example("x:1", messages, [TAXI])
    before = copy.deepcopy(example)
    changed = Listing([NEW.rename_tool(TAXI)], NEW).apply(example)
    assert example == before and changed.source == "x:1"
    inner = {"tu_le": {"to": "Rome", "mo_ni": "Oslo"}, "stops": [{"zi_po": "6"}, {"else": 1}], "seats": 2}
    assert changed.messages == [
        {"role": "system", "content": "Use do_ba, not my_book_taxi; mo_ni is a street. Never search."},
        ask("search for a taxi"),
        call(("do_ba", inner), ("other", {"trip": 1}), content="I call do_ba", reasoning_content="do_ba!"),
        {"role": "tool", "content": "book_taxi: done"},
        says("Done."),
    ]
    assert [*changed.messages[2]["tool_calls"][0]["function"]["arguments"]["tu_le"]] == ["to", "mo_ni"]  # as written


@pytest.mark.parametrize(
    "schema, tree",
    [
        (None, True),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, True),
        (
            {"properties": {"a": {"pattern": "^\\d{2}$", "default": [], "enum": ["{"]}}, "additionalProperties": False},
            True,
        ),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, False),
        ({"properties": {"a": {}}, "dependentRequired": {"a": ["b"]}}, False),
        ({"properties": {"a": {"default": {"b": 1}}}}, False),
        ({"properties": {"a": {"enum": [1, {"b": 1}]}}}, False),
        ({"properties": {"a": {"oneOf": [{"properties": {"b": {}}}]}}}, False),
        ({"properties": {"a": {"items": [{}, {}]}}}, False),
        ({"$defs": {"a": {}}, "properties": {}}, False),
    ],
)
def test_parameters_keep_their_names_where_a_schema_names_them_in_other_places(schema, tree):
    assert is_tree(schema) is tree
    described = {"type": "object", "properties": {"b": {"type": "string", "description": "B"}}, **(schema or {})}
    given = {"type": "function", "function": {"name": "f_g", "description": "F", "parameters": described}}
    made = make_names([given], random.Random(1))
    assert [*made.tools] == ["f_g"]
    if not tree:
        assert made.parameters == {} and made.rename_tool(given)["function"]["parameters"] == described


def fill(schema: dict, rng: random.Random) -> object:
    """Return a value that fits a schema."""
    match schema:
        case {"enum": choices}:
            return rng.choice(choices)
        case {"type": "array", "items": items}:
            return [fill(items, rng) for _ in range(rng.randint(0, 2))]
        case {"type": "object", "properties": properties, "required": required}:
            given = [name for name in properties if name in required or rng.random() < 0.7]
            return {name: fill(properties[name], rng) for name in given}
    return {"string": "Oslo", "integer": 3, "number": 0.5, "boolean": True}[schema["type"]]


DESCRIPTIONS = st.sampled_from([None, "", "Time of day", "as get_weather has it, with day_of", "say"])
PARAMETERS = st.sampled_from("city day_of time maxItems x-y a type properties required".split())


def schemas(inner):
    """Return a strategy for schemas of parameters whose own parameters are of the strategy `inner`."""
    plain = [{"type": kind} for kind in ("string", "integer", "number", "boolean")] + [{"enum": ["a", "b"]}]
    objects = st.dictionaries(PARAMETERS, inner, max_size=3).map(to_object)
    parts = st.one_of(st.sampled_from(plain), objects, inner.map(lambda part: {"type": "array", "items": part}))
    return st.tuples(parts, DESCRIPTIONS).map(lambda pair: pair[0] | ({"description": pair[1]} if pair[1] else {}))


def to_object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": sorted(properties)[:1]}


OBJECTS = st.dictionaries(PARAMETERS, st.recursive(st.just({"type": "string"}), schemas, max_leaves=5), max_size=4)
TOOLS = st.lists(
    st.tuples(st.sampled_from("get_weather search setAlarm github.list-x say".split()), DESCRIPTIONS, OBJECTS),
    min_size=1,
    max_size=4,
    unique_by=lambda part: part[0],
)


@settings(max_examples=300, deadline=None)
@given(TOOLS, st.integers(0, 10**6))
def test_names_can_be_undone_and_calls_fit_their_schemas(parts, seed):
    """Renamed and renamed back, tools and messages are what they were; what is renamed is valid where it was."""
    rng = random.Random(seed)
    tools = [tool(name, text) | {} for name, text, _ in parts]
    for made, (_, _, properties) in zip(tools, parts):
        made["function"]["parameters"] = to_object(properties)
    named = [(made["function"]["name"], fill(made["function"]["parameters"], rng)) for made in tools]
    text = "get_weather of setAlarm, day_of say github.list-x."
    messages = [{"role": "system", "content": text}, ask("say it"), call(*named, content=text), says("x-y")]
    example = Example("x:1", messages, tools)
    new = make_names(tools, rng)
    assert len({*new.tools.values(), *new.parameters.values()}) == len(new.tools) + len(new.parameters)
    changed = Listing([*map(new.rename_tool, tools)], new).apply(example)
    old = invert(new)
    assert Listing([*map(old.rename_tool, changed.tools)], old).apply(changed) == example
    validators, problems = check_tools(changed.tools)
    assert problems == [] and check_calls(changed.messages, validators) == ([], [])
    assert new.tools.keys() == {name for name, described, _ in parts if described}
    assert not {*new.tools} & {*names(changed.tools)}


# ----------------------------------------------------------------------------------------------------------------------
# Lists
# ----------------------------------------------------------------------------------------------------------------------
EIGHT = [tool(f"tool_{letter}", f"Does {letter}.", **{letter: {"type": "string"}}) for letter in "abcdefgh"]


def test_lists_are_whole_or_lack_a_fold_and_every_second_one_has_other_names():
    made = make_listings(EIGHT, [], 7)
    assert len(made) == LISTS == 10 and [listing.names is not None for listing in made] == [False, True] * 5
    assert [len(listing.left_out) for listing in made] == [0, 0, *[2] * 8]
    folds = [made[number].left_out for number in (2, 4, 6, 8)]
    assert sorted(name for fold in folds for name in fold) == names(EIGHT) and len(folds) == FOLDS
    for listing in made:
        old = invert(listing.names) if listing.names else Names({}, {})
        undone = [*map(old.rename_tool, listing.tools)]
        assert sorted(names(undone)) == sorted({*names(EIGHT)} - listing.left_out) and not listing.added
        assert all(tool in EIGHT for tool in undone)
    assert len({str(names(listing.tools)) for listing in made}) == 10 and names(made[0].tools) != names(EIGHT)
    assert make_listings(EIGHT, [], 7) == made and make_listings(EIGHT, [], 8) != made


def test_tools_of_other_rows_come_into_whole_lists_alone():
    """A refusal might be wrong with another tool in the list; and a name is in a list once."""
    made = make_listings(EIGHT, [WEATHER, ALARM, tool("tool_a", "Other.")], 7)
    assert [listing.added for listing in made] == [True, True] + [False] * 8
    assert [len(listing.tools) for listing in made[:2]] == [10, 10]
    assert {*names(made[0].tools)} == {*names(EIGHT), "get_weather", "set_alarm"}


# ----------------------------------------------------------------------------------------------------------------------
# What becomes of rows
# ----------------------------------------------------------------------------------------------------------------------
def make_rows(count: int, tools=tuple(EIGHT)) -> list[Example]:
    """Return rows of which each calls one of the tools, but for every tenth, which calls none."""
    tools, rows = [*tools], []
    for number in range(count):
        letter = names(tools)[number % len(tools)][-1]
        answer = call((f"tool_{letter}", {letter: "x"})) if number % 10 else says("Hello!")
        rows.append(Example(f"x:{number}", [ask(f"request {number}"), answer], tools))
    return rows


def test_rows_are_drawn_by_shares_and_each_edition_anew():
    rows = make_rows(2000)
    variants = Variants(rows, KINDS, 7)
    made = [[variants.vary(row, edition) for row in rows] for edition in (0, 1)]
    shares = Counter(changed.kind for changed in made[0] if changed)
    # A tenth of the rows refuses nothing; the others are as many as said, by four deviations.
    assert {kind: round(count / 2000, 2) for kind, count in shares.items()} == {
        "missing": pytest.approx(0.9 * SHARES["missing"], abs=0.03),
        "shuffled": pytest.approx(SHARES["shuffled"], abs=0.04),
        "masked": pytest.approx(SHARES["masked"], abs=0.04),
    }
    assert made[0] != made[1] and [variants.vary(row, 0) for row in rows] == made[0]
    again = Variants([*reversed(rows)], KINDS, 7)
    assert [again.vary(row, 0) for row in rows] == made[0]  # neither order nor other rows matter
    assert [Variants(rows, KINDS, 8).vary(row, 0) for row in rows] != made[0]
    lists = {str(names(changed.example.tools)) for changed in [*made[0], *made[1]] if changed}
    assert len(lists) == 2 * LISTS  # each edition has others
    masked = Variants(rows, "masked", 7)
    assert {changed.kind for row in rows if (changed := masked.vary(row, 0))} == {"masked"}


def test_each_variant_has_the_answer_that_its_list_asks_for():
    rows = make_rows(500)
    variants, seen = Variants(rows, KINDS, 7), Counter()
    for row in rows:
        changed = variants.vary(row, 0)
        if not changed:
            continue
        (request, answer), kept = changed.example.messages, {*names(changed.example.tools)}
        seen[changed.kind] += 1
        assert request == row.messages[0] and changed.example.source == row.source
        if changed.kind == "missing":
            assert (answer, changed.turn) == ({"role": "assistant", "content": REFUSAL}, 1)
            assert kept and not kept & list_called(row.messages)
        elif changed.kind == "shuffled":
            assert answer == row.messages[1] and list_called(row.messages) <= kept < {*names(EIGHT), ""}
            assert list_called(row.messages) or len(kept) == 8  # with fewer tools, another answer might be right
        else:
            assert list_called([answer]) <= kept and not kept & {*names(EIGHT)}
        assert check_calls([answer], check_tools(changed.example.tools)[0]) == ([], [])
    assert min(seen.values()) > 20


def vary_all(example: Example, kinds: str = KINDS) -> set[str]:
    """Return the kinds of variants that an example gets in many editions."""
    variants = Variants([example], kinds, 7)
    return {changed.kind for edition in range(100) if (changed := variants.vary(example, edition))}


def test_a_turn_refuses_if_nothing_before_it_calls_its_tool():
    chat = [
        ask("a, then b"),
        call(("tool_a", {"a": "1"})),
        {"role": "tool", "content": "ok"},
        call(("tool_b", {"b": "2"})),
        {"role": "tool", "content": "ok"},
        says("Done."),
    ]
    variants = Variants([Example("x:1", chat, EIGHT)], "missing", 7)
    changed = next(filter(None, (variants.vary(Example("x:1", chat, EIGHT), edition) for edition in range(100))))
    assert changed.turn == 1 and changed.example.messages == [chat[0], {"role": "assistant", "content": REFUSAL}]
    again = [*chat[:4], {"role": "tool", "content": "ok"}, call(("tool_a", {"a": "2"}))]
    again[1] = {**again[1], "weight": 0}
    again[3] = call(("tool_a", {"a": "2"}))
    assert vary_all(Example("x:1", again, EIGHT)) == {"shuffled", "masked"}


def test_rows_that_no_variant_fits_stay_as_they_are():
    plain, thinks = call(("tool_a", {"a": "1"})), call(("tool_a", {"a": "1"}), reasoning_content="I need tool_a.")
    assert vary_all(Example("x:1", [ask("a"), plain], EIGHT)) == {*SHARES}
    assert vary_all(Example("x:1", [ask("a"), thinks], EIGHT)) == {"shuffled", "masked"}  # no reasoning is made up
    assert vary_all(Example("x:1", [ask("a"), plain], EIGHT[:1])) == {"masked"}  # nothing would be left
    assert vary_all(Example("x:1", [ask("hi"), says("Hi!")], [])) == set()
    bare = [tool("tool_a", None, a={"type": "string"}), tool("tool_b", None)]
    assert vary_all(Example("x:1", [ask("a"), plain], bare)) == {"missing", "shuffled"}  # nothing to read but names
    word = [tool("search", "Finds.", q={"type": "string"}), *EIGHT]
    found = call(("search", {"q": "1"}), content="I search.")
    assert vary_all(Example("x:1", [ask("a"), found], word)) == {"missing", "shuffled"}
    assert vary_all(Example("x:1", [ask("a"), call(("tool_a", {"a": 1}))], EIGHT)) == {"missing"}  # --on_invalid keep


# ----------------------------------------------------------------------------------------------------------------------
# Refusals, and tools held out
# ----------------------------------------------------------------------------------------------------------------------
def refusals(*texts: str, tools=tuple(EIGHT)) -> list[Example]:
    return [Example(f"x:{number}", [ask(str(number)), says(text)], [*tools]) for number, text in enumerate(texts)]


def test_a_refusal_is_the_rows_own_if_most_refuse_alike():
    own = "Das geht nicht, I cannot do that."
    assert find_refusal(refusals(own, own, "Sorry, I can't sing.", "Hello!", "Hello!", "Hello!")) == (own, True)
    assert find_refusal(refusals(own, "Sorry, I can't sing.")) == (REFUSAL, False)  # "can't sing" is no answer to all
    assert find_refusal(refusals("Hello!", "Hello!")) == find_refusal([]) == (REFUSAL, False)
    assert find_refusal(refusals(own, own, tools=())) == (REFUSAL, False)
    asked = [ask("a"), call(("tool_a", {"a": "1"})), {"role": "tool", "content": "no"}, says(own)]
    assert find_refusal([Example("x:1", asked, EIGHT)]) == (REFUSAL, False)  # what it refuses is another matter


def test_tools_to_hold_out_are_called_by_rows_and_leave_some():
    rows = make_rows(100)
    assert find_held_out(rows, "tool_b,tool_a") == ["tool_b", "tool_a"]
    auto = find_held_out(rows, "auto")
    assert len(auto) == 2 and auto == sorted(auto) == find_held_out([*reversed(rows)], "auto")
    for wanted, text in (
        ("tool_x", "--holdout_tools tool_x: no row calls it; did you mean tool_h?"),
        ("tool_a,nothing", "--holdout_tools nothing: no row calls it"),
    ):
        with pytest.raises(UserError) as error:
            find_held_out(rows, wanted)
        assert str(error.value) == text
    one = [Example("x:1", [ask("rain?"), calls("Rome")], [WEATHER])]
    for wanted in ("auto", "get_weather"):
        with pytest.raises(
            UserError, match=f"^--holdout_tools {wanted}: each row calls one of them; no row is left to "
        ):
            find_held_out(one, wanted)


def test_lists_lose_the_tools_held_out_and_are_shared_still():
    rows = [*make_rows(3), Example("x:3", [ask("a"), says("b")], [WEATHER])]
    changed = leave_out(rows, ["tool_a", "tool_c"])
    assert [names(row.tools) for row in changed[:3]] == [
        ["tool_b", "tool_d", "tool_e", "tool_f", "tool_g", "tool_h"]
    ] * 3
    assert changed[0].tools is changed[2].tools and changed[3] is not rows[3] and changed[3] == rows[3]
    assert len(rows[0].tools) == 8 and [row.messages for row in changed] == [row.messages for row in rows]
