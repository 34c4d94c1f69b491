"""Rows of logs, tables and data sets in rarer shapes: each word is trained, or a line says that it is not."""

import json

import pytest
from conftest import WEATHER
from format_cases import BARE, REPLY, TOOLS, USER, YES, calls, read

from tool_calling.data.examples import Reading, to_examples, write_converted
from tool_calling.data.rows import read_file
from tool_calling.terminal import UserError

WRONG = {"role": "assistant", "content": "A WRONG ANSWER"}
SYSTEM = {"role": "system", "content": "Be brief."}
PING = {
    "type": "function",
    "function": {
        "name": "ping",
        "description": "Pong.",
        "parameters": {"type": "object", "properties": {"host": {"type": "string"}}},
    },
}


def seen(row: dict) -> tuple[list[dict], list[dict], dict, set]:
    """(messages, tools, what was normalised in the row, what was not read) of a row without a problem."""
    checked = to_examples([("x:1", row)], Reading("no/such/tools.json"))
    assert checked.problems == []
    example = checked.examples[0]
    changes = {change: count for change, count in checked.changes.items() if change in checked.first}
    return example.messages, example.tools, changes, set(checked.unread)


# -- Loss flags around turns ------------------------------------------------------------------------------------------

CALLED = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"town": 1}'}
FAILED = {"type": "function_call_output", "call_id": "c", "output": "error"}


@pytest.mark.parametrize("flags", [({"weight": 0}, {}), ({"train": False}, {}), ({}, {"loss_mask": [0, 1]})])
def test_a_flag_around_a_turn_of_langchain_or_an_item_is_its_flag(flags):
    mine, masks = flags
    kwargs = {"lc": 1, "type": "constructor"}
    for turns in (
        [{"type": "ai", "data": {"content": "A WRONG ANSWER"}, **mine}, {"type": "ai", "data": {"content": "Yes."}}],
        [
            {**kwargs, "id": ["messages", "AIMessage"], "kwargs": {"content": "A WRONG ANSWER"}, **mine},
            {**kwargs, "id": ["messages", "AIMessage"], "kwargs": {"content": "Yes."}},
        ],
    ):
        row = {"messages": [{"type": "human", "data": USER}, turns[0], USER, turns[1]], **masks}
        assert seen(row)[0] == [USER, {**WRONG, "weight": 0}, USER, YES]
    row = {"input": [USER, {**CALLED, **mine}, FAILED, {"type": "message", **YES}], "tools": TOOLS, **masks}
    call = {"name": "get_weather", "arguments": {"town": 1}}
    wrong = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": call}]}
    assert seen(row)[0][1] == {**wrong, "weight": 0}


# -- Answers and system texts beside the turns ------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["Yes.", "<think>so</think>Yes.", f"<TOOLCALL>[{json.dumps(BARE)}]</TOOLCALL>"])
def test_a_text_is_the_answer_to_a_list_of_turns(answer):
    """As Nemotron writes them: nothing but the last answer was lost, and the earlier one trained alone."""
    row = {"input": [USER, WRONG, USER], "output": answer, "system_prompt": "Be brief."}
    if "TOOLCALL" in answer:
        row["output"] = '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>'
        row["tools"] = TOOLS
        expected = calls("Rome")
    else:
        expected = {**YES, **({"reasoning_content": "so"} if "think" in answer else {})}
    messages, _, _, unread = seen(row)
    assert (messages, unread) == ([SYSTEM, USER, WRONG, USER, expected], set())


def test_an_answer_of_items_may_be_json_text():
    row = {"input": "rain in Rome?", "output": [{"type": "message", **YES}]}
    assert seen(row)[0] == [USER, YES]
    assert seen({"input": [USER], "output": json.dumps(row["output"])})[0] == [USER, YES]
    assert seen({"input": [USER], "output": "[1] says so."})[0] == [USER, {**YES, "content": "[1] says so."}]


@pytest.mark.parametrize("key", ["system_prompt", "system_message"])
def test_a_system_text_of_another_name_is_read_where_there_is_none(key):
    for row in ({"question": "rain in Rome?", "response": "Yes."}, {"messages": [USER, YES]}):
        assert seen({**row, key: "Be brief."})[0::3] == ([SYSTEM, USER, YES], set())
    other = {"role": "system", "content": "Be kind."}
    assert seen({"messages": [other, USER, YES], key: "x"})[0::3] == ([other, USER, YES], {("row", key)})


