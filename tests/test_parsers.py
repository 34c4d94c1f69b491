"""Calls as vLLM's tool parsers read them, and which of the parsers reads the calls of each chat template."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import trl
from conftest import ALARM, TINY, WEATHER, native, write_jsonl
from conversations import ASK, calls, says, score_answer, supervised
from jobs import run_forked
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tool_calling.data.examples import Example
from tool_calling.engines.answers import find_stop_tokens
from tool_calling.parsers import PARSERS, parse_calls
from tool_calling.prompts import find_call_end, find_end_token, find_parser, give_ids
from tool_calling.samples import render_examples
from tool_calling.scores import read_calls
from tool_calling.terminal import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FIELDS = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "share": {"type": "number"},
    "loud": {"type": "boolean"},
    "places": {"type": "array", "items": {"type": "object", "properties": {"level": {"type": "integer"}}}},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "either": {"type": ["integer", "string"]},
    "level": {"enum": [1, 2]},
    "plain": {"type": "object"},
    "any": {},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": FIELDS}}}


def call(name: str = "f", **arguments) -> dict:
    return {"name": name, "arguments": arguments}


def xml(**texts: str) -> str:
    return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())


BROKEN = None
CASES = {
    "qwen3_coder": {
        "hello": [],
        "a < b, <parameter=x>": [],
        f"Look:\n<tool_call>\n<function=f>\n{xml(city='Rome', days='3')}</function>\n</tool_call>": [
            call(city="Rome", days=3)
        ],
        f"<function=f>{xml(city='5')}</function>": [call(city="5")],
        "<tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n"
        f"{xml(days='3')}</function>\n</tool_call>": [call(), call("g", days="3")],
        f"<tool_call>\n<function=f>\n{xml(city='Rome')}": [call(city="Rome")],
        "<tool_call><function=f><parameter=city>\na\n\nb\n</parameter></function></tool_call>": [call(city="a\n\nb")],
        "<tool_call><function=f><parameter=city>a<parameter=days>2</parameter></function>": [call(city="a", days=2)],
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>': BROKEN,
        "<tool_call>\n</tool_call>": BROKEN,
    },
    "pythonic": {
        "hello": [],
        "[1]": [],
        "Look: [f(days=3)]": [],
        "[f(city='R\\'s', days=3, share=0.5, loud=True, note=None, places=[{'level': 1}])]": [
            call(city="R's", days=3, share=0.5, loud=True, note=None, places=[{"level": 1}])
        ],
        "[f(loud=true, note=null), a.g()]\n": [call(loud=True, note=None), call("a.g")],
        "[f(days=-3)]": BROKEN,
        "[f(days=3": BROKEN,
        "[f(days=x)]": BROKEN,
        "[f(days=(1, 2))]": BROKEN,
        "[f(**x)]": BROKEN,
        "[f(city=b'x')]": BROKEN,
        "[f(from='x')]": BROKEN,
        "[f(days=3)] and more": BROKEN,
        "[f(days=3), 4]": BROKEN,
    },
    "llama4_pythonic": {
        "<|python_start|>[f(days=3)]<|python_end|>": [call(days=3)],
        "[f(days=3)]": [call(days=3)],
        "<|python_start|>[f(days=3]<|python_end|>": BROKEN,
        "<|python_start|>hello": [],
    },
    "lfm2": {
        "[f(days=3)]": [],
        '<|tool_call_start|>[f(city="R", places=[{"level": 1, "x": null}]), f()]<|tool_call_end|>Done.': [
            call(city="R", places=[{"level": 1, "x": None}]),
            call(),
        ],
        "Look: <|tool_call_start|>[f(days=3)]": [call(days=3)],
        "<|tool_call_start|>[\nf(city='a\n\\'b\\n', note=\"it's\n\")\n]<|tool_call_end|>": [
            call(city="a\n'b\n", note="it's\n")
        ],
        "<|tool_call_start|>[f(city='it's')]<|tool_call_end|>": BROKEN,
        "<|tool_call_start|>[f(days=-3)]<|tool_call_end|>": BROKEN,
        "<|tool_call_start|>f(days=3)<|tool_call_end|>": BROKEN,
        "<|tool_call_start|>": BROKEN,
    },
    "olmo3": {
        "hello": [],
        "<function_calls>\nf(days=3)\n\ng(x=null)\n</function_calls>": [call(days=3), call("g", x=None)],
        "<function_calls>f(days=</function_calls>": BROKEN,
    },
    "functiongemma": {
        "hello": [],
        "<start_function_call>call:f{city:<escape>Ro}me<escape>,days:<escape>3<escape>}<end_function_call>"
        "<start_function_call>call:g{}<end_function_call>": [call(city="Ro}me", days=3), call("g")],
        "<start_function_call>call:f{city:<escape>5<escape>,days:3}<end_function_call>": [call(city=5)],
        "<start_function_call>call:f{city:<escape>R<escape>": [call(city="R")],
        "<start_function_call>f()<end_function_call>": BROKEN,
    },
    "gemma4": {
        "hello": [],
        'Look: <|tool_call>call:f{city:<|"|>R: "{a}", b<|"|>,days:3,loud:true,note:null,share:0.5}<tool_call|>': [
            call(city='R: "{a}", b', days=3, loud=True, note=None, share=0.5)
        ],
        "<|tool_call>call:f{places:[{level:1},{level:2}],plain:{a:1}}<tool_call|><|tool_call>call:g{n:1}<tool_call|>": [
            call(places=[{"level": 1}, {"level": 2}], plain={"a": "1"}),  # untyped: the text stays
            call("g", n="1"),
        ],
        "<|tool_call>call:f{days:3": BROKEN,
        "<|tool_call>call:f{days:}<tool_call|>": BROKEN,
        "<|tool_call>f<tool_call|>": BROKEN,
    },
    "mistral": {
        "hello": [],
        '[TOOL_CALLS] [{"name": "f", "arguments": {"days": 3}, "id": "abcdefghi"}, {"name": "g"}]': [
            call(days=3),
            call("g"),
        ],
        'Look: [TOOL_CALLS]f[ARGS]{"days": 3}[TOOL_CALLS]g{}': [call(days=3), call("g")],
        '[TOOL_CALLS]f[ARGS]{"days": ': BROKEN,
        "[TOOL_CALLS]f": BROKEN,
        "[TOOL_CALLS] [1]": BROKEN,
    },
    "openai": {
        "<|channel|>final<|message|>hello": [],
        ' to=functions.f<|channel|>commentary json<|message|>{"days": 3}': [call(days=3)],
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"city": "R"}<|call|>': [call(city="R")],
        " to=functions.f<|channel|>commentary json<|message|>{": BROKEN,
    },
}
CASES["lfm2"]["<|tool_call_start|>[f(from='in = 1')]<|tool_call_end|>"] = [call(**{"from": "in = 1"})]


@pytest.mark.parametrize(
    "parser, text, expected",
    [(parser, text, expected) for parser, cases in CASES.items() for text, expected in cases.items()],
)
def test_calls_are_read_as_the_server_reads_them(parser, text, expected):
    if expected is not BROKEN:
        assert parse_calls(text, parser, [TOOL]) == expected
        return
    with pytest.raises(ValueError):
        parse_calls(text, parser, [TOOL])


@pytest.mark.parametrize("parser", PARSERS)
def test_a_text_cut_anywhere_is_calls_or_a_broken_call(parser):
    """A model may write anything: whoever reads it expects no other error."""
    texts = [text for cases in CASES.values() for text in cases] + ["[TOOL_CALLS] [[]]", "[TOOL_CALLS] 5", "[f(x=1j)]"]
    for text in texts:
        for cut in range(len(text)):
            for part in (text[:cut], text[cut:], text[: cut // 2] + text[cut:]):
                with contextlib.suppress(ValueError):
                    assert all(set(made) == {"name", "arguments"} for made in read_calls(part, parser, [TOOL]))


@pytest.mark.parametrize(
    "field, text, expected",
    [
        ("city", "5", "5"),
        ("city", "null", "null"),
        ("city", " a ", " a "),
        ("days", "3", 3),
        ("days", "3.5", 3.5),
        ("days", "soon", "soon"),
        ("share", "0.5", 0.5),
        ("share", "2.0", 2),
        ("share", "inf", "inf"),
        ("loud", "True", True),
        ("loud", "false", False),
        ("loud", "1", True),
        ("loud", "yes", "yes"),
        ("places", '[{"level": "1", "b": null}]', [{"level": "1", "b": None}]),
        ("places", "[{'level': 1}]", "[{'level': 1}]"),
        ("note", "null", None),
        ("note", "None", "None"),
        ("note", "5", "5"),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("level", "2", 2),
        ("plain", '{"a": 1}', {"a": 1}),
        ("any", "5", "5"),
        ("unknown", "5", "5"),
    ],
)
def test_a_text_is_typed_by_the_schema(field, text, expected):
    (found,) = parse_calls(f"<function=f>{xml(**{field: text})}</function>", "qwen3_coder", [TOOL])
    assert found == call(**{field: expected}) and type(found["arguments"][field]) is type(expected)


def make_tokenizer(template: str, name: str = "some/model"):
    """Return the embedded base's tokenizer with a template and the tokens that it writes."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokens = {*re.findall(r"<[|]?[a-z_]+[|]?>|<\|\"\|>", template), "<|return|>"}
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    tokenizer.bos_token, tokenizer.chat_template, tokenizer.name_or_path = "<|endoftext|>", template, name
    tokenizer.eos_token = find_end_token(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    "name, expected",
    {
        "diffusion_gemma": ("gemma4", "<turn|>", "<|tool_response>"),
        "gemma4": ("gemma4", "<turn|>", "<|tool_response>"),
        "gemma4_v2": ("gemma4", "<turn|>", "<turn|>"),
        "gemma4_v5": ("gemma4", "<turn|>", "<|tool_response>"),
        "gptoss": ("openai", "<|return|>", "<|call|>"),
        "lfm2_2_5": ("lfm2", "<|im_end|>", "<|im_end|>"),
        "lfm2_2_5_v2": ("lfm2", "<|im_end|>", "<|im_end|>"),
        "lfm2_v2": ("lfm2", "<|im_end|>", "<|im_end|>"),
        "llama3_1": ("llama3_json", "<|eot_id|>", "<|eot_id|>"),
        "llama3_2": ("llama3_json", "<|eot_id|>", "<|eot_id|>"),
        "nemotron_3_5_lightning": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "nemotron_3_nano": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "nemotron_3_super": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "nemotron_3_ultra": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "qwen2_5": ("hermes", "<|im_end|>", "<|im_end|>"),
        "qwen3": ("hermes", "<|im_end|>", "<|im_end|>"),
        "qwen3_5_nothink": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "qwen3_5_think": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "qwen3_6": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "qwen3_8": ("qwen3_coder", "<|im_end|>", "<|im_end|>"),
        "qwen3_instruct_2507": ("hermes", "<|im_end|>", "<|im_end|>"),
        "qwen3_vl": ("hermes", "<|im_end|>", "<|im_end|>"),
    }.items(),
)
def test_the_parser_of_a_template_is_found(name, expected, capsys):
    if not (TEMPLATES / f"{name}.jinja").is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = make_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    assert (find_parser(tokenizer), tokenizer.eos_token, find_call_end(tokenizer)) == expected
    rows = [[ASK, calls("Rome", "Oslo")], [ASK, calls("Rome")], [ASK, says("No.")]]
    several = name not in ("gptoss", "llama3_1", "llama3_2")
    groups, problems = render_examples(tokenizer, [Example("x:1", row, [WEATHER]) for row in rows[not several :]], 4096)
    assert problems == [] and capsys.readouterr().err == ""
    for row, (sample,) in zip(rows[not several :], groups):
        wanted = [made["function"] for made in row[1].get("tool_calls", [])]
        assert sample.parser == expected[0]
        assert read_calls(sample.completion, sample.parser, sample.tools) == wanted
        end = expected[2] if wanted else expected[1]
        assert supervised(tokenizer, sample) == sample.completion + end
        assert score_answer(sample.completion, sample.completion, [WEATHER], sample.parser)[:3] == (True, True, False)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lfm2", 'writes calls in a way that cannot be read back: ""'),
        (
            "muse_glimmer",
            'writes calls in a way that cannot be read back: " to=probe_tool<|message|><atem:function_calls',
        ),
        ("gemma3", "leaves out the tools"),
    ],
)
def test_a_template_whose_calls_no_parser_reads_is_an_error_that_shows_them(name, reason):
    if not (TEMPLATES / f"{name}.jinja").is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = make_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    with pytest.raises(UserError) as error:
        render_examples(tokenizer, [Example("x:1", [ASK, calls("Rome")], [WEATHER])], 4096)
    assert str(error.value).startswith(f"some/model: the chat template {reason}")
    expected = f"expected a chat template with tools whose calls one of vLLM's parsers reads: {', '.join(PARSERS)}"
    assert str(error.value).endswith(f"; {expected}; --chat_template gives a base another one")


