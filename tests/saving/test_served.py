"""Servers scored by --eval_only: what they are sent, what of their answers counts, and what goes wrong with them.

The server is one of the standard library in the process of the tests, which answers by a function of the request.
"""

import json
import subprocess
import sys
import threading
from functools import partial

import pytest
from canned import Canned, completion, to_text
from conftest import ALARM, TINY, WEATHER, native, run_here, write_jsonl
from jobs import errors

from tool_calling.saving import served as module
from tool_calling.saving.merge import write_tools

KEY = "sk-a-key-of-tests"
TOOLS = [WEATHER, ALARM]
ROME = {"name": "get_weather", "arguments": {"city": "Rome"}}
WAKE = {"name": "set_alarm", "arguments": {"time": "6"}}


@pytest.fixture
def serve(monkeypatch):
    """Start Canned servers, with a key in the environment."""
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def start(reply, models=("tuned",)):
        servers.append(Canned(reply, models))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ROWS = [
    native("rain in Rome?", ("get_weather", {"city": "Rome"})),
    native("rain in Oslo?", ("get_weather", {"city": "Oslo"})),
    native("wake me at 6, and Rome?", *((call["name"], call["arguments"]) for call in (WAKE, ROME))),
    native("hi", content="Hello!"),
]


@pytest.fixture
def flags(tmp_path):
    """Flags that score ROWS with the embedded base's tokenizer."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return [
        *("--eval_dataset_path", rows, "--tools_path", tmp_path / "tools.json", "--model_id", TINY),
        *("--output_dir", tmp_path / "out", "--eval_only"),
    ]


CALLED = [{"type": "function", "function": {"name": "set_alarm", "arguments": {"time": "é"}}}]
WRONG = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "X"}}}]
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "wake me at é"},
    {"role": "assistant", "content": "", "tool_calls": CALLED},
    {"role": "tool", "content": "done"},
    {"role": "assistant", "content": "It is set."},
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "", "tool_calls": WRONG, "weight": 0},
    {"role": "tool", "content": "no such city"},
    {"role": "assistant", "content": "Where?"},
]
TURNS = [{"messages": MESSAGES, "tools": [ALARM, WEATHER]}, {"messages": [MESSAGES[1], MESSAGES[4]]}]


def request_of(body: dict) -> str:
    return body["messages"][-1]["content"]


def answer_right(body: dict, tokens=None) -> dict:
    """Answer as ROWS expect."""
    row = next(row for row in ROWS if row["input"] == request_of(body))["output"]
    calls = row.get("function_calls") or [row[key] for key in row if key == "function_call"]
    return completion(row.get("content"), *reversed(calls), tokens=tokens)


def read_report(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "eval_only" / "report.json").read_text())


def test_a_server_is_scored_on_the_held_out_rows(tmp_path, serve, flags):
    def reply(body):
        if request_of(body) == "rain in Oslo?":
            return completion("It is dry.")
        return answer_right(body)

    server = serve(reply)
    result = run_here(*flags, server.url, "--max_new_tokens", 77)
    assert result.returncode == 0, result.stderr
    assert sorted(map(request_of, server.requests)) == sorted([row["input"] for row in ROWS] + ["hi"])  # asked first
    assert request_of(server.requests[0]) == "hi"
    for body in server.requests:
        assert body == {
            "model": "tuned",
            "messages": [{"role": "user", "content": request_of(body)}],
            "tools": TOOLS,
            "temperature": 0,
            "max_tokens": 77,
        }
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    report = read_report(tmp_path)
    assert report["scores"]["model"]["exact_match"] == 0.75 and report["scores"]["model"]["broken_json"] == 0
    assert report["served"] == {"model": {"model": "tuned"}}
    assert [(row["request"], row["got"]) for row in report["failures"]] == [("rain in Oslo?", "It is dry.")]
    lines = [json.loads(line) for line in (tmp_path / "out" / "eval_only" / "answers.jsonl").open()]
    assert lines[2]["calls"] == [ROME, WAKE] and lines[2]["exact"]
    assert lines[2]["answer"] == '{"name": "get_weather", "arguments": {"city": "Rome"}}\n' + json.dumps(WAKE)
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or KEY not in file.read_text()
    assert KEY not in result.stdout + result.stderr
    assert f"server   {server.url}: tuned" in result.stdout.splitlines()


def test_turns_with_replies_of_tools_are_sent_as_openai_wants_them(tmp_path, serve, flags):
    write_jsonl(tmp_path / "rows.jsonl", TURNS)
    server = serve(lambda body: completion("Where?"))
    assert run_here(*flags[:2], *flags[4:], server.url, "--eval_batch_size", 1).returncode == 0

    def sent(call, name):
        return {
            "id": name,
            "type": "function",
            "function": {**call["function"], "arguments": to_text(call["function"])},
        }

    whole = [dict(message) for message in MESSAGES]
    whole[2]["tool_calls"] = [sent(CALLED[0], "call00000")]
    whole[3]["tool_call_id"] = "call00000"
    whole[6] = {"role": "assistant", "content": "", "tool_calls": [sent(WRONG[0], "call00001")]}
    whole[7]["tool_call_id"] = "call00001"
    whole[2]["tool_calls"][0]["function"]["arguments"] = '{"time": "é"}'
    first, *bodies = [{key: body.get(key) for key in ("messages", "tools")} for body in server.requests]
    tools = [ALARM, WEATHER]
    turns = [{"messages": whole[:length], "tools": tools} for length in (2, 4, 8)]
    assert first == turns[0] and bodies == [*turns, {"messages": whole[1:2], "tools": None}]


@pytest.mark.parametrize(
    "reply, exact, broken",
    [
        (completion("", ROME), True, False),
        (completion(None, ROME), True, False),
        (completion("<think>\nhm\n</think>\n\n", ROME), True, False),
        (completion("hm</think>I look.", ROME, WAKE), False, False),
        (completion("", {"name": "get_weather", "arguments": '{"city": '}), False, True),
        (completion("", {"name": "get_weather", "arguments": '["Rome"]'}), False, True),
        (completion("", {"name": "get_weather", "arguments": ""}), False, True),
        (completion(f"<tool_call>{json.dumps(ROME)}</tool_call>"), False, True),
        (completion("<tool_call>{"), False, True),
        (completion("<think>It never ends"), False, False),
        (completion("No."), False, False),
        (completion(""), False, False),
    ],
)
def test_what_counts_of_an_answer_is_what_a_client_gets(tmp_path, serve, flags, reply, exact, broken):
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    result = run_here(*flags, serve(lambda body: reply).url)
    assert result.returncode == 0, result.stderr
    scores = read_report(tmp_path)["scores"]["model"]
    assert (scores["exact_match"] == 1, scores["broken_json"] == 1) == (exact, broken)


def test_rows_without_tools_are_scored_by_their_text(tmp_path, serve, flags):
    rows = [native("hi", content="Hello!"), native("bye", content="Bye!")]
    write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": row["input"]},
                    {"role": "assistant", "content": row["output"]["content"]},
                ]
            }
            for row in rows
        ],
    )
    server = serve(lambda body: completion(" Hello! "))
    assert run_here(*flags[:2], *flags[4:], server.url).returncode == 0
    assert all("tools" not in body for body in server.requests)
    scores = read_report(tmp_path)["scores"]["model"]
    assert scores["exact_match"] == 0.5 and scores["macro_f1"] == pytest.approx(1 / 3)


def test_a_failing_request_is_tried_again(tmp_path, serve, flags):
    tried = []

    def reply(body):
        tried.append(request_of(body))
        if tried.count(request_of(body)) == 1:
            return (503, {"error": {"message": "busy"}}) if request_of(body) != "rain in Rome?" else None
        return answer_right(body)

    result = run_here(*flags, serve(reply).url)
    assert result.returncode == 0 and "warning" not in result.stderr
    assert read_report(tmp_path)["scores"]["model"]["exact_match"] == 1 and len(tried) == 1 + 2 * len(ROWS)


def test_rows_whose_requests_fail_are_wrong_and_named(tmp_path, serve, flags, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 1)

    def reply(body):
        if "Oslo" in request_of(body):
            return 400, {"error": {"message": "the prompt is too long"}}
        return completion("No.") if "wake" in request_of(body) else answer_right(body)

    server = serve(reply)
    result = run_here(*flags, server.url)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        f"warning: {server.url}: 1 of 4 requests failed and count as wrong: {tmp_path / 'rows.jsonl'}:2 (answers 400: "
        "the prompt is too long)"
    ]
    assert read_report(tmp_path)["scores"]["model"]["exact_match"] == 0.5


def fail(status, message):
    return lambda body: (status, {"error": {"message": message}})


@pytest.mark.parametrize(
    "reply, message",
    [
        (fail(401, f"wrong key {KEY}"), "refuses the key in OPENAI_API_KEY (401)"),
        (fail(403, "no"), "refuses the key in OPENAI_API_KEY (403)"),
        (
            fail(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
            'answers 400: "auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; '
            "vLLM reads calls with --enable-auto-tool-choice --tool-call-parser hermes, llama-server with --jinja",
        ),
        (fail(404, "The model `tuned` does not exist."), "answers 404: The model `tuned` does not exist."),
        (fail(500, "out of luck"), "answers 500: out of luck"),
        (
            lambda body: None,
            "cannot be reached (Server disconnected without sending a response.); start the server, or "
            "give its address",
        ),
        (lambda body: "<html>hello</html>", 'sends nothing that OpenAI\'s API has: "<html>hello</html>"'),
        (lambda body: {"error": "busy"}, "sends nothing that OpenAI's API has: "),
        (lambda body: [], "sends nothing that OpenAI's API has: []"),
        (lambda body: {"choices": []}, "sends nothing that OpenAI's API has: "),
        (lambda body: {"choices": [{"message": {"content": 7}}]}, "sends nothing that OpenAI's API has: "),
    ],
)
def test_a_server_that_answers_no_request_is_one_line(serve, flags, monkeypatch, reply, message):
    monkeypatch.setattr(module, "RETRIES", 1)
    server = serve(reply)
    result = run_here(*flags, server.url)
    assert result.returncode == 1 and len(errors(result)) == 1 and KEY not in result.stderr
    assert errors(result)[0].startswith(f"error: --eval_only {server.url}: {message}")
    assert len(server.requests) <= 2  # no other row is sent


def test_a_server_that_takes_too_long_is_one_line(serve, flags, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 0)
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    ended = threading.Event()
    server = serve(lambda body: ended.wait(5) and None)
    result = run_here(*flags, server.url)
    ended.set()
    assert errors(result) == [f"error: --eval_only {server.url}: gives no answer in 0.2 s"]


def test_a_server_that_fails_for_most_rows_ends_the_run(serve, flags, monkeypatch):
    source = flags[1]
    monkeypatch.setattr(module, "RETRIES", 0)
    server = serve(lambda body: completion("Hello!") if request_of(body) == "hi" else (500, {"error": "down"}))
    result = run_here(*flags, server.url)
    assert result.returncode == 1
    assert errors(result) == [
        f"error: --eval_only {server.url}: most requests fail; the first: {source}:1 (answers 500: down)"
    ]


def test_a_key_that_is_refused_later_ends_the_run(serve, flags):
    server = serve(lambda body: completion("Hello!") if request_of(body) == "hi" else (401, {"error": KEY}))
    result = run_here(*flags, server.url)
    assert errors(result) == [f"error: --eval_only {server.url}: refuses the key in OPENAI_API_KEY (401)"]


def test_a_server_of_several_models_needs_a_name(serve, flags):
    server = serve(answer_right, ["base", "tuned"])
    assert errors(run_here(*flags, server.url)) == [
        f"error: --eval_only {server.url}: has 2 models: base, tuned; name one with --eval_model"
    ]
    assert server.requests == []
    assert run_here(*flags, server.url, "--eval_model", "tuned").returncode == 0
    assert {body["model"] for body in server.requests} == {"tuned"}
    result = run_here("--eval_model", "tuned", "--eval_only", TINY)
    assert result.returncode == 2 and "--eval_model tuned is a model of a server: give its address" in result.stderr


def test_an_address_where_no_server_is_is_one_line(serve, flags, monkeypatch):
    server = serve(answer_right)
    found = errors(run_here(*flags, server.url.removesuffix("/v1")))
    assert found == [
        f"error: --eval_only {server.url.removesuffix('/v1')}: answers 404: no such page; expected the address of an "
        "OpenAI-compatible server, such as http://localhost:8000/v1"
    ]
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(module, "RETRIES", 0)
    for url, reason in (
        (server.url, "cannot be reached ([Errno 111] Connection refused); start the server, or give its address"),
        ("http://", ""),
        ("http://localhost:port/v1", ""),
    ):
        result = run_here(*flags, url)
        assert result.returncode == 1 and len(errors(result)) == 1
        assert errors(result)[0].startswith(f"error: --eval_only {url}: {reason}")
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    assert errors(run_here(*flags, server.url)) == ["error: OPENAI_API_KEY: holds characters that no key has"]


def test_a_server_on_this_machine_is_asked_without_a_proxy(serve, flags, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for url in (serve(answer_right).url, serve(answer_right).url.replace("127.0.0.1", "localhost")):
        assert run_here(*flags, url).returncode == 0


def test_without_a_key_a_server_that_wants_one_says_so(serve, flags, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(fail(401, "no key"))
    assert errors(run_here(*flags, server.url)) == [
        f"error: --eval_only {server.url}: wants a key; set OPENAI_API_KEY (401)"
    ]


def test_rows_for_a_server_alone_need_a_tokenizer(serve, flags, tmp_path):
    server = serve(answer_right)
    [found] = errors(run_here(*flags, server.url, "--model_id", "no/such"))
    assert found.startswith("error: --model_id no/such: its tokenizer cannot be loaded: no such folder")
    assert found.endswith(
        "a server shows no tokenizer: give --model_id the model that it serves, or a folder with the same"
    )


@pytest.fixture
def local(monkeypatch):
    """Let the embedded base answer as ROWS expect; return the samples that it was asked."""
    asked = []

    def answer(model, tokenizer, samples, *_):
        asked.extend(samples)
        return [sample.completion for sample in samples]

    monkeypatch.setattr("tool_calling.saving.evaluation.load_scored", lambda *_: None)
    monkeypatch.setattr("tool_calling.saving.proof.generate_answers", answer)
    return asked


def test_served_and_scored_here_are_compared_row_by_row(tmp_path, serve, flags, local):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    lengths = {}

    def reply(body):
        request = request_of(body)
        if "Oslo" in request:
            return completion(f"<tool_call>{json.dumps(ROME)}", tokens=7, finish="length")
        return completion("Good day!", tokens=9) if request == "hi" else answer_right(body, lengths.get(request))

    server = serve(reply)
    assert run_here(*flags, TINY, server.url).returncode == 0
    lengths |= {sample.request: sample.prompt_length for sample in local}
    result = run_here(*flags, TINY, server.url)
    assert result.returncode == 0, result.stderr
    report = read_report(tmp_path)
    assert list(report["scores"]) == [str(TINY), server.url]
    [(name, agreement)] = report["served"].items()
    different = agreement.pop("different")
    assert name == server.url
    assert agreement == {
        "model": "tuned",
        "against": str(TINY),
        "rows": 4,
        "equal": {"verdicts": 3, "answers": 1, "prompt_lengths": 2},
    }
    assert [row["request"] for row in different] == ["rain in Oslo?", "wake me at 6, and Rome?", "hi"]
    assert different[0]["exact"] == [True, False] and different[0]["where"] == f"{tmp_path / 'rows.jsonl'}:2"
    assert different[0]["why"] == (
        f"its prompt has 7 tokens, the trained one {lengths['rain in Oslo?']}: it has another chat template, or "
        "renders the tools otherwise; the answer is cut at its longest length; its text holds a call that the server "
        "does not read; start it with the parser hermes (vLLM: --tool-call-parser hermes)"
    )
    assert different[1]["why"].startswith("the prompts are equally long: rounding")
    screen = result.stdout.splitlines()
    at = screen.index(
        f"served   {server.url} against {TINY}: equal are 3 of 4 verdicts, 1 of 4 answers, 2 of 4 prompt lengths"
    )
    assert [line.strip() for line in screen[at + 1 : at + 6]] == [
        f"the first that differs: {tmp_path / 'rows.jsonl'}:2  rain in Oslo?",
        'expected: <tool_call> {"name": "get_weather", "arguments": {"city": "Oslo"}} </tool_call>',
        f'{TINY}: <tool_call> {{"name": "get_weather", "arguments": {{"city": "Oslo"}}}} </tool_call> ✓',
        f"{server.url}: <tool_call>{json.dumps(ROME)} ✗",
        f"why: {different[0]['why']}",
    ]


def test_a_server_that_answers_alike_differs_in_nothing(tmp_path, serve, flags, local):
    server = serve(lambda body: answer_right(body) if "wake" not in request_of(body) else completion("", WAKE, ROME))
    result = run_here(*flags, TINY, server.url)
    agreement = read_report(tmp_path)["served"][server.url]
    assert agreement["equal"] == {"verdicts": 4, "answers": 4} and agreement["different"] == []
    assert "the first that differs" not in result.stdout


def test_a_server_that_refuses_ends_the_run_before_a_model_is_loaded(serve, flags, local):
    server = serve(fail(401, "no"))
    assert len(errors(run_here(*flags, TINY, server.url))) == 1 and local == []


def test_what_is_sent_renders_as_the_prompt_that_was_trained(tmp_path, serve, flags, local, tokenizer):
    """As vLLM does: arguments are read from their text, and the chat template gets messages and tools."""
    prompts = []

    def reply(body):
        messages = body["messages"]
        for call in (call["function"] for message in messages for call in message.get("tool_calls", [])):
            call["arguments"] = json.loads(call["arguments"])
        options = {"tools": body.get("tools"), "add_generation_prompt": True, "enable_thinking": False}
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        return completion("No.", tokens=len(tokenizer(prompts[-1], add_special_tokens=False)["input_ids"]))

    flags[1] = write_jsonl(tmp_path / "turns.jsonl", [*TURNS, *ROWS])
    result = run_here(*flags, TINY, serve(reply).url, "--eval_batch_size", 1)
    assert result.returncode == 0, result.stderr
    assert len(local) == 8 and prompts[1:] == [tokenizer.decode(row.input_ids[: row.prompt_length]) for row in local]
    [agreement] = read_report(tmp_path)["served"].values()
    assert agreement["equal"]["prompt_lengths"] == 8


def test_the_client_beside_a_model_sends_its_tools(tmp_path, serve, monkeypatch):
    write_tools(tmp_path, tuple(TOOLS))
    run = partial(subprocess.run, capture_output=True, text=True, timeout=60)
    command = [sys.executable, str(tmp_path / "client.py")]
    asked = "wake me at 6, and Rome?"
    server = serve(answer_right, ["base", "tools"])
    result = run([*command, asked, server.url])
    assert result.stdout == 'get_weather {"city": "Rome"}\nset_alarm {"time": "6"}\n', result.stderr
    [body] = server.requests
    messages = [{"role": "user", "content": asked}]
    assert body == {"model": "tools", "messages": messages, "tools": TOOLS, "temperature": 0}
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert run([*command, "hi", server.url]).stdout == "Hello!\n"
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}", "Bearer none"]
    result = run(command)
    assert result.returncode == 1 and result.stderr.startswith(
        "Ask the model that `vllm serve` serves: python client.py"
    )