def test_an_empty_system_text_says_nothing():
    for content in ("", None, " "):
        messages, _, changes, _ = seen({"messages": [{"role": "system", "content": content}, USER, YES]})
        assert (messages, changes) == ([USER, YES], {"empty system text dropped": 1})


# -- Tools inside of objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, unread",
    [
        ({"extra": {"invocation_params": {"tools": TOOLS}}}, set()),
        ({"metadata": json.dumps({"tools": [WEATHER], "k": 1})}, {("row", "metadata.k")}),
        (
            {"chat_template_kwargs": {"xml_tools": [json.dumps(BARE)], "custom_instructions": "Be kind."}},
            {("row", "chat_template_kwargs.custom_instructions")},
        ),
    ],
)
def test_tools_are_read_inside_of_objects_and_what_stands_beside_them_is_named(more, unread):
    for turn in (calls("Rome"), YES):
        messages, tools, _, found = seen({"messages": [USER, turn], **more})
        assert (messages, tools, found) == ([USER, turn], [WEATHER], unread)


# -- Tables in which every object has the keys of all -----------------------------------------------------------------


def test_a_null_of_a_table_hides_nothing():
    nulls = {"messages": None, "conversations": None, "query": None, "answers": None, "input": None, "output": None}
    turns = [{"from": None, "value": None, **turn, "function_call": None} for turn in (USER, YES)]
    assert seen({**nulls, "messages": turns})[0] == [USER, YES]
    turns = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Yes."}]
    turns = [{"role": None, "content": None, **turn} for turn in turns]
    assert seen({**nulls, "conversations": turns})[0] == [USER, YES]
    assert seen({**nulls, "input": "rain in Rome?", "output": {"content": "Yes."}, "tools": []})[0] == [USER, YES]
    for nothing in (None, ""):
        turn = {**YES, "function_call": {"name": nothing, "arguments": nothing}}
        assert seen({"messages": [USER, turn]})[0] == [USER, YES]


# -- Calls with other keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["params", "kwargs", "tool_input", "tool_args"])
def test_arguments_of_another_name_are_arguments(key):
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "get_weather", key: {"city": "Rome"}}]}]}
    assert seen({**row, "tools": TOOLS})[0] == [USER, calls("Rome")]
    beside = {"type": "function", "function": {"name": "get_weather"}, key: {"city": "Rome"}}
    row["messages"][1]["tool_calls"] = [beside]
    assert seen({**row, "tools": TOOLS})[0] == [USER, calls("Rome")]


def test_arguments_that_are_not_read_are_no_empty_arguments():
    expected = ['call "ping": has "host" and no arguments; expected them in "arguments"']
    call = {"name": "ping", "host": "x"}
    for turn in ({"tool_calls": [call]}, {"content": f"<tool_call>{json.dumps(call)}</tool_call>"}):
        assert read({"messages": [USER, {"role": "assistant", **turn}], "tools": [PING]})[1] == expected


def test_what_a_call_holds_beside_its_arguments_is_counted():
    call = {"name": "ping", "arguments": {}, "result": "pong", "index": 0, "id": "c", "type": "tool_call"}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [PING]}
    assert seen(row)[2] == {"result of a call -> dropped": 1}


def test_text_after_a_call_is_counted():
    text = f"I look.\n<tool_call>{json.dumps({'name': 'ping', 'arguments': {}})}</tool_call>\nOne moment."
    parts = [{"type": "tool_use", "name": "ping", "input": {}}, {"type": "text", "text": "One moment."}]
    for content, said in ((text, "I look.\nOne moment."), (parts, "One moment.")):
        row = {"messages": [USER, {"role": "assistant", "content": content}], "tools": [PING]}
        messages, _, changes, _ = seen(row)
        assert messages[1]["content"] == said
        assert changes["text after a call -> before it"] == 1


# -- Replies and reasoning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        {"type": "celsius", "value": 21},
        {"type": "city", "name": "Rome"},
        [{"type": "file", "name": "a.txt"}, {"type": "hotel", "name": "B"}],
    ],
)
def test_a_reply_that_has_a_type_of_its_own_is_json(reply):
    row = {"messages": [USER, calls("Rome"), {**REPLY, "content": reply}, YES], "tools": TOOLS}
    assert seen(row)[0][2] == {"role": "tool", "content": json.dumps(reply)}
    wrapped = {"type": "json", "value": reply}
    assert seen({**row, "messages": [USER, calls("Rome"), {**REPLY, "content": wrapped}, YES]})[0] == seen(row)[0]


