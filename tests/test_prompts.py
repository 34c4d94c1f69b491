"""Prompts: exact supervised text, the serving prompt token by token, and the round trip of every call."""

import contextlib
from copy import deepcopy
from pathlib import Path

import jinja2
import pytest
import trl
from conftest import ALARM, TINY, WEATHER
from conversations import CONVERSATIONS, EMPTY_THOUGHT, GREETING, says, supervised

from tool_calling.data.examples import Example
from tool_calling.parsers import PARSERS, parse_calls
from tool_calling.prompts import HIDDEN, give_ids, hide_tools, needs_switch, set_default, take_answer, write_as_ollama
from tool_calling.samples import Sample, render_examples
from tool_calling.terminal import UserError


def render(tokenizer, messages: list[dict], tools=(WEATHER, ALARM)) -> list[Sample]:
    (samples,), problems = render_examples(tokenizer, [Example("x:1", messages, list(tools))], 4096)
    assert problems == []
    return samples


def test_the_supervised_text_is_exact(tokenizer):
    def texts(name):
        return [supervised(tokenizer, sample) for sample in render(tokenizer, CONVERSATIONS[name])]

    rome = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    oslo = rome.replace("Rome", "Oslo")
    assert texts("one call") == [f"{rome}<|im_end|>"]
    assert texts("parallel calls") == [f"{rome}\n{oslo}<|im_end|>"]
    assert texts("no call") == ["I cannot know.<|im_end|>"]
    assert texts("content beside a call") == [f"Let me look.\n{rome}<|im_end|>"]
    assert texts("two rounds of calls") == [f"{rome}<|im_end|>", f"{oslo}<|im_end|>", "Both.<|im_end|>"]
    assert texts("thinking after a reply") == [
        f"<think>\nRome first.\n</think>\n\n{rome}<|im_end|>",
        "<think>\nIt rains.\n</think>\n\nYes.<|im_end|>",
    ]


