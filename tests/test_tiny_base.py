"""models/tiny-qwen3: the folder is small and complete, its tokenizer loses nothing, its chat template is Qwen3's text,
and it was trained on nothing that stands in data/."""

import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tool_calling.templates import read_template

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "models" / "tiny-qwen3"
QWEN3_SPECIAL_TOKENS = {
    "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|object_ref_start|>": True,
    "<|object_ref_end|>": True, "<|box_start|>": True, "<|box_end|>": True, "<|quad_start|>": True,
    "<|quad_end|>": True, "<|vision_start|>": True, "<|vision_end|>": True, "<|vision_pad|>": True,
    "<|image_pad|>": True, "<|video_pad|>": True, "<tool_call>": False, "</tool_call>": False,
    "<|fim_prefix|>": False, "<|fim_middle|>": False, "<|fim_suffix|>": False, "<|fim_pad|>": False,
    "<|repo_name|>": False, "<|file_sep|>": False, "<tool_response>": False, "</tool_response>": False,
    "<think>": False, "</think>": False,
}  # fmt: skip
ODD_TEXTS = [
    "",
    " ",
    "plain text",
    "tabs\tand\t\ttabs",
    "many     spaces   ",
    "   leading",
    "line\nbreaks\r\n\r\n\n",
    "ünïcödé ñandú Straße",
    "cafe\u0301 is not café",
    "日本語のテキスト",
    "русский текст",
    "العربية",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷",
    "\u200b\u00a0\ufeff zero widths",
    "12345 6.78e-9",
    '{"name": "x_y", "arguments": {"a": [1, 2.5, true, null], "b": "q\\"uote"}}',
    "don't won't I'm we'll",
    "CamelCaseName snake_case kebab-case",
    "\x00\x01\x7f",
    "a" * 300,
    "!?!?...---___",
    "½ ² ①",
    "<tool_call",
    "tool_call>",
    "< think >",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "paint_fence",
            "description": "Streiche den Zaun – schön 🙂 <b>&amp;'\"",
            "parameters": {
                "type": "object",
                "properties": {"z": {"type": "string"}, "a": {"type": "integer"}},
                "required": ["z"],
            },
        },
    },
    {"type": "function", "function": {"name": "no_parameters", "parameters": {"type": "object", "properties": {}}}},
]