def test_reasoning_is_read_where_it_stands():
    summary = [{"type": "summary_text", "text": "short"}]
    whole = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]}
    for thought in ({**whole, "summary": []}, {**whole, "summary": summary}):
        row = {"input": [USER, thought, {"type": "message", **YES}]}
        assert seen(row)[0] == [USER, {**YES, "reasoning_content": "so"}]
    row = {"input": [USER, {"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"type": "message", **YES}]}
    assert seen(row)[0] == [USER, YES]
    turn = {"type": "ai", "content": "Yes.", "additional_kwargs": {"reasoning_content": "so"}}
    assert seen({"messages": [{"type": "human", "content": USER["content"]}, turn]})[0] == [
        USER,
        {**YES, "reasoning_content": "so"},
    ]


# -- Tables of text ---------------------------------------------------------------------------------------------------


def test_a_python_value_that_is_an_answer_stays_as_it_is(tmp_path):
    """As in rows that teach Python; turns and calls are read."""
    path = tmp_path / "rows.csv"
    cells = ["['a', 'b']", "{'a': 1}", "{'function_call': {'name': 'f', 'arguments': {}}}"]
    path.write_text("input,output\n" + "".join(f'x,"{cell}"\n' for cell in cells))
    expected = [*cells[:2], '{"function_call": {"name": "f", "arguments": {}}}']
    assert [row["output"] for _, row in read_file(str(path))] == expected


@pytest.mark.parametrize("tag", ["tool_calls", "function_calls", "execute", "minimax:tool_call"])
def test_tags_around_calls_leave_nothing_in_the_text(tag):
    invoked = '<invoke name="get_weather"><parameter name="city">Rome</parameter></invoke>'
    for call in ('[{"name": "get_weather", "arguments": {"city": "Rome"}}]', "\nget_weather(city='Rome')\n", invoked):
        turn = {"role": "assistant", "content": f"I look.\n<{tag}>{call}</{tag}>"}
        messages, _, changes, _ = seen({"messages": [USER, turn], "tools": TOOLS})
        assert messages[1] == {**calls("Rome"), "content": "I look."}
        assert "text after a call -> before it" not in changes


# -- Answers beside turns, flags of tables, tools of Python -----------------------------------------------------------


@pytest.mark.parametrize("key", ["answer", "response", "completion", "output"])
def test_an_answer_beside_turns_that_end_with_a_question_is_their_last(key):
    for turns in ([USER], [USER, WRONG, USER]):
        for answer in ("Yes.", [YES], YES) if key != "output" else ("Yes.", [YES]):
            messages, _, changes, unread = seen({"messages": turns, key: answer})
            assert (messages, unread) == ([*turns, YES], set())
            assert changes == {f"{key} beside the turns -> last turn": 1}
    assert seen({"messages": [USER, YES], key: "42"})[0::3] == ([USER, YES], {("row", key)})
    messages, _, changes, unread = seen({"messages": [USER, YES, USER], key: ["Yes.", "No."]})
    assert (messages, unread) == ([USER, YES], {("row", key)})


@pytest.mark.parametrize("text", ["0", "false", "False"])
def test_a_flag_of_a_table_of_text_is_read(text):
    talk = json.dumps([USER, WRONG, USER, YES])
    assert read({"messages": talk, "weight": text})[1] == ["no turn is trained; every weight is 0"]
    for mask in (f"[{text}, 1]", f"[null,{text},null, true ]"):
        assert seen({"messages": talk, "loss_mask": mask})[0] == [USER, {**WRONG, "weight": 0}, USER, YES]
    assert seen({"messages": talk, "train": "v1"})[3] == {("row", "train")}


def test_tools_that_python_wrote_into_a_system_text_are_read():
    """As ToolBench does."""
    action = 'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Rome"}'
    system = {"from": "system", "value": f"Be brief.\nYou have access to the following APIs: {[BARE]}"}
    turns = [system, {"from": "user", "value": USER["content"]}, {"from": "assistant", "value": action}]
    messages, tools, _, _ = seen({"conversations": turns})
    assert (messages, tools) == ([SYSTEM, USER, {**calls("Rome"), "content": "Thought: I look."}], [WEATHER])
    turns[2]["value"] = "Yes."
    assert seen({"conversations": turns})[:2] == ([SYSTEM, USER, YES], [WEATHER])
    for text in ("A list is [{'name': 'a'}].", "[{'name': 'a'"):
        turns[0]["value"] = text
        assert seen({"conversations": turns})[:2] == ([{"role": "system", "content": text}, USER, YES], [])


@pytest.mark.parametrize("layout", ["\n%s\n%s\n", "```json\n%s\n%s\n```", "[%s, %s]", "%s; %s"])
def test_several_calls_between_one_pair_of_tags_are_read(layout):
    text = layout % tuple(json.dumps({"name": "get_weather", "arguments": {"city": city}}) for city in ("Rome", "Oslo"))
    turn = {"role": "assistant", "content": f"<tool_call>{text}</tool_call>"}
    assert seen({"messages": [USER, turn], "tools": TOOLS})[0] == [USER, calls("Rome", "Oslo")]


def test_a_trace_of_bedrock_is_read():
    spec = {"name": BARE["name"], "description": BARE["description"], "inputSchema": {"json": BARE["parameters"]}}
    use = {"toolUse": {"toolUseId": "c", "name": "get_weather", "input": {"city": "Rome"}}}
    result = {"toolResult": {"toolUseId": "c", "content": [{"text": "3"}], "status": "success"}}
    row = {
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": USER["content"]}]},
            {"role": "assistant", "content": [{"text": "I look."}, use]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": [{"text": "Yes."}]},
        ],
        "toolConfig": {"tools": [{"toolSpec": spec}]},
    }
    call = {**calls("Rome")["tool_calls"][0], "id": "c"}
    made = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    reply = {"role": "tool", "tool_call_id": "c", "content": "3"}
    assert seen(row)[:2] == ([SYSTEM, USER, made, reply, YES], [WEATHER])


# -- System texts of public data --------------------------------------------------------------------------------------

ASKED = (
    "You are an expert in composing functions. You are given a question and a set of possible functions. \n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the purpose. \n"
    "If none of the functions can be used, point it out%s. \n"
    "If the given question lacks the parameters required by the function,%salso point it out.%s"
)
TOOLACE = ASKED % (
    "",
    "\n",
    " You should only return the function call in tools call sections.\n"
    f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([BARE])}. \n"
    "Should you decide to return the function call(s). \n"
    "Put it in the format of [func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
    "NO other text MUST be included. \n",
)
SMOLTALK = ASKED % (
    " and refuse to answer",
    " ",
    f"\n\nYou have access to the following tools:\n<tools>{json.dumps([BARE])}</tools>\n\n"
    "The output MUST strictly adhere to the following format, and NO other text MUST be included.\n"
    "The example format is as follows. Please make sure the parameter type is correct. "
    "If no function call is needed, please make the tool calls an empty list '[]'.\n<tool_call>[\n"
    '{"name": "func_name1", "arguments": {"argument1": "value1"}},\n... (more tool calls as required)\n]</tool_call>',
)


@pytest.mark.parametrize(
    "system, text",
    [
        (TOOLACE, "[get_weather(city='Rome')]"),
        (SMOLTALK, '<tool_call>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</tool_call>'),
    ],
)
def test_of_a_public_system_text_no_half_sentence_is_left(system, text):
    for own in ("", "\nBe brief."):
        turns = [{**SYSTEM, "content": system + own}, USER, {"role": "assistant", "content": text}]
        messages, tools, changes, _ = seen({"messages": turns})
        assert (messages, tools) == ([*([SYSTEM] if own else []), USER, calls("Rome")], [WEATHER])
        rest = len("Be brief.") if own else 0
        assert changes["system text on calls cut: characters"] == len(system + own) - len(json.dumps([BARE])) - rest


def test_a_cut_ends_where_another_sentence_begins():
    system = f"Be brief. Call: {json.dumps([BARE])} Be kind."
    messages, tools, _, _ = seen({"messages": [{**SYSTEM, "content": system}, USER, YES]})
    assert (messages, tools) == ([{**SYSTEM, "content": "Be brief.\nBe kind."}, USER, YES], [WEATHER])


# -- Parts and turns with more keys -----------------------------------------------------------------------------------


def test_a_text_part_may_say_more_than_its_text():
    more = {"state": "done", "index": 0, "id": "t", "providerMetadata": {"x": 1}, "extras": {"signature": "x"}}
    for key in ("parts", "content"):
        turn = {"role": "assistant", key: [{"type": "step-start"}, {"type": "text", "text": "Yes.", **more}]}
        assert seen({"messages": [USER, turn]})[0] == [USER, YES]
    expected = 'message 2 (assistant): content must be text, got [{"type": "image", "url": "x"}]'
    parts = [{"type": "image", "url": "x"}]
    assert read({"messages": [USER, {"role": "assistant", "parts": parts}]})[1] == [expected]


def test_a_call_that_langchain_could_not_read_is_named():
    turn = {"type": "ai", "content": "Yes.", "invalid_tool_calls": [{"name": "f", "args": "{"}]}
    assert seen({"messages": [USER, turn]})[0::3] == ([USER, YES], {("turn", "invalid_tool_calls")})


def test_a_history_may_be_json_text():
    row = {"instruction": "rain in Rome?", "output": "Yes.", "history": '[["a", "b"]]'}
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert seen(row)[0] == [*history, USER, YES]


# -- Nothing, as tables and other languages write it ------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], "[]", "null", " "])
def test_an_empty_list_of_arguments_is_none(arguments):
    """As PHP writes an empty object."""
    call = {"function": {"name": "ping", "arguments": arguments}}
    messages, _, changes, _ = seen({"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [PING]})
    assert messages[1]["tool_calls"][0]["function"] == {"name": "ping", "arguments": {}}
    assert changes == {"call without arguments -> {}": 1}


@pytest.mark.parametrize("nothing", ["null", "None", "nan", "", "[]", None])
def test_a_text_that_says_null_is_no_list_of_tools(nothing):
    assert seen({"messages": [USER, YES], "tools": nothing})[:2] == ([USER, YES], [])


def test_what_langchain_keeps_inside_of_a_turn_is_named_too():
    turn = {"type": "ai", "data": {"content": "Yes.", "note": "x"}, "more": 1}
    assert seen({"messages": [{"type": "human", "data": USER}, turn]})[3] == {("turn", "note"), ("turn", "more")}


# -- Schemas under other keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["args_schema", "schema", "args", "properties"])
def test_the_schema_of_a_tool_is_read_where_it_stands(key):
    schema = {"type": "object", "properties": {"host": {"type": "string"}}, "required": ["host"]}
    flat = key in ("args", "properties")
    tool = {"name": "ping", "description": "Pong.", key: schema["properties"] if flat else schema}
    messages, tools, _, _ = seen({"messages": [USER, YES], "tools": [tool]})
    assert tools == [{"type": "function", "function": {**PING["function"], "parameters": schema}}]


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.jsonl.gz"])
def test_rows_are_written_under_no_name_that_they_are_not(tmp_path, name):
    with pytest.raises(UserError) as error:
        write_converted(str(tmp_path / name), ["no/such.jsonl"], Reading("no/such/tools.json"))
    expected = "is written as JSONL; expected a name that ends with .jsonl"
    assert str(error.value) == f"--convert_to {tmp_path / name}: {expected}"


@pytest.mark.parametrize("before", ["functools", "Action:\n", "Action:\n```json\n", "Action:\n```\n"])
def test_a_word_before_calls_in_json_is_no_text(before):
    """As Phi-4 and LangChain's agents write them."""
    call = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    call = f"[{call}]" if before == "functools" else call
    content = f"Thought: I look.\n{before}{call}" + ("\n```" if "`" in before else "")
    messages = seen({"messages": [USER, {"role": "assistant", "content": content}], "tools": TOOLS})[0]
    assert messages == [USER, {**calls("Rome"), "content": "Thought: I look."}]


def test_flags_of_a_row_are_for_what_stands_beside_its_turns_too():
    row = {"messages": [USER, WRONG, USER], "answer": "Yes.", "system_prompt": "Be brief."}
    expected = [SYSTEM, USER, {**WRONG, "weight": 0}, USER, YES]
    for mask in ([0, 1], [0, 0, 0, 1], [0, 0, 0, 0, 1]):
        assert seen({**row, "loss_mask": mask})[0] == expected
    for flag in ({"weight": 0}, {"train": False}, {"loss_mask": [0, 0]}):
        assert read({**row, **flag})[1] == ["no turn is trained; every weight is 0"]


def test_a_wrong_turn_may_hold_a_call_that_cannot_be_read():
    wrong = {"role": "assistant", "tool_calls": [{"name": "ping", "host": "x"}], "weight": 0}
    messages, _, changes, _ = seen({"messages": [USER, wrong, {**REPLY, "content": "error"}, YES], "tools": [PING]})
    assert messages[1]["tool_calls"][0]["function"] == {"name": "ping", "arguments": {}} and messages[1]["weight"] == 0
    assert changes["host of a call -> dropped"] == 1


def test_empty_tags_of_the_text_itself_stay():
    text = "Write <p></p> here.\n<tool_calls>\nget_weather(city='Rome')\n</tool_calls>"
    messages = seen({"messages": [USER, {"role": "assistant", "content": text}], "tools": TOOLS})[0]
    assert messages[1] == {**calls("Rome"), "content": "Write <p></p> here."}