RICH = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a table for <n> & more.",
        "parameters": {
            "type": "object",
            "properties": {
                "at": {"description": "HH:MM, Köln", "type": "string", "pattern": "^..:..$"},
                "guests": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "size": {"anyOf": [{"minimum": 1, "type": "integer"}, {"type": "null"}], "default": None},
                "where": {
                    "enum": [],
                    "required": ["room"],
                    "properties": {"room": {"enum": ["A", "B"], "type": "string"}},
                    "type": "object",
                },
            },
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
BARE = {"type": "function", "function": {"name": "stop", "description": "Stop.", "parameters": {"type": "object"}}}
AS_OLLAMA = [  # what Go makes of them by Ollama's types
    r'{"type": "function", "function": {"name":"book","description":"Book a table for \u003cn\u003e \u0026 more.",'
    r'"parameters":{"type":"object","required":["at"],"properties":{'
    r'"at":{"type":"string","description":"HH:MM, Köln"},"guests":{"type":"array","items":{"type":"string"}},'
    r'"size":{"anyOf":[{"type":"integer"},{"type":"null"}]},'
    r'"where":{"type":"object","properties":{"room":{"type":"string","enum":["A","B"]}}}}}}}',
    '{"type": "function", "function": {"name":"stop","description":"Stop.","parameters":{"type":"object"}}}',
]


@pytest.mark.parametrize("which", ["tokenizer", "real_tokenizer"])
def test_tools_as_ollama_writes_them_change_nothing_else_in_a_prompt(request, which):
    tokenizer = request.getfixturevalue(which)
    prompt = tokenizer.apply_chat_template(CONVERSATIONS["system"][:2], tools=[RICH, BARE], tokenize=False)
    before, after = prompt.split("<tools>\n", 1)[0], prompt.rpartition("\n</tools>")[2]
    assert write_as_ollama(prompt, [RICH, BARE]) == (before + "<tools>\n" + "\n".join(AS_OLLAMA) + "\n</tools>" + after)
    assert write_as_ollama(prompt, []) == prompt
    with pytest.raises(ValueError, match="^the chat template does not write each tool as JSON on a line of its own$"):
        write_as_ollama(prompt, [RICH, WEATHER])


def test_a_greeting_is_the_whole_answer_after_its_serving_prompt(tokenizer):
    """Stock Qwen3 renders no think block into an answer before the first user message, but serves one."""
    greeting, call = render(tokenizer, GREETING)
    assert supervised(tokenizer, greeting) == "Hi! How can I help?<|im_end|>"
    for sample in (greeting, call):
        assert tokenizer.decode(sample.input_ids[: sample.prompt_length]).endswith(EMPTY_THOUGHT)


def test_a_turn_before_a_tool_reply_stands_on_the_serving_prompt(tokenizer):
    """Stock Qwen3 drops the empty think block there when it renders the whole conversation at once."""
    first, _ = render(tokenizer, CONVERSATIONS["tool reply"])
    assert tokenizer.decode(first.input_ids[: first.prompt_length]).endswith(EMPTY_THOUGHT)
    whole = tokenizer.apply_chat_template(CONVERSATIONS["tool reply"], tools=[WEATHER, ALARM], tokenize=False)
    assert "<|im_start|>assistant\n<tool_call>" in whole  # what training on whole conversations would teach


@pytest.mark.parametrize("which", ["tokenizer", "real_tokenizer"])
@pytest.mark.parametrize("messages", [*CONVERSATIONS.values(), GREETING], ids=[*CONVERSATIONS, "a greeting"])
def test_every_turn_is_trained_as_served(request, which, messages):
    tokenizer = request.getfixturevalue(which)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    samples = render(tokenizer, messages)
    assert len(samples) == len(turns)
    for turn, sample in zip(turns, samples):
        served = tokenizer.apply_chat_template(
            messages[:turn],
            tools=[WEATHER, ALARM],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking="reasoning_content" in messages[turn],
        )
        assert sample.input_ids[: sample.prompt_length] == served
        answer = supervised(tokenizer, sample)
        assert answer.endswith("<|im_end|>") and answer.count("<|im_end|>") == 1
        assert parse_calls(answer) == [call["function"] for call in messages[turn].get("tool_calls", [])]


def test_the_two_tokenizers_render_the_same_text(tokenizer, real_tokenizer):
    for messages in CONVERSATIONS.values():
        texts = [[t.decode(s.input_ids) for s in render(t, messages)] for t in (tokenizer, real_tokenizer)]
        assert texts[0] == texts[1]


def test_without_tools_no_tool_is_rendered(tokenizer):
    (sample,) = render(tokenizer, [{"role": "user", "content": "hi"}, says("hello")], tools=[])
    assert tokenizer.decode(sample.input_ids) == (
        "<|im_start|>user\nhi<|im_end|>\n" + EMPTY_THOUGHT + "hello<|im_end|>"
    )


def test_a_template_that_loses_the_calls_ends_the_run(tokenizer):
    class Lossy:
        """A tokenizer whose template ignores tool calls."""

        eos_token, name_or_path = tokenizer.eos_token, "lossy"

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def apply_chat_template(self, messages, **kwargs):
            bare = [{**message, "tool_calls": None} for message in messages]
            return tokenizer.apply_chat_template(bare, **kwargs)

    examples = [Example("x:1", CONVERSATIONS["one call"], [WEATHER])]
    with pytest.raises(UserError) as error:
        render_examples(Lossy(), examples, 4096)
    assert str(error.value) == (
        'lossy: the chat template writes calls in a way that cannot be read back: ""; expected a chat template with '
        f"tools whose calls one of vLLM's parsers reads: {', '.join(PARSERS)}; --chat_template gives a base another one"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hello", []),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [{"name": "f", "arguments": {}}]),
        (
            'hm <tool_call>{"name": "f", "arguments": {"a": "</b>"}}</tool_call>',
            [{"name": "f", "arguments": {"a": "</b>"}}],
        ),
        (
            '<tool_call>\n{"name": "f", "arguments": {}}',
            [{"name": "f", "arguments": {}}],
        ),  # cut off, as servers accept it
        (
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}],
        ),
    ],
)
def test_calls_are_parsed_as_servers_do(text, expected):
    assert parse_calls(text) == expected


def test_broken_json_in_a_call_is_an_error():
    with pytest.raises(ValueError):
        parse_calls('<tool_call>\n{"name": f}\n</tool_call>')


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
DRAFT = f"Maybe {CALL}?"
PLAIN, THOUGHT, CLOSED = CALL, f"<think>\nWhy.\n</think>\n\n{CALL}", f"Why.\n</think>\n\n{CALL}"  # references