@pytest.mark.parametrize(
    "template, arguments, problem",
    [
        ("qwen3_5_nothink", {"city": "5", "days": 3, "loud": True, "note": "5", "plain": {"a": [1]}}, None),
        ("qwen3_6", {"note": None}, None),
        ("qwen3_5_nothink", {"note": None}, "its calls do not survive rendering and parsing"),  # written None
        ("qwen3_5_nothink", {"any": 5}, "its calls do not survive rendering and parsing"),
        ("qwen3_5_nothink", {"either": "5"}, "its calls do not survive rendering and parsing"),
        ("qwen3_5_nothink", {"city": "a</parameter>b"}, "its calls do not survive rendering and parsing"),
        ("lfm2_v2", {"city": "it's\n\\n", "share": 0.5, "plain": {"a": None}}, None),
        ("lfm2_v2", {"days": -3}, "would be read as a broken call"),
        ("gemma4_v5", {"plain": {"a": "b"}, "places": [{"level": 1}], "note": None}, None),
        ("gemma4_v5", {"plain": {"a": 1}}, "its calls do not survive rendering and parsing"),
    ],
)
def test_a_call_that_the_syntax_cannot_carry_is_a_problem_of_its_row(template, arguments, problem):
    if not (TEMPLATES / f"{template}.jinja").is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = make_tokenizer((TEMPLATES / f"{template}.jinja").read_text())
    answer = {**says(""), "tool_calls": [{"type": "function", "function": call(**arguments)}]}
    _, problems = render_examples(tokenizer, [Example("x:1", [ASK, answer], [TOOL])], 4096)
    assert [text.partition(": ")[2].partition(":")[0] for _, text in problems] == ([problem] if problem else [])