def load_module(path):
    """The script at path as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def maker():
    return load_module(ROOT / "models" / "make_tiny_qwen3.py")


# --- the folder -----------------------------------------------------------------------------------------------


def test_folder_is_complete_and_small():
    names = {path.name for path in BASE.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 25_000_000


def test_card_says_what_the_model_is_not():
    card = (BASE / "README.md").read_text(encoding="utf-8")
    assert "not a Qwen release" in card and "make_tiny_qwen3.py" in card


def test_model_is_a_qwen3_in_bf16_of_at_most_12_million_parameters():
    import torch
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] <= 8192
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert type(model) is Qwen3ForCausalLM
    assert model.num_parameters() <= 12_000_000
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    for size in ("hidden_size", "intermediate_size", "head_dim"):
        assert config[size] % 64 == 0, f"{size} is not made of whole 4-bit blocks"


def test_generation_stops_where_qwen3_stops(tokenizer):
    generation = json.loads((BASE / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == ends
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert json.loads((BASE / "config.json").read_text())["eos_token_id"] == ends[0]


# --- the tokenizer --------------------------------------------------------------------------------------------


def test_every_qwen3_special_token_is_one_token(tokenizer):
    assert len(tokenizer) <= 8192
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert added == QWEN3_SPECIAL_TOKENS
    for text in QWEN3_SPECIAL_TOKENS:
        assert len(tokenizer(f"a{text}b").input_ids) == 3


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_round_trip_is_exact_on_random_text(tokenizer):
    rng = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    for _ in range(300):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 60)))
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_loading_keeps_the_saved_pre_tokenizer(tokenizer):
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    for text in ODD_TEXTS:
        assert tokenizer(text).input_ids == saved.encode(text).ids


@pytest.mark.parametrize("word", ["kitchen", "Priya", "zorblat", "Straße"])
def test_a_word_has_the_same_tokens_everywhere(tokenizer, word):
    alone = tokenizer(word).input_ids
    for before, after in [(" ", " "), ('"', '"'), ("\n", "."), ("_", "_"), ("(", ")")]:
        ids = tokenizer(before + word + after).input_ids
        assert ids[1:-1] == alone, (before, after)


# --- the chat template ----------------------------------------------------------------------------------------


def calls(arguments_as_text):
    """Two parallel calls, the second without the `function` wrapper."""
    first, second = {"z": "schön 🙂", "a": 3}, {}
    if arguments_as_text:
        first, second = json.dumps(first), json.dumps(second)
    return [
        {"type": "function", "function": {"name": "paint_fence", "arguments": first}},
        {"name": "no_parameters", "arguments": second},
    ]


def conversations():
    """Every message shape that the script supports, as (name, messages)."""
    question, again = {"role": "user", "content": "Paint it.\n  über "}, {"role": "user", "content": "and now?"}
    wrapped = {"role": "user", "content": "<tool_response>\nold style\n</tool_response>"}
    assistants = []
    for content in [
        "",
        None,
        "Done.",
        "\n\nDone.\n",
        "<think>\nhm\n</think>\n\nDone.",
        "<think></think>Done.",
        "no start</think>\n\nDone.",
        [{"type": "text"}],
    ]:
        for extra in [
            {},
            {"reasoning_content": "\nI think.\n"},
            {"reasoning_content": ""},
            {"reasoning_content": None},
        ]:
            for tool_calls in [
                {},
                {"tool_calls": calls(False)},
                {"tool_calls": calls(True)[:1]},
                {"tool_calls": []},
                {"tool_calls": None},
            ]:
                assistants.append({"role": "assistant", "content": content, **extra, **tool_calls})
    assistants.append({"role": "assistant", "tool_calls": calls(False)})
    replies = [{"role": "tool", "content": "ok"}, {"role": "tool", "content": '{"x": "é"}'}]
    for turn in assistants:
        yield [question, turn]
        yield [question, turn, again]
        yield [question, turn, *replies[:1]]
        yield [question, turn, *replies, assistants[10]]
        yield [question, turn, *replies, turn, again, turn, replies[1], turn]
        yield [question, turn, wrapped, turn]
    yield [question]
    yield [question, question]
    yield [question, {"role": "system", "content": "late system"}, turn]
    yield [turn]
    yield [replies[0], turn]
    yield [wrapped]
    yield [{"role": "user", "content": None}]
    yield [{"role": "user", "content": "<tool_response>only opened"}, turn]
    yield [question, {"role": "stranger", "content": "?"}, turn]


def test_chat_template_writes_the_text_of_stock_qwen3(tokenizer):
    import trl

    stock = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    assert tokenizer.chat_template != stock
    systems = [[], [{"role": "system", "content": "Be bröd.\n"}]]
    switches = [
        dict(add_generation_prompt=add, **thinking)
        for add in (False, True)
        for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    compared = 0
    for messages, system, tools in itertools.product(conversations(), systems, (None, TOOLS[:1], TOOLS)):
        # The switches act on the end of the text alone, so each conversation tries one of them, in turn.
        options = dict(tools=tools, tokenize=False, **switches[compared % len(switches)])
        expected = tokenizer.apply_chat_template(system + messages, chat_template=stock, **options)
        assert tokenizer.apply_chat_template(system + messages, **options) == expected, (system + messages, options)
        compared += 1
    assert compared > 5000


def test_chat_template_is_the_one_of_the_sources(tokenizer):
    assert tokenizer.chat_template == read_template("qwen3")


# --- disjoint from data/ --------------------------------------------------------------------------------------


def frame_of(template):
    """A sentence template without its slots, case and punctuation, as a tuple of words."""
    return tuple(re.findall(r"[a-z']+", re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", template.lower())))


def names_in(node):
    """All tool and parameter names below node, a list of tools or a JSON Schema."""
    if isinstance(node, list):
        return set().union(*map(names_in, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    names = set(node["properties"]) if isinstance(node.get("properties"), dict) else set()
    return names.union(*(names_in(value) for value in node.values()))


def data_tools():
    return json.loads((ROOT / "data" / "tools.json").read_text(encoding="utf-8"))


def test_no_generated_tool_is_a_tool_of_the_data(maker):
    real = {tool["function"]["name"].lower() for tool in data_tools()}
    descriptions = {tool["function"]["description"].lower() for tool in data_tools()}
    for seed in range(600):
        for tool in maker.make_tools(random.Random(f"disjoint {seed}")):
            function = tool["definition"]["function"]
            assert function["name"].lower() not in real
            assert function.get("description", "").lower() not in descriptions
            # What makes a collision impossible: a made-up word in every name.
            assert any(word not in maker.PLAIN_WORDS for word in tool["words"])


def test_no_source_of_the_base_names_a_tool_of_the_data(maker):
    source = (ROOT / "models" / "make_tiny_qwen3.py").read_text(encoding="utf-8")
    for tool in data_tools():
        assert tool["function"]["name"] not in source
        assert tool["function"]["description"] not in source


def strings_in(node):
    """All strings below node, a constant of a module."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings_in(value)]
    if isinstance(node, (list, tuple)):
        return [text for value in node for text in strings_in(value)]
    return []