@pytest.mark.parametrize(
    "text, reference, answer",
    [
        ("Hello!", PLAIN, "Hello!"),
        ("", PLAIN, ""),
        (f"<think>\n\n</think>\n\n{CALL}", PLAIN, CALL),
        (f" \n<think>{DRAFT}</think>No.", PLAIN, "No."),
        (f"<think>{DRAFT}", PLAIN, ""),  # cut off while it reasons
        (f"So <think>x</think> {CALL}", PLAIN, f"So <think>x</think> {CALL}"),  # it does not lead
        (f"{DRAFT}</think>No.", PLAIN, f"{DRAFT}</think>No."),  # and this was never opened
        (f"{DRAFT}</think>No.", THOUGHT, f"{DRAFT}</think>No."),
        (f"<think>{DRAFT}</think>No.", THOUGHT, "No."),
        ("No.", THOUGHT, "No."),  # a model that answers at once
        (THOUGHT, THOUGHT, CALL),
        (CLOSED, CLOSED, CALL),
        (f"{DRAFT}</think>No.", CLOSED, "No."),  # the prompt has opened it
        (f"<think>{DRAFT}</think>No.</think>", CLOSED, "No.</think>"),
        (DRAFT, CLOSED, ""),
        (f"<|channel>thought\n{DRAFT}<channel|>{CALL}", CALL, CALL),
        (f"<|channel>thought\n{DRAFT}", CALL, ""),
    ],
)
def test_reasoning_is_taken_off_as_servers_do(text, reference, answer):
    assert take_answer(text, reference) == answer


def test_a_template_that_opens_the_reasoning_itself_is_trained_and_scored(tokenizer, monkeypatch):
    closed = "'<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false"
    assert closed in tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace(closed, "'<think>\\n'"))
    (sample,) = render(tokenizer, CONVERSATIONS["thinking"])
    assert tokenizer.decode(sample.input_ids[: sample.prompt_length]).endswith("<|im_start|>assistant\n<think>\n")
    rome = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert sample.completion == f"The user asks for Rome.\n</think>\n\n{rome}"
    assert take_answer(f"Oslo? No.</think>{rome}", sample.completion) == rome
    assert take_answer(rome, sample.completion) == ""  # the server takes it for reasoning


OFF, ON = (
    f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {x} %}}{{% endif %}}\n"
    for x in ("false", "true")
)
SWITCHES = [{}, {"enable_thinking": True}, {"enable_thinking": False}]


