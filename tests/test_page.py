"""The page of the report: what it says, that it asks for nothing from outside, and that hostile text stays text."""

import copy
import random
import re
import shutil
from html.parser import HTMLParser

import pytest

from tool_calling.page import draw_curve, mark_difference, render_report, shade_confusion, show_number, show_text

TOOLS = [
    "book_taxi",
    "get_weather",
    "play_music",
    "set_alarm",
    "search_the_company_knowledge_base",
    "send_message",
    "(no call)",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \u202e\0 {{ 7 * 7 }} \ud800'


def score(exact: float, broken: int) -> dict:
    shares = {
        "exact_match": exact,
        "call_exact": exact,
        "no_call": None,
        "ast_match": exact,
        "call_precision": 0.75,
        "call_recall": 0.8,
    }
    rows = dict.fromkeys(shares, 200) | {"no_call": 0, "call_precision": 200 - broken}
    intervals = {name: share and [share - 0.1, share + 0.1] for name, share in shares.items()}
    return shares | {"tool_macro_f1": 0.9, "broken_json": broken, "n": 200, "rows": rows, "interval": intervals}


def tool_share(tool: float, exact: float) -> dict:
    return {"tool": tool, "exact": exact, "interval": {"tool": [0.05, 1.0], "exact": [exact / 2, (1 + exact) / 2]}}


def failure(line: int, request: str, expected: str, got: str) -> dict:
    return {"where": f"data/x.json:{line}", "request": request, "expected": expected, "got": got, "before": "I cannot."}


def agreement(rows: int) -> dict:
    """Return how a server agrees that answers this many rows otherwise."""
    different = {
        "where": "data/x.json:17",
        "request": "Wake me at half past seven",
        "expected": answer("set_alarm", time="07:30"),
        "here": answer("set_alarm", time="07:30"),
        "served": '{"name": "set_alarm", "arguments": {"time": "19:30"}}',
        "exact": [True, False],
        "why": "the prompts are equally long: rounding, or a server that samples at temperature 0",
    }
    return {
        "model": "tuned",
        "against": "merged",
        "rows": 50,
        "equal": {"verdicts": 49, "answers": 50 - rows, "prompt_lengths": 50},
        "different": [different] * rows,
    }


def answer(name: str, **arguments) -> str:
    call = str({"name": name, "arguments": arguments}).replace("'", '"')
    return f"<tool_call>\n{call}\n</tool_call>"


def full_report() -> dict:
    """Return the report of a run in which everything was measured."""
    draw = random.Random(0)
    counts = [[28 * (i == j < 7) for j in range(8)] for i in range(8)]
    counts[1][7], counts[3][0], counts[3][3] = 2, 4, 24
    history = [
        {"step": step, "loss": 2.4 * 0.975**step + draw.random() * 0.1, "learning_rate": 2e-4}
        for step in range(1, 226, 2)
    ]
    history += [{"step": 75 * i, "eval_loss": 0.5 / i**2, "eval_exact_match": 0.6 + 0.087 * i} for i in (1, 2, 3)]
    return {
        "scores": {"base": score(0.255, 31), "adapter": score(0.855, 0), "merged": score(0.86, 0)},
        "per_tool": {
            name: {
                "support": 28,
                "base": tool_share(0.1 * i + 0.1, 0.07 * i),
                "adapter": tool_share(1.0, 0.9),
                "merged": tool_share(1.0, 0.7 + 0.05 * i),
            }
            for i, name in enumerate(TOOLS)
        },
        "confusion": {"labels": [*TOOLS, "(broken)"], "counts": counts},
        "train": {
            "loss": 0.118,
            "seconds": 165.2,
            "samples_per_second": 10.9,
            "tokens_per_second": 10405.0,
            "peak_memory_gib": 1.05,
            "tokens_computed": 318600,
            "tokens_padded": 1730700,
            "steps": 225,
            "last_step": 225,
            "kept_step": 225,
            "resumed_from": None,
            "history": history,
        },
        "data": {
            "path": "data/x.json",
            "rows": 2000,
            "train": 1800,
            "held_out": 200,
            "skipped": 0,
            "tokens": {"mean": 956, "prompt": 921, "max": 1107},
            "lengths": {
                "edges": list(range(800, 1121, 20)),
                "counts": [3, 11, 30, 64, 120, 190, 260, 310, 290, 240, 180, 120, 90, 50, 30, 12],
            },
        },
        "failures": [
            failure(
                17,
                "Wake me at half past seven, quietly please, and at nine on Sundays as ever",
                answer("set_alarm", time="07:30", day=7),
                answer("set_alarm", time="19:30", day=7),
            ),
            failure(43, "أيقظني في السابعة", answer("set_alarm", time="07:00"), answer("book_taxi", to="السابعة")),
            failure(
                91,
                "What is the weather in Paris this week?",
                answer("get_weather", city="Paris", days=7),
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"',
            ),
        ],
        "serve_check": {"server": "llama-server", **agreement(2)},
        "versions": {
            "python": "3.11.7",
            "torch": "2.14.1",
            "transformers": "5.16.0",
            "trl": "1.15.2",
            "peft": "0.21.0",
            "unsloth": None,
        },
        "args": {
            "model_id": "Qwen/Qwen3-0.6B",
            "dataset_path": "data/x.json",
            "max_samples": None,
            "num_epochs": 3,
            "learning_rate": 2e-4,
            "load_in_4bit": True,
            "seed": 3407,
            "output_dir": "outputs/qwen3_tool_calling_unsloth",
        },
        "command": "python train_qwen3_tool_calling.py --model_id Qwen/Qwen3-0.6B --dataset_path 'data/x.json'",
        "git": "abc123 (dirty)",
        "device": "NVIDIA H200",
        "finished": "2026-11-21 07:40",
    }


def minimal_report() -> dict:
    """Return the report of --eval_only: one model and no training."""
    full = full_report()
    return {
        "scores": {"model": score(0.86, 1)},
        "failures": [],
        **{key: full[key] for key in ("data", "versions", "args", "command", "device", "finished")},
        "git": None,
    }


def hostile_report() -> dict:
    """Return a report in which every text attacks the page."""

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    report = poison(full_report())
    report["per_tool"][HOSTILE] = report["per_tool"].pop("set_alarm")
    report["args"][HOSTILE] = "https://evil.example/" + "x" * 50_000
    report["failures"] = [failure(i, HOSTILE, "y" * 52_000, HOSTILE + "\n" * 5000) for i in range(200)]
    return report


class Page(HTMLParser):
    """Collects tags, attributes and the text of each element kind."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.text.setdefault(tag, []).append("")
        if tag not in ("meta", "path", "polyline", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed, in order

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag][-1] += data

    def words(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for text in self.text.get(tag, [])]


def read_page(report: dict) -> Page:
    html = render_report(report)
    html.encode("utf-8")
    assert html.startswith("<!doctype html>")
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "base", "a"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset") and not name.startswith("on")
        assert "http:" not in (value or "") and "https:" not in (value or "") and "url(" not in (value or "")
    assert "url(" not in "".join(page.text["style"]) and "@import" not in "".join(page.text["style"])
    return page


def test_full_report():
    page = read_page(full_report())
    assert page.words("h1") == ["25.5 % → 86 % of 200 answers exact"] == page.words("title")
    assert page.words("h2") == [
        "Scores",
        "Served",
        "Learning",
        "Tools",
        "Confusion",
        "Data",
        "Training",
        "Failures (3)",
        "Settings",
        "Versions",
        "Repeat this run",
    ]
    assert page.words("p")[0] == (
        "Qwen/Qwen3-0.6B, trained on 1,800 rows, measured on 200 held-out rows of data/x.json"
        ", on NVIDIA H200, 2026-11-21 07:40."
    )
    text = " ".join(page.words("body"))
    for words in ("5.4 times fewer", "318,600 instead of 1,730,700", "2 min 45 s", "1.05 GiB", "10,405", "abc123"):
        assert words in text
    assert page.words("figcaption") == ["Loss: training 0.0126, held out 0.0556", "Exact match: held out 86.1 %"]
    assert page.words("pre")[-1] == full_report()["command"]


def test_rewards_have_a_chart_and_the_loss_of_drawn_answers_has_none():
    report = full_report()
    drawn = [{"step": 1, "loss": -0.01, "reward": 0.8}, {"step": 2, "loss": 0.02, "reward": 0.9}]
    drawn[1] |= {"reward_parses": 1.0, "reward_tools": 0.95, "reward_names": 0.9, "reward_values": 0.85}
    drawn[1] |= {"reward_exact": 0.8, "groups_without_gradient": 0.25, "answers_cut": 0.01, "answer_tokens": 33.5}
    report["train"]["hard_rows_chosen"] = {"rows": 1800, "right": 1619, "trained": 353, "left_out": "ff"}
    held = [{"step": 2, "eval_loss": 0.0556, "eval_exact_match": 0.861, "eval_reward": 0.91}]
    report["train"]["history"] = [*drawn, *held]
    assert read_page(report).words("figcaption") == [
        "Reward: drawn answers 0.9, held out 0.91",
        "Loss: held out 0.0556",
        "Exact match: held out 86.1 %",
        "Drawn answers that are right in: parse 100 %, tools 95 %, argument names 90 %, values 85 %, exact 80 %",
        "Not trained: prompts without gradient 25 %, answers cut 1 %",
        "Tokens of an answer: drawn 33.5",
    ]
    page = read_page(report)
    facts = dict(zip(page.words("dt"), page.words("dd")))
    assert facts["rows left out of 1,800, as the start answers them right"] == "1,447"


def test_score_table():
    cells = read_page(full_report()).words("td")
    exact = ["200", "25.5 %15.5–35.5", "85.5 %75.5–95.5", "86.0 %76.0–96.0"]
    assert cells[:33] == [
        "",
        *exact,
        *exact,
        *["0", "–", "–", "–"],
        *exact,
        *["", "90.0 %", "90.0 %", "90.0 %"],
        *["", *["75.0 %65.0–85.0"] * 3],
        *["200", *["80.0 %70.0–90.0"] * 3],
        *["", "31", "0", "0"],
    ]
    rows = read_page(full_report()).words("th")[4:12]
    assert rows == [
        "exact",
        "exact, call expected",
        "no call, none expected",
        "AST, BFCL-like",
        "tool macro-F1",
        "call precision",
        "call recall",
        "broken calls",
    ]


def test_served_answers_stand_beside_those_here():
    page = read_page(full_report())
    [row] = [words for words in page.words("tr") if words.startswith("llama-server")]
    assert row.split() == ["llama-server", "50", "49", "48", "50"]
    html = render_report(full_report()).replace("\n", "").replace("&#34;", "'")
    assert "<div>merged ✓<pre><ins>&lt;tool_call&gt;</ins>" in html
    assert "<div>llama-server ✗<pre>{'name': 'set_alarm', 'arguments': {'time': '<del>19:30</del>'}}</pre>" in html
    assert html.count("the prompts are equally long: rounding") == 2


def test_servers_side_by_side_are_shown_with_their_first_rows():
    served = {"http://a/v1": agreement(0), "http://b/v1": agreement(13), "http://c/v1": {"model": "alone"}}
    del served["http://a/v1"]["equal"]["prompt_lengths"]
    page = read_page(minimal_report() | {"served": served})
    rows = [words.split() for words in page.words("tr") if words.startswith("http")]
    assert rows == [["http://a/v1", "50", "49", "50", "–"], ["http://b/v1", "50", "49", "37", "50"]]
    assert page.words("summary") == ["data/x.json:17 Wake me at half past seven"] * 10
    assert "3 more rows of http://b/v1 in report.json." in page.words("p")
    assert "Served" not in read_page(minimal_report() | {"served": {"model": {"model": "alone"}}}).words("h2")


def test_the_interval_of_each_tool_is_drawn():
    page = render_report(full_report())
    assert "--exact:95.0%; --tool:100.0%;\n    --low:47.5%; --high:97.5%" in page
    assert 'title="95 % interval: 47.5–97.5 %">95 %<' in page


def test_tools_are_listed_from_the_weakest():
    report = full_report()
    for name in ("play_music", "book_taxi"):
        report["per_tool"][name]["merged"]["exact"] = 0.2
    names = [name for name in read_page(report).words("th") if name in TOOLS]
    assert names[:7] == [
        "book_taxi",
        "play_music",
        "get_weather",
        "set_alarm",
        "search_the_company_knowledge_base",
        "send_message",
        "(no call)",
    ]


def test_confusion_leaves_out_what_never_occurs():
    assert shade_confusion({"labels": ["a", "b", "(broken)"], "counts": [[3, 0, 1], [0, 0, 0], [0, 0, 0]]}) == {
        "columns": ["a", "(broken)"],
        "rows": [("a", [("hit", 34, 3), ("miss", 19, 1)])],
    }


def test_curve():
    history = [{"step": 1, "loss": 3.0}, {"step": 5, "loss": float("nan")}, {"step": 10, "loss": 1.5, "eval_loss": 0}]
    curve = draw_curve(history, {"loss": "training", "eval_loss": "held out"})
    assert curve == {
        "top": "3",
        "half": "1.5",
        "steps": 10,
        "lines": [
            {"kind": "fitted", "name": "training", "points": "100.00,50.00 10.00,0.00", "last": "1.5", "dots": ""},
            {"kind": "held", "name": "held out", "points": "100.00,100.00", "last": "0", "dots": "M100.00,100.00h0"},
        ],
    }


def test_minimal_report():
    page = read_page(minimal_report())
    assert page.words("h1") == ["86 % of 200 answers exact"]
    assert page.words("h2") == ["Scores", "Data", "Settings", "Versions", "Repeat this run"]


def test_scores_of_training_rows_are_called_so():
    report = full_report()
    assert "On the held-out rows. Below each share: its 95 % interval." in read_page(report).words("p")
    report["data"]["held_out"] = 0
    page = read_page(report)
    assert "On the training rows. Below each share: its 95 % interval." in page.words("p")
    assert any(", measured on 200 training rows of " in words for words in page.words("p"))


def test_a_model_that_is_only_scored_has_no_answer_before():
    report = minimal_report() | {"failures": [{"where": "x:1", "request": "hi", "expected": "yes", "got": "no"}]}
    assert [text for text in read_page(report).words("pre") if text in ("yes", "no")] == ["yes", "no"]
    page = render_report(report | {"failures": [report["failures"][0] | {"before": "hm"}]})
    assert "<div>model<pre>hm</pre></div>" in page.replace("\n", "")


def test_the_first_failures_are_open():
    failures = [{"where": f"x:{n}", "request": "hi", "expected": "yes", "got": "no"} for n in range(5)]
    page = render_report(minimal_report() | {"failures": failures})
    assert re.findall("<details( open)?>", page) == [" open"] * 3 + [""] * 2


def test_no_failures():
    report = minimal_report()
    report["scores"]["model"]["exact_match"] = 1.0
    page = read_page(report)
    assert page.words("h1") == ["100 % of 200 answers exact"]
    assert "Every answer is the expected one." in page.words("p") and "Failures (0)" in page.words("h2")


def test_a_model_that_was_only_scored_is_the_one_that_is_named():
    report = full_report()
    report["args"] |= {"eval_only": ["models/mine"], "model_id": "Qwen/Qwen3-0.6B"}
    lead = read_page(report).words("p")[0]
    assert lead.startswith("models/mine, ") and "Qwen" not in lead
    report["scores"] = {"model": report["scores"]["merged"]}
    report["per_tool"] = {
        name: {"support": row["support"], "model": row["merged"]} for name, row in report["per_tool"].items()
    }
    assert "model model" not in (page := render_report(report)) and "called by the model." in page


def test_models_side_by_side_are_called_by_their_names():
    report = full_report()
    del report["train"]
    report["args"]["eval_only"] = ["some/a", "some/b"]
    first, last = report["scores"]["merged"], report["scores"]["base"]
    report["scores"] = {"some/a": first, "some/b": last}
    report["per_tool"] = {
        name: {"support": row["support"], "some/a": row["merged"], "some/b": row["base"]}
        for name, row in report["per_tool"].items()
    }
    page = read_page(report)
    assert page.words("p")[0].startswith("some/a and some/b, measured on ")
    assert "some/b does worse than some/a." in page.words("p")
    shares = [f"{100 * score['exact_match']:.1f}".removesuffix(".0") + " %" for score in (first, last)]
    assert page.words("h1") == [f"{shares[0]} and {shares[1]} of 200 answers exact"]
    assert "Grey is some/a, green some/b." in render_report(report) and "some/b model" not in render_report(report)


@pytest.mark.parametrize(
    "number, shown",
    [
        (999, "999"),
        (999.4, "999"),
        (999.5, "1,000"),
        (999.7, "1,000"),
        (99.96, "100"),
        (0.12345, "0.123"),
        (1234.5, "1,234"),
        (float("nan"), None),
        (None, None),
    ],
)
def test_numbers_are_shown_with_three_digits(number, shown):
    assert show_number(number) == shown


def test_report_of_next_to_nothing():
    assert read_page({}).words("h1") == ["Trained, not measured"]
    report = full_report() | {"scores": {}, "per_tool": {}, "confusion": None, "failures": []}
    report["serve_check"] = None
    report["train"] |= {"history": [], "peak_memory_gib": None, "tokens_computed": 0}
    page = read_page(report)
    assert page.words("h1") == ["Trained, not measured"]
    assert page.words("h2") == ["Data", "Training", "Settings", "Versions", "Repeat this run"]


def test_a_worse_model_is_called_worse():
    report = full_report()
    report["scores"]["merged"]["exact_match"] = 0.1
    page = read_page(report)
    assert page.words("h1") == ["25.5 % → 10 % of 200 answers exact"]
    assert "The merged model does worse than the base model." in page.words("p")


def test_every_failure_is_listed():
    report = full_report() | {"serve_check": None}
    report["failures"] = [failure(i, f"request {i}", "a", "b") for i in range(200)]
    assert read_page(report).words("summary") == [f"data/x.json:{i} request {i}" for i in range(200)]


def test_hostile_text_stays_text():
    report = hostile_report()
    page = read_page(copy.deepcopy(report))
    shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\0", "⟨U+0000⟩").replace("\ud800", "⟨U+D800⟩")
    assert page.words("summary") == [f"{shown} {shown}"] * 2 + [f"data/x.json:{i} {shown}" for i in range(200)]
    assert page.words("pre")[-1] == shown and page.words("pre")[:6] == [shown] * 6
    assert shown in page.words("dt") and shown in page.words("th")
    assert page.words("ins")[0] == "y" * 2000
    assert page.words("pre")[6] == "y" * 2000 + "… 50,000 more characters"
    assert "https://evil.example/" + "x" * 1979 + "… 48,021 more characters" in page.words("dd")


def test_show_text():
    assert show_text("x" * 50_000) == "x" * 2000 + "… 48,000 more characters"
    assert show_text("x" * 2000) == "x" * 2000
    assert show_text("a\r\n\tb") == "a⟨U+000D⟩\n\tb"
    assert [show_text(value) for value in (None, 0, False)] == ["–", "0", "False"]


@pytest.mark.parametrize(
    "expected, got, marked",
    [
        ("", "", ("", "")),
        ("same <b>", "same <b>", ("same &lt;b&gt;", "same &lt;b&gt;")),
        (
            '{"time": "07:30"}',
            '{"time": "19:30"}',
            ("{&#34;time&#34;: &#34;<ins>07:30</ins>&#34;}", "{&#34;time&#34;: &#34;<del>19:30</del>&#34;}"),
        ),
        ("a b", "a", ("a<ins> b</ins>", "a")),
        ("a", "<del>a", ("a", "<del>&lt;del&gt;</del>a")),
    ],
)
def test_mark_difference(expected, got, marked):
    assert tuple(mark_difference(expected, got)) == marked


def test_mark_difference_of_a_long_answer_marks_one_word():
    expected = "\n".join(answer("set_alarm", time=f"{hour:02}:30", place={"room": "attic"}) for hour in range(10))
    marked, marked_too = mark_difference(expected, expected.replace("07:30", "19:30"))
    assert marked.count("<ins>") == marked_too.count("<del>") == 1 and "<ins>07:30</ins>" in marked


@pytest.mark.slow
@pytest.mark.parametrize("make_report", [full_report, minimal_report, hostile_report])
def test_in_a_browser(make_report, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    path, requests, messages = tmp_path / "report.html", [], []
    path.write_text(render_report(make_report()), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.goto(path.as_uri())
        for is_open in (False, True):
            page.eval_on_selector_all("details", f"all => all.forEach(one => one.open = {str(is_open).lower()})")
            for width in (1400, 1200, 800, 400, 360):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert requests == [path.as_uri()] and messages == []