def test_no_sentence_template_is_shared_with_the_data(maker):
    data = load_module(ROOT / "data" / "make_dataset.py")
    # A phrase of the data: a constant's string with a slot, or with three words or more.
    phrases = {
        frame_of(text)
        for name, value in vars(data).items()
        if name.isupper()
        for text in strings_in(value)
        if len(text) < 300
    }
    phrases = {phrase for phrase in phrases if len(phrase) >= 2}
    assert len(phrases) > 200, "the templates of data/make_dataset.py were not found"
    ours = [
        maker.OPENERS,
        maker.CLOSERS,
        maker.LEADS,
        maker.CHATTER,
        maker.REPLIES,
        maker.QUESTIONS,
        maker.SYSTEM_TEXTS,
        maker.TRUE_MENTIONS,
        maker.FALSE_MENTIONS,
    ]
    frames = {frame_of(text) for text in strings_in(ours)}
    frames = {frame for frame in frames if len(frame) >= 2}
    assert len(frames) > 40
    assert not frames & phrases


def test_no_request_of_the_data_is_generated(maker):
    rows = json.loads((ROOT / "data" / "synthetic_finetune_dataset.json").read_text(encoding="utf-8"))
    requests = {row["input"].lower() for row in rows}
    for seed in range(200):
        _, pairs = maker.make_group(random.Random(f"requests {seed}"))
        assert not requests & {request.lower() for request, _ in pairs}


# --- the script that made it ----------------------------------------------------------------------------------


def test_generated_answers_obey_their_tools(maker):
    import jsonschema

    for seed in range(60):
        rng = random.Random(f"answers {seed}")
        tools = maker.make_tools(rng)
        schemas = {tool["name"]: tool["definition"]["function"]["parameters"] for tool in tools}
        for _ in range(10):
            _, answer = maker.make_request(tools, rng)
            for text in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer):
                call = json.loads(text)
                schema = schemas[call["name"]]
                problems = [
                    e
                    for e in jsonschema.Draft202012Validator(schema).iter_errors(call["arguments"])
                    if e.validator in ("type", "required", "enum")
                ]
                assert not problems, (call, problems)


def test_batches_train_on_answers_only_and_keep_requests_apart(maker):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids, labels, positions, groups, parts = maker.make_batch(tokenizer, 0, 0, 2).long()
    trained = labels != maker.IGNORED
    assert 0.05 < trained.float().mean() < 0.5
    for group, part in sorted({(int(g), int(p)) for g, p, t in zip(groups[0], parts[0], trained[0]) if t}):
        here = (groups[0] == group) & (parts[0] == part)
        question, answer = tokenizer.decode(ids[0][here].tolist(), skip_special_tokens=False).split(maker.BEFORE_ANSWER)
        assert tokenizer.decode(labels[0][here & trained[0]].tolist(), skip_special_tokens=False) == answer
        assert answer.endswith(maker.AFTER_ANSWER)
        prompt_length = int(((groups[0] == group) & (parts[0] == 0)).sum())
        assert positions[0][here].tolist() == list(range(prompt_length, prompt_length + int(here.sum())))
    mask = maker.make_mask(groups, parts, "sdpa")[0, 0]
    last = int(groups[0].nonzero()[-1])
    seen = mask[last].nonzero()[:, 0]
    assert set(parts[0][seen].tolist()) == {0, int(parts[0][last])} and set(groups[0][seen].tolist()) == {
        int(groups[0][last])
    }
    assert int(seen.max()) == last


def test_help_needs_no_torch():
    script = ROOT / "models" / "make_tiny_qwen3.py"
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "--output" in run.stdout