def serve(tokenizer, messages: list[dict], **options) -> str:
    """Return the prompt that a server renders for the next turn."""
    return tokenizer.apply_chat_template(messages, [WEATHER], tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize(
    "template, thinks, line",
    [
        ("qwen3", False, OFF),
        ("qwen3", True, ""),
        ("qwen3_instruct_2507", False, ""),
        ("qwen3_5_nothink", False, ""),
        ("qwen3_5_nothink", True, ON),
        ("qwen3_5_think", False, OFF),
        ("gemma4_v5", True, ON),
        ("qwen2_5", True, ""),
        ("llama3_2", False, ""),
    ],
)
def test_a_template_does_by_default_what_was_trained(tokenizer, monkeypatch, template, thinks, line):
    """It says so in one line, in the place of the one that it had; what a client says is rendered as before."""
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    if not file.is_file():
        pytest.skip("this TRL has no such template")
    own = file.read_text()
    conversations = [CONVERSATIONS["one call"][:1], CONVERSATIONS["tool reply"][:3]]
    monkeypatch.setattr(tokenizer, "chat_template", own)
    before = [[serve(tokenizer, messages, **switch) for switch in SWITCHES] for messages in conversations]
    for former in ("", OFF, ON):
        tokenizer.chat_template = former + own
        set_default(tokenizer, thinks)
        assert tokenizer.chat_template == line + own and not needs_switch(tokenizer, thinks)
        after = [[serve(tokenizer, messages, **switch) for switch in SWITCHES] for messages in conversations]
        assert [texts[1:] for texts in after] == [texts[1:] for texts in before]
        assert [texts[0] for texts in after] == [texts[1 if thinks else 2] for texts in before]


def test_of_several_templates_none_is_changed(tokenizer, monkeypatch):
    several = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    monkeypatch.setattr(tokenizer, "chat_template", dict(several))
    set_default(tokenizer, False)
    assert tokenizer.chat_template == several and needs_switch(tokenizer, False)


def test_macros_and_loops_of_a_template_see_its_default(tokenizer, monkeypatch):
    inner = "{{ 'on' if enable_thinking else 'off' }}"
    text = f"{{% macro a() %}}{inner}{{% endmacro %}}{{% for m in messages %}}{{{{ a() }}}} {inner}{{% endfor %}}"
    monkeypatch.setattr(tokenizer, "chat_template", "  {% if true %}" + text + "{% endif %}")
    set_default(tokenizer, True)
    assert tokenizer.chat_template.startswith(ON + "  {% if")
    assert [serve(tokenizer, [{"role": "user"}], **switch) for switch in SWITCHES] == ["on on", "on on", "off off"]


def test_prompts_without_the_list_of_tools_keep_all_else(tokenizer, monkeypatch):
    plain = {name: render(tokenizer, messages, tools=()) for name, messages in CONVERSATIONS.items()}
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
    hide_tools(tokenizer, True)
    for name, messages in CONVERSATIONS.items():
        samples = render(tokenizer, messages)
        assert [sample.input_ids for sample in samples] == [sample.input_ids for sample in plain[name]]
        assert [sample.tools for sample in samples] == [[WEATHER, ALARM]] * len(samples)  # as the server has them
    answer = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    asked = "<|im_start|>user\nrain in Rome and Oslo?<|im_end|>\n"
    texts = {
        name: [tokenizer.decode(sample.input_ids) for sample in render(tokenizer, CONVERSATIONS[name])]
        for name in ("system", "tool reply")
    }
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    reply = '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
    assert texts["system"] == [f"{system}{asked}{EMPTY_THOUGHT}{answer}<|im_end|>"]
    assert texts["tool reply"] == [
        f"{asked}{EMPTY_THOUGHT}{answer}<|im_end|>",
        f"{asked}<|im_start|>assistant\n{answer}<|im_end|>\n{reply}{EMPTY_THOUGHT}Yes.<|im_end|>",
    ]


def test_each_template_can_leave_out_the_tools(tokenizer):
    """With its line before it, it renders a request with tools as it alone does one without."""
    tokenizer, messages, rendered = deepcopy(tokenizer), give_ids(CONVERSATIONS["tool reply"][:3]), 0
    tokenizer.bos_token = "<|endoftext|>"

    def list_prompts(template: str, **options) -> list[str]:
        tokenizer.chat_template = template
        options |= {"tokenize": False, "add_generation_prompt": True}
        return [tokenizer.apply_chat_template(messages[:end], **options) for end in (1, 3)]

    for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"):
        with contextlib.suppress(jinja2.TemplateError, TypeError):  # those that know no calls
            expected = list_prompts(file.read_text())
            assert list_prompts(HIDDEN + file.read_text(), tools=[WEATHER]) == expected, file.stem
            rendered += list_prompts(file.read_text(), tools=[WEATHER]) != expected
    assert rendered > 20


WITH_TOOLS = f"warning: {TINY}: was trained on prompts without tools, and now gets them; to go on as before, add "
WITH_TOOLS += "--tools_in_prompt none\n"


@pytest.mark.parametrize("thinks, line", [(False, OFF), (True, "")])
def test_a_template_is_told_of_tools_and_of_thinking(tokenizer, monkeypatch, capsys, thinks, line):
    """In either order, also where an earlier run has told it otherwise."""
    own = tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", own)
    for former in ("", HIDDEN, OFF + HIDDEN, HIDDEN + ON, ON):
        for hidden in (True, False):
            tokenizer.chat_template = former + own
            hide_tools(tokenizer, hidden)
            set_default(tokenizer, thinks)
            assert tokenizer.chat_template == line + HIDDEN * hidden + own
            assert capsys.readouterr().err == WITH_TOOLS * (HIDDEN in former and not hidden)


def test_of_several_templates_none_leaves_out_the_tools(tokenizer, monkeypatch):
    several = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    monkeypatch.setattr(tokenizer, "chat_template", dict(several))
    hide_tools(tokenizer, False)
    assert tokenizer.chat_template == several
    with pytest.raises(UserError) as error:
        hide_tools(tokenizer, True)
    assert str(error.value) == (
        f"--tools_in_prompt none: {TINY}: has several chat templates, by name; give it one with --chat_template"
    )
