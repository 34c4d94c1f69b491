"""Other families of chat models: each renders, shares and scores through its own template and architecture."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
import transformers
import trl
from conftest import ALARM, TINY, WEATHER, native, write_jsonl
from conversations import ASK, CONVERSATIONS, calls, says, score_answer, supervised
from jobs import run_forked
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from small import make_schedule
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen3MoeConfig

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.data.examples import Example
from tool_calling.engines.answers import find_stop_tokens, generate_answers
from tool_calling.engines.hub import check_dropout, check_model, count_parameters, load_tokenizer
from tool_calling.engines.loading import load_base, warn_of_frozen_experts
from tool_calling.parsers import PARSERS, parse_calls
from tool_calling.prompts import find_date
from tool_calling.run_folder import Run
from tool_calling.samples import Sample, render_examples
from tool_calling.saving.merge import Trained, merge_adapter, save_adapter, save_whole
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.scores import read_calls
from tool_calling.streams import count_tokens
from tool_calling.terminal import UserError
from tool_calling.training.loop import load_trained, train
from tool_calling.training.selfcheck import compare_sharing

SHAPE = {
    "vocab_size": 4352,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_0|>",
]
FAMILIES = {  # name: (template of TRL, configuration, end of an answer, what the serving prompt ends with)
    "qwen2.5": ("qwen2_5", "Qwen2Config", {}, "<|im_end|>", "<|im_start|>assistant\n"),
    "qwen3-2507": ("qwen3_instruct_2507", "Qwen3Config", {"head_dim": 16}, "<|im_end|>", "<|im_start|>assistant\n"),
    "qwen3-moe": (
        "qwen3",
        "Qwen3MoeConfig",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
        "<|im_end|>",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "llama3.2": ("llama3_2", "LlamaConfig", {}, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
}


def make_tokenizer(name: str):
    """Return the embedded base's tokenizer with the special tokens and the template of a family."""

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template, _, _, end, _ = FAMILIES[name]
    if name == "llama3.2":
        tokenizer.add_special_tokens({"bos_token": LLAMA_TOKENS[0], "additional_special_tokens": LLAMA_TOKENS[1:]})
        tokenizer.pad_token = None  # as in Meta's own
    tokenizer.eos_token = end
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def make_model(name: str, folder: Path) -> Path:
    """Save a small random model of a family with its tokenizer, and return its folder."""

    _, config, more, _, _ = FAMILIES[name]
    tokenizer, config = make_tokenizer(name), getattr(transformers, config)(**SHAPE, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from uniform: greedy answers are no toss-up
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
        ["<|eot_id|>", "<|eom_id|>"] if name == "llama3.2" else ["<|im_end|>", "<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """(name, folder of a small random model) of each family."""
    return request.param, make_model(request.param, tmp_path_factory.mktemp(request.param))


def render(tokenizer, messages: list[dict], tools=(WEATHER, ALARM), date=None) -> tuple[list, list]:
    return render_examples(tokenizer, [Example("x:1", messages, list(tools))], 4096, date)


def is_rendered(name: str, messages: list[dict]) -> bool:
    """Say whether the family's template has a place for all that the messages hold."""
    several = any(len(m.get("tool_calls", [])) > 1 or m.get("tool_calls") and m["content"] for m in messages)
    return not (name == "llama3.2" and several) and (
        name == "qwen3-moe" or not any("reasoning_content" in m for m in messages)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_trained_as_served(name):
    tokenizer, count = make_tokenizer(name), 0
    for messages in CONVERSATIONS.values():
        (samples,), problems = render(tokenizer, messages)
        assert bool(problems) != is_rendered(name, messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, sample in zip(turns, samples):
            thinks = "reasoning_content" in messages[turn]
            served = tokenizer.apply_chat_template(
                messages[:turn],
                tools=[WEATHER, ALARM],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                enable_thinking=thinks,
            )
            assert sample.input_ids[: sample.prompt_length] == served
            assert thinks or tokenizer.decode(served).endswith(FAMILIES[name][4])
            answer, end = supervised(tokenizer, sample), FAMILIES[name][3]
            assert answer == sample.completion + end and end not in sample.completion
            assert read_calls(sample.completion, sample.parser) == [
                call["function"] for call in messages[turn].get("tool_calls", [])
            ]
            assert sample.request == [m["content"] for m in messages[:turn] if m["role"] == "user"][-1]
            count += 1
    assert count == {"llama3.2": 12, "qwen3-moe": 20}.get(name, 17)


def test_llama_writes_calls_as_its_template_does():
    tokenizer = make_tokenizer("llama3.2")
    (samples,), _ = render(tokenizer, CONVERSATIONS["tool reply"], date="2024-07-26")
    assert [supervised(tokenizer, sample) for sample in samples] == [
        '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        "Yes.<|eot_id|>",
    ]
    prompt = tokenizer.decode(samples[1].input_ids[: samples[1].prompt_length])
    assert prompt.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    )
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n" in prompt  # the tool's reply
    days = time.strftime("%Y-%m-%d"), find_date(tokenizer), time.strftime("%Y-%m-%d")
    assert days[1] in (days[0], days[2])  # midnight may pass meanwhile
    assert find_date(make_tokenizer("qwen2.5")) is None


@pytest.mark.parametrize(
    "name, messages, problem",
    [
        (
            "llama3.2",
            CONVERSATIONS["two replies"],
            "message 2: the chat template refuses it: This model only supports single tool-calls at once!",
        ),
        (
            "llama3.2",
            CONVERSATIONS["content beside a call"],
            "message 2: the chat template leaves out its content; remove it, or choose another model",
        ),
        (
            "qwen3-2507",
            CONVERSATIONS["thinking after a reply"],
            "message 2: the chat template leaves out its reasoning_content; remove it, or choose another model",
        ),
        (
            "llama3.2",
            [{"role": "user", "content": "hi <|reserved_special_token_0|>"}, says("y")],
            "message 1: holds the special token <|reserved_special_token_0|>, which would forge a turn; remove it",
        ),
        (
            "llama3.2",
            [ASK, says('{"name": "get_weather", "parameters": {"city": "Rome"}}')],  # served, this would be a call
            'message 2: its calls do not survive rendering and parsing: "{\\"name\\": \\"get_weather\\", '
            '\\"parameters\\": {\\"city\\": \\"Rome\\"}}"',
        ),
        (
            "llama3.2",
            [ASK, says('{"name": "Bob"')],
            'message 2: would be read as a broken call: "{\\"name\\": \\"Bob\\""',
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_a_problem(name, messages, problem):
    assert render(make_tokenizer(name), messages) == ([[]], [("x:1", problem)])


def test_a_template_that_cannot_do_what_the_rows_need_ends_the_run():
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.name_or_path, whole = "some/model", tokenizer.chat_template
    expected = f"; expected a chat template with tools whose calls one of vLLM's parsers reads: {', '.join(PARSERS)}"
    expected += "; --chat_template gives a base another one"

    def refusal(template: str, messages: list[dict]) -> str:
        tokenizer.chat_template = template
        with pytest.raises(UserError) as error:
            render(tokenizer, messages)
        return str(error.value).removeprefix("some/model: the chat template ").removesuffix(expected)

    plain = (Path(trl.__file__).parent / "chat_templates" / "phi3.jinja").read_text()
    assert refusal(plain, CONVERSATIONS["one call"]) == "leaves out the tools"
    mute = whole.replace('message.role == "tool"', 'message.role == "none"')
    assert refusal(mute, CONVERSATIONS["tool reply"]) == "leaves out the replies of tools"
    other = whole.replace("'\\n<tool_call>\\n{", "'\\n<function>\\n{")
    assert refusal(other, CONVERSATIONS["one call"]).startswith(
        r'writes calls in a way that cannot be read back: "<function>\n{\"name\": \"probe_tool\", '
    )
    assert refusal("{{ raise_exception('no ' ~ 'tools') if tools }}" + whole, CONVERSATIONS["one call"]) == (
        "refuses it: no tools"
    )
    # What the rows do not use is not asked for.
    tokenizer.chat_template = mute + "{{ raise_exception('no') if messages[-1].role == 'tool' }}"
    assert render(tokenizer, CONVERSATIONS["one call"])[1] == []
    tokenizer.chat_template = plain.replace("<|end|>", "<|im_end|>")
    assert render(tokenizer, [ASK, says("Yes.")], tools=[])[1] == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hello", []),
        ("", []),
        ('{"sentiment": "good"}', []),
        ('{"name": "Bob"}', []),
        ("{a, b} is a set", []),
        ("[1]", []),
        ('{"name": "f", "parameters": {"a": "}"}}', [{"name": "f", "arguments": {"a": "}"}}]),
        ('<|python_tag|>{"name": "f", "arguments": {}}\n', [{"name": "f", "arguments": {}}]),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}],
        ),
        ('{"name": "f", "parameters": {', None),
        ('{"name": "f", "parameters": {}} and more', None),
    ],
)
def test_llama_calls_are_parsed_as_servers_do(text, expected):
    if expected is not None:
        assert parse_calls(text, "llama3_json") == expected
        return
    with pytest.raises(ValueError):
        parse_calls(text, "llama3_json")


def test_llama_answers_are_scored_by_their_calls():
    def score(got):
        return score_answer(
            got, '{"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}', [WEATHER], "llama3_json"
        )[:3]

    assert score('{"parameters": {"days": 2, "city": "Rome"}, "name": "get_weather"}') == (True, True, False)
    assert score('{"name": "get_weather", "parameters": {"city": "rome", "days": 2}}') == (False, True, False)
    assert score('{"name": "get_weather", "parameters": "Rome"}') == (False, False, True)
    assert score('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>') == (
        False,
        False,
        False,
    )  # a server with Llama's parser makes no call of it
    assert score_answer("Rome", "Rome", [], "llama3_json")[:3] == (True, True, False)


def test_a_base_ends_its_answers_as_its_template_does(tmp_path):
    """Qwen's bases have <|endoftext|> as eos_token, at which their chat template never ends an answer."""
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "<|im_end|>"
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not end an answer with a token of its own"):
        load_tokenizer(str(tmp_path))


def to_samples(tokenizer) -> list[Sample]:
    """Return eight short turns of six conversations that every family renders."""
    rows = [[{"role": "user", "content": f"rain in {city}?"}, calls(city)] for city in ("Rome", "Oslo", "Lima", "Bonn")]
    rows += [CONVERSATIONS["tool reply"], CONVERSATIONS["no call"], CONVERSATIONS["system"]]
    groups, problems = render_examples(
        tokenizer, [Example(f"x:{i}", row, [WEATHER, ALARM]) for i, row in enumerate(rows)], 4096
    )
    assert problems == []
    return [sample for group in groups for sample in group]


def test_sharing_and_answers_are_exact_in_every_family(family):
    name, folder = family
    args = script.parse_args(["--model_id", str(folder), "--no-load_in_4bit", "--lora_rank", "4"])
    config = check_model(str(folder))
    tokenizer = load_tokenizer(str(folder))
    model = script.load_model(args, "transformers", make_schedule([], 8), tokenizer)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert count_parameters(config, 4)["adapter"] == sum(trained.values())
    assert any("mlp" in n for n in trained)  # experts, too
    for n, parameter in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = to_samples(tokenizer)
    change, limit = compare_sharing(model, rows, (), "transformers")
    assert change.loss < 1e-5 and change.gradient < limit.gradient == 1e-4 and change.token < limit.token < 1e-2
    assert count_tokens(rows) < 0.4 * sum(len(row.input_ids) for row in rows)

    stops = find_stop_tokens(model, tokenizer)
    assert tokenizer.eos_token_id in stops and len(stops) == 2
    model.eval()
    alone = []
    for row in rows:
        prompt = torch.tensor([row.input_ids[: row.prompt_length]])
        written = model.generate(
            input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=0, use_cache=True
        )[0, prompt.shape[1] :].tolist()
        alone.append(tokenizer.decode([token for token in written if token not in stops]))
    assert len({*alone}) > 1
    assert generate_answers(model, tokenizer, rows, args.eval_batch_size, 12, "adapter") == alone


def to_args(folder: Path, *flags: str):
    """Return the settings of a run of two steps from `folder`/base."""
    return script.parse_args(
        [
            *("--model_id", str(folder / "base")),
            *("--output_dir", str(folder / "out")),
            *("--final_model_dir", str(folder / "final")),
            *("--max_steps", "2", "--warmup_steps", "0"),
            *flags,
        ]
    )


def to_trained(args, adapter: str | None = None) -> Trained:
    """Return what a run with these settings has trained."""
    base, method = args.model_id, args.save_method
    return Trained(base, base, None, "transformers", args.final_model_dir, method, vars(args), adapter)


def build_trainer(args):
    """Return the trainer of a run over to_samples, with a model of its own."""
    tokenizer = load_tokenizer(args.model_id)
    schedule = plan_schedule(to_samples(tokenizer), pick(Batching, args), engine="transformers")
    model = script.load_model(args, "transformers", schedule, tokenizer)
    return script.build_run_trainer(args, model, tokenizer, schedule, [], "transformers")


def test_a_checkpoint_of_all_weights_holds_the_experts(tmp_path):
    folder = make_model("qwen3-moe", tmp_path / "base")
    args = to_args(tmp_path, "--lora_rank", "0", "--learning_rate", "0.01")
    trained, fresh = (build_trainer(args) for _ in range(2))
    trained.train()
    experts = [
        name
        for name, weight in fresh.model.named_parameters()
        if "experts" in name and not torch.equal(weight, trained.model.get_parameter(name))
    ]
    assert experts
    load_trained(fresh, str(tmp_path / "out" / "checkpoint-2"))
    assert all(
        torch.equal(weight, trained.model.get_parameter(name)) for name, weight in fresh.model.named_parameters()
    )
    files = (
        path / "model.safetensors"
        for path in (folder, save_whole(to_trained(args), trained.model, load_tokenizer(args.model_id)))
    )
    names = [{*safe_open(file, "pt").keys()} for file in files]
    assert names[0] == names[1]  # as published: one by one


def test_a_mixture_of_experts_is_merged_with_its_experts(tmp_path):
    folder, ids = make_model("qwen3-moe", tmp_path / "base"), torch.arange(30)[None]
    args = to_args(tmp_path, "--no-load_in_4bit", "--learning_rate", "0.05", "--lora_rank", "4")
    check_dropout(args.lora_dropout, check_model(str(folder)), str(folder))
    trainer = build_trainer(args)
    assert train(trainer, Run(tmp_path / "out", vars(args)))["steps"] == 2
    changed = {name for name, weight in trainer.model.named_parameters() if "lora_B" in name and weight.any()}
    assert any("experts" in name for name in changed) and any("q_proj" in name for name in changed)
    tokenizer = load_tokenizer(args.model_id)
    adapter = save_adapter(trainer.model, vars(args), tokenizer)
    with torch.no_grad():
        expected, base = trainer.model.eval()(ids).logits, load_base(str(folder), False)(ids).logits
        merged = merge_adapter(to_trained(args, adapter), tokenizer)
        again = PeftModel.from_pretrained(load_base(str(folder), False), adapter).eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(base, expected, atol=0.1)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--lora_dropout 0.1: .* is a mixture of experts, whose adapters have"):
        check_dropout(0.1, check_model(str(folder)), str(folder))


def test_experts_that_get_no_adapter_are_named(capsys):

    for config in (Qwen3MoeConfig, Qwen2MoeConfig):
        model = AutoModelForCausalLM.from_config(config(**SHAPE, num_experts=2, moe_intermediate_size=32))
        warn_of_frozen_experts(model)  # full fine-tuning
        warn_of_frozen_experts(get_peft_model(model, LoraConfig(r=2, target_modules=script.TARGET_MODULES)))
    assert capsys.readouterr().err == (
        "warning: the experts of this qwen2_moe get no adapter: only the layers beside them are trained\n"
    )


@pytest.mark.slow
def test_llama_runs_from_rows_to_a_merged_model_and_resumes_on_another_day(tmp_path, monkeypatch, tools_path):

    folder = make_model("llama3.2", tmp_path / "llama")
    rows = [
        native(f"rain in {city} {day}?", ("get_weather", {"city": city}))
        for city in ("Rome", "Oslo", "Lima", "Bonn")
        for day in ("today", "on Monday", "at all")
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, native("thanks", content="Bye."), native("ok", content="Bye.")])
    arguments = [
        *("--model_id", folder),
        *("--dataset_path", tmp_path / "rows.jsonl"),
        *("--tools_path", tools_path),
        *("--output_dir", tmp_path / "out"),
        *("--final_model_dir", tmp_path / "final"),
        *("--num_epochs", 1, "--no-load_in_4bit", "--max_new_tokens", 8),
        *("--learning_rate", 0.01, "--warmup_steps", 0),
    ]
    before = time.strftime("%Y-%m-%d")
    result = run_forked(*arguments)
    after = time.strftime("%Y-%m-%d")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    day = re.search(r"the chat template writes the date into prompts: (\S+), the day this run began", result.stdout)
    assert day and day[1] in (before, after)  # midnight may pass while it runs
    assert '▶{"name": "get_weather", "parameters": {"city": ' in result.stdout
    check = next(line for line in result.stdout.splitlines() if line.startswith("check "))
    assert check.startswith("check    sharing changes the loss of 4 rows by ") and ": rounding (" in check
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failures"][0]["request"].startswith(("rain in ", "thanks", "ok"))
    assert {score["n"] for score in report["scores"].values()} == {1}
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"] == [4099, 4100]
    final = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert final.convert_ids_to_tokens([4099, 4100]) == ["<|eot_id|>", "<|eom_id|>"]

    class Reached(Exception):
        """The check of a resumed run's rows is passed."""

    def stop(*args):
        raise Reached

    strftime, later = time.strftime, time.gmtime(1e10)  # the year 2286
    monkeypatch.setattr(time, "strftime", lambda form, day=later: strftime(form, day))
    monkeypatch.setattr("tool_calling.estimates.Saving.check_disk", stop)
    resumed = [*map(str, arguments), "--resume_from_checkpoint", "--engine", "transformers"]
    with pytest.raises(Reached):
        script.main(resumed)
    run = tmp_path / "out" / "run.yaml"
    run.write_text(run.read_text().replace("prompt_date", "forgotten"))
    with pytest.raises(UserError, match="the training rows are not those in the run that .* is from"):
        script.main(resumed)