ESCAPED = (
    "{% for tool in tools or [] %}<start_function_declaration>{{ tool.function.name }}<end_function_declaration>"
    "{% endfor %}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{% if role == 'tool' %}<start_function_response>{{ message.content }}<end_function_response>{% else %}"
    "<start_of_turn>{{ role }}\n{{ message.content }}{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "<start_function_call>call:{{ call.function.name ~ '{' }}"
    "{% for key, value in call.function.arguments.items() %}{{ ',' if not loop.first }}{{ key }}:"
    "{{ '<escape>' ~ value ~ '<escape>' if value is string else value | tojson }}{% endfor %}"
    "}<end_function_call>{% endfor %}<start_function_response>{% else %}<end_of_turn>\n{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_functiongemma_ends_calls_with_a_token_of_their_own_and_loses_numbers(capsys):
    tokenizer = make_tokenizer(ESCAPED)
    assert tokenizer.eos_token == "<end_of_turn>" and find_call_end(tokenizer) == "<start_function_response>"
    days = {**says(""), "tool_calls": [{"type": "function", "function": call("get_weather", city="Rome", days=3)}]}
    rows = [[ASK, calls("Rome", "Oslo")], [ASK, days], [ASK, says("No.")]]
    groups, problems = render_examples(tokenizer, [Example("x:1", row, [WEATHER]) for row in rows], 4096)
    assert capsys.readouterr().err == (
        "warning: some/model: vLLM's parser functiongemma reads only texts back from its calls, "
        "no numbers, truth values, lists or objects\n"
    )
    assert [text for _, text in problems] == [
        'message 2: its calls do not survive rendering and parsing: "<start_function_call>call:get_weather{city:'
        "<escape>Rome<escape>,days:3}<end_fu…"
    ]
    (two,), _, (text,) = groups
    one = "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>"
    assert two.parser == "functiongemma" and two.completion == one + one.replace("Rome", "Oslo")
    assert supervised(tokenizer, two) == two.completion + "<start_function_response>"
    assert supervised(tokenizer, text) == "No.<end_of_turn>"

    class Model:
        """A model whose generation_config.json names no token."""

        generation_config = GenerationConfig()

    assert find_stop_tokens(Model, tokenizer) == sorted(
        tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<start_function_response>"])
    )


def test_an_answer_is_scored_by_what_its_syntax_says():
    wanted = f"<tool_call>\n<function=f>\n{xml(city='Rome', days='3')}</function>\n</tool_call>"
    assert score_answer(wanted, wanted, [TOOL], "qwen3_coder")[:3] == (True, True, False)
    other = wanted.replace("\n3\n", "\n4\n")
    assert score_answer(other, wanted, [TOOL], "qwen3_coder")[:3] == (False, False, False)
    plain = '<tool_call>\n{"name": "f", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    assert score_answer(plain, wanted, [TOOL], "qwen3_coder")[:3] == (False, False, True)


KEYWORDS = (
    "{{ name }}({% for key, value in values %}{{ ', ' if not loop.first }}{{ key }}={{ value | tojson }}{% endfor %})"
)
OBJECT = """{{ {'name': name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}"""
WRITTEN = {  # (what stands before the calls, each call, between two, behind them)
    "pythonic": ("[", KEYWORDS, ", ", "]"),
    "llama4_pythonic": ("<|python_start|>[", KEYWORDS, ", ", "]<|python_end|>"),
    "olmo3": ("<function_calls>", KEYWORDS, "\n", "</function_calls>"),
    "mistral": ("[TOOL_CALLS] [", f"{{{{ raise_exception('ids') if call.id | length != 9 }}}}{OBJECT}", ", ", "]"),
    "mistral, newer": ("", "[TOOL_CALLS]{{ name }}[ARGS]{{ call.function.arguments | tojson }}", "", ""),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_parser_of_other_syntaxes_is_found(name):
    before, one, between, behind = WRITTEN[name]
    each = "{% set name = call.function.name %}{% set values = call.function.arguments.items() %}"
    each += f"{one}{{{{ {between!r} if not loop.last }}}}"
    listed = f"{before}{{% for call in message.tool_calls %}}{each}{{% endfor %}}{behind}"
    answer = f"{{{{ message.content }}}}{{% if message.tool_calls %}}{listed}{{% endif %}}"
    tokenizer = make_tokenizer(
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for message in messages %}<|im_start|>"
        f"{{{{ message.role }}}}\n{answer}<|im_end|>\n"
        "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    parser = name.partition(",")[0]
    assert find_parser(tokenizer) == parser
    (samples,), problems = render_examples(tokenizer, [Example("x:1", [ASK, calls("Rome", "Os'lo")], [WEATHER])], 4096)
    assert problems == []
    wanted = [call("get_weather", city=city) for city in ("Rome", "Os'lo")]
    assert read_calls(samples[0].completion, parser) == wanted


def test_replies_are_of_the_calls_that_they_answer():
    """As served: clients send ids, by which Gemma 4's template finds the names of the tools."""
    if not (TEMPLATES / "gemma4_v5.jinja").is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = make_tokenizer((TEMPLATES / "gemma4_v5.jinja").read_text())
    made = [("get_weather", {"city": "Rome"}), ("set_alarm", {"time": "7"})]
    both = {**says(""), "tool_calls": [{"type": "function", "function": call(name, **more)} for name, more in made]}
    rows = [ASK, both, {"role": "tool", "content": "rain"}, {"role": "tool", "content": "set"}, says("Done.")]
    ((_, last),), problems = render_examples(tokenizer, [Example("x:1", rows, [WEATHER, ALARM])], 4096)
    assert problems == []
    prompt = tokenizer.decode(last.input_ids[: last.prompt_length])
    assert re.findall(r"response:(\w+)\{value:<\|\"\|>(\w+)", prompt) == [("get_weather", "rain"), ("set_alarm", "set")]


def test_ids_are_the_data_s_own_or_new_ones():
    made = [{"id": "a"}, {}, {"id": "c"}]
    reply = {"role": "tool", "content": "x"}
    messages = [
        {"role": "assistant", "tool_calls": made},
        {**reply, "tool_call_id": "c"},
        reply,
        {**reply, "tool_call_id": "lost"},
        reply,  # to no call
        {"role": "assistant", "tool_calls": [{}]},
        reply,
    ]
    given = give_ids(messages)
    ids = [[made["id"] for made in message.get("tool_calls", [])] or message.get("tool_call_id") for message in given]
    assert ids == [["a", "call00001", "c"], "c", "a", "call00001", None, ["call00003"], "call00003"]
    assert made == [{"id": "a"}, {}, {"id": "c"}]


@pytest.mark.slow
def test_a_model_with_other_calls_runs_from_rows_to_its_serve_line(tmp_path, tools_path):
    tokenizer = make_tokenizer(ESCAPED)
    config = LlamaConfig(
        vocab_size=4352, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        native(f"rain in {city} {day}?", ("get_weather", {"city": city}))
        for city in ("Rome", "Oslo", "Lima", "Bonn")
        for day in ("today", "on Monday", "at all")
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, native("thanks", content="Bye."), native("ok", content="Bye.")])
    result = run_forked(
        *("--model_id", tmp_path / "base", "--dataset_path", tmp_path / "rows.jsonl", "--tools_path", tools_path),
        *("--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final", "--no-load_in_4bit"),
        *("--num_epochs", 1, "--max_new_tokens", 8, "--learning_rate", 0.01, "--warmup_steps", 0),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"serve    vllm serve {tmp_path}/final --enable-auto-tool-choice --tool-call-parser functiongemma" in lines
    ends = ["<end_of_turn>", "<start_function_response>"]
    settings = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    stops = settings["eos_token_id"]
    assert set(tokenizer.convert_tokens_to_ids(ends)) <= {*(stops if isinstance(stops, list) else [stops])}
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    called = [answer["expected_calls"] for answer in answers if answer["expected_calls"]]
    assert called and all(made[0]["name"] == "get_weather" and [*made[0]["arguments"]] == ["city"] for made in called)
