"""The dry run: what a run would do, before it is paid for."""

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment

from tool_calling.data.examples import Checked, Example
from tool_calling.data.messages import is_trained
from tool_calling.data.rows import name_file
from tool_calling.data.splits import (
    digest_prompts,
    digest_tools,
    find_first_answer,
    find_leaks,
    find_warnings,
    list_calls,
)
from tool_calling.data.variants import list_called
from tool_calling.editions import Variation, count_refusals
from tool_calling.engines.hub import check_kind, find_base, find_tokenizer, load_config, load_tokenizer
from tool_calling.engines.tokens import fit_config
from tool_calling.files import digest, write_file
from tool_calling.prompts import HIDDEN, render_text
from tool_calling.run_folder import mark_output
from tool_calling.samples import (
    NOT_HELD_OUT,
    Rendering,
    Sample,
    count_origins,
    drop_long,
    list_plain,
    make_compact,
    render_examples,
    set_apart,
    show_rows,
    to_sides,
)
from tool_calling.terminal import UserError, hide_secrets, list_first, plural, print_safely, shorten, warn

LISTED = 1000  # rows that audit.json names for each finding; all are counted
TEMPLATE = Path(__file__).with_name("audit.txt.jinja")


class Characters:
    """Stands in for a tokenizer that cannot be had: each character is a token, in a plain form of Qwen3's template."""

    eos_token, name_or_path, chat_template, added_tokens_decoder = "<|im_end|>", "", "", {}

    def __call__(self, texts: list[str], **options) -> dict:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def apply_chat_template(self, messages: list[dict], tools=None, add_generation_prompt=False, **options) -> str:
        listed = [json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools or []]
        text = "".join(["<tools>\n", *listed, "</tools>\n"]) if tools and self.chat_template != HIDDEN else ""
        for message in messages:
            thought = message.get("reasoning_content")
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
            text += f"<|im_start|>{message['role']}\n" + (f"<think>\n{thought}\n</think>\n\n" if thought else "")
            text += message["content"] + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
            text += self.eos_token + "\n"
        return text + "<|im_start|>assistant\n" * add_generation_prompt


def find_model(model_id: str, trust: bool, template: str | None) -> tuple:
    """Return (tokenizer or Characters, why there is no tokenizer or "", the config or None)."""
    try:
        base, flag = find_base(model_id)
        tokenizer = load_tokenizer(find_tokenizer(model_id, base), trust, template=template)
    except UserError as error:
        return Characters(), str(error), None
    try:
        config = load_config(base, flag, trust)
    except UserError:
        return tokenizer, "", None
    return tokenizer, "", fit_config(check_kind(config, base, flag), tokenizer)


def audit_inputs(sides: list[Checked]) -> dict:
    """Return {file or split of a dataset: what its rows are, where their tools come from, which keys are not read}."""
    kinds = ("formats", "calls_in_text", "tools", "not_read")
    files: dict[str, dict] = defaultdict(
        lambda: {"valid": 0, "with_problems": 0, "thinking_turns": 0} | {kind: Counter() for kind in kinds}
    )
    for side in sides:
        for example in side.examples:
            file = files[name_file(example.source)]
            file["valid"] += 1
            file["thinking_turns"] += sum("reasoning_content" in turn for turn in filter(is_trained, example.messages))
            file["formats"][example.format] += 1
            file["calls_in_text"].update([example.syntax] if example.syntax else [])
            file["tools"]["filled" if example.filled else "brought" if example.tools else "none"] += 1
        for source in {source for source, _ in side.problems}:
            files[name_file(source)]["with_problems"] += 1
        for name, unread in side.unread_in.items():
            files[name]["not_read"].update({f"{place} {shorten(key)}": n for (place, key), n in unread.items()})
    return files


def audit_calls(examples: list[Example]) -> dict:
    """Return how many tools and calls the rows have, and the shares of rows without a call and with parallel calls."""
    calls = [list_calls(example) for example in examples]
    counts = Counter(name for turns in calls for names in turns for name in names)
    lists = dict(zip(digest_tools(examples), (example.tools for example in examples)))
    tools = {digest(tool): tool["function"]["name"] for listed in lists.values() for tool in listed}
    return {
        "formats": dict(Counter(example.format for example in examples)),
        "tools": {"distinct": len(tools), "lists": len(lists)},
        "calls_per_tool": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "never_called": sorted({*tools.values()} - counts.keys()),
        "no_call_share": sum(not turns for turns in calls) / len(examples),
        "parallel_share": sum(any(len(names) > 1 for names in turns) for turns in calls) / len(examples),
    }


def count_tool_tokens(tokenizer, examples: list[Example]) -> list[int]:
    """Return for each example how much longer its tools make the prompt; computed once for each list of tools."""
    keys, sizes = [*zip(digest_tools(examples), (example.messages[0]["role"] for example in examples))], {}
    for example, key in zip(examples, keys):
        if key not in sizes:
            render = partial(render_text, tokenizer, example.messages[: find_first_answer(example)])
            prompts = [render(tools=tools, add_generation_prompt=True) for tools in (example.tools or None, None)]
            long, short = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            sizes[key] = len(long) - len(short)
    return [sizes[key] for key in keys]


def summarise(values: list[int]) -> dict:
    """Return mean, percentiles (between two values: in proportion) and maximum."""
    percentiles = {f"p{share}": round(float(np.percentile(values, share)), 1) for share in (50, 90, 95, 99)}
    return {"mean": round(float(np.mean(values)), 1), **percentiles, "max": max(values)}


def audit_sizes(tokenizer, examples: list[Example], groups: list[list[Sample]]) -> dict:
    """Return how many tokens each part of a trained turn has: tools, prompt without them, answer, and all."""
    rendered = [(example, group) for example, group in zip(examples, groups) if group]
    counts = count_tool_tokens(tokenizer, [example for example, _ in rendered])
    turns = [(count, turn) for count, (_, group) in zip(counts, rendered) for turn in group]
    parts = {
        "tools": [count for count, _ in turns],
        "prompt": [turn.prompt_length - count for count, turn in turns],
        "answer": [len(turn.input_ids) - turn.prompt_length for _, turn in turns],
        "all": [len(turn.input_ids) for _, turn in turns],
    }
    return {name: summarise(values) for name, values in parts.items()} if turns else {}


def audit_lengths(groups: list[list[Sample]], limit: int) -> dict:
    """Return the smallest limit that loses no turn, the rows with turns over `limit`, and how many turns these are."""
    sizes = [(group[0].source, [len(turn.input_ids) for turn in group]) for group in groups if group]
    return {
        "max_seq_length": limit,
        "smallest": max((max(turns) for _, turns in sizes), default=0),
        "too_long": [(source, max(turns)) for source, turns in sizes if max(turns) > limit],
        "turns_too_long": sum(size > limit for _, turns in sizes for size in turns),
    }


def list_some(found: list) -> dict:
    """Return how many were found, and as many of them as audit.json lists."""
    return {"count": len(found), "rows": found[:LISTED]}


def drop_ids(message: dict) -> dict:
    """Return a message without the ids of its calls, which no prompt shows."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    return rest | ({"tool_calls": calls} if calls else {})


def audit_repeats(examples: list[Example], held_out: list[Example]) -> dict:
    """Return pairs of sources: equal rows, equal requests with different first answers, requests on both sides."""
    rows, requests, duplicates, conflicts, both = {}, {}, [], [], [*examples, *held_out]
    for example, tools, request in zip(both, digest_tools(both), digest_prompts(both)):
        messages = [*map(drop_ids, example.messages)]
        answer = messages[find_first_answer(example)]
        earlier = rows.setdefault((tools, digest(messages)), example.source)
        if earlier != example.source:  # or it is repeated because the user asked for it
            duplicates.append((earlier, example.source))
        asked, expected = requests.setdefault(request, (example.source, answer))
        if answer != expected:
            conflicts.append((asked, example.source))
    leaks = find_leaks(examples, held_out)
    found = {"duplicates": duplicates, "conflicts": conflicts, "held_out_in_training": leaks}
    return {name: list_some(pairs) for name, pairs in found.items()}


class Data:
    """The checked rows of both sides, rendered, and all their problems; `missing` says why there is no tokenizer."""

    def __init__(self, sides: list[Checked], tokenizer, missing: str, rendering: Rendering, variation: Variation):
        self.sides, self.tokenizer, self.missing, self.rendering = sides, tokenizer, missing, rendering
        self.limit = sys.maxsize if missing else rendering.max_seq_length  # in tokens: it says nothing of characters
        self.total = sum(side.total for side in sides)
        examples = [side.examples for side in sides]
        self.groups, unrendered = render_examples(tokenizer, sum(examples, []), sys.maxsize)
        self.kept, too_long = drop_long(self.groups, self.limit)
        self.problems = [*dict.fromkeys([*sides[0].problems, *sides[1].problems, *unrendered, *too_long])]
        both = sum(examples, [])
        train, test = to_sides(*examples, self.kept, rendering.train_test_split)
        train, test = set_apart(train, test, both, rendering.holdout_tools)
        self.plain = make_compact(tokenizer, train, both, rendering.compact_tools, self.limit)
        self.held_out, self.unseen = list_plain(test), [sample for sample in test if sample.variant]
        variation = replace(variation, max_seq_length=self.limit)
        self.train, self.facts = variation.vary(tokenizer, self.plain, both)
        rows = {sample.row: both[sample.row] for sample in self.plain}
        self.refusals = 0 if variation.augment else count_refusals([*rows.values()], variation.seed)

    def audit(self) -> dict:
        """Return what the rows are and call, how long they are, and what is wrong with them."""
        examples, valid = [side.examples for side in self.sides], sum(map(bool, self.kept))
        both, compact = sum(examples, []), [sample for sample in self.plain if sample.compact]
        unmeasured = self.train and not self.held_out and self.rendering.train_test_split > 0  # a share of 0 is meant
        return {
            "rows": {
                "total": self.total,
                "valid": valid,
                "with_problems": self.total - valid,
                "training": count_origins(self.plain),
                "held_out": count_origins(self.held_out),
                **({"unseen": count_origins(self.unseen)} if self.rendering.holdout_tools else {}),
                **({"compact": count_origins(compact)} if self.rendering.compact_tools else {}),
            },
            "inputs": audit_inputs(self.sides),
            **audit_calls(both),
            "problems": list_some(self.problems),
            "unit": "characters" if self.missing else "tokens",
            "tokenizer_missing": self.missing,
            "turns": sum(map(len, self.groups)),
            "without_call": sum(not list_called(both[row].messages) for row in {turn.row for turn in self.plain}),
            **({"augment": self.facts._asdict()} if self.facts else {"would_refuse": self.refusals}),
            "sizes": audit_sizes(self.tokenizer, both, self.groups),
            "length": {} if self.missing else audit_lengths(self.groups, self.limit),
            "repeats": audit_repeats(*examples),
            "warnings": find_warnings(*examples) + ([NOT_HELD_OUT] if unmeasured else []),
        }


def show_audit(audit: dict) -> None:
    """Print what the rows are, call and repeat, how long they are, and what a run would compute, hold and write."""
    screen = Environment(trim_blocks=True, lstrip_blocks=True)
    screen.filters |= {"number": "{:,}".format, "percent": "{:.1%}".format, "plural": plural, "some": list_first}
    screen.filters["counts"] = lambda counts: list_first((f"{count:,} {name}" for name, count in counts.items()), 8)
    print_safely(screen.from_string(TEMPLATE.read_text(encoding="utf-8")).render(audit).rstrip())


def finish_audit(audit: dict, data: Data, shown: int | None, settings: dict) -> dict:
    """Print the audit, its warnings and the row `shown`; return what is written to audit.json."""
    show_audit(audit)
    if data.facts:
        data.facts.show()
    for warning in audit["warnings"]:
        warn(warning)
    if shown and data.missing:
        warn("--show_row: without the tokenizer a row cannot be shown as the model sees it")
    elif shown:
        trained = {(sample.row, sample.turn) for sample in data.train}  # some with other tools than their rows bring
        rendered = [sample for group in data.groups for sample in group]
        others = [turn for turn in rendered if (turn.row, turn.turn) not in trained]
        show_rows(data.tokenizer, [*data.train, *others], shown)
    return write_audit(audit, settings, settings["output_dir"])


def write_audit(audit: dict, settings: dict, folder: str) -> dict:
    """Write audit.json into the output folder and return what it holds; the run.yaml of an earlier run stays."""
    mark_output(settings, folder)
    text = hide_secrets(json.dumps(audit, indent=1, ensure_ascii=False))
    write_file(Path(folder) / "audit.json", text)
    return json.loads(text)
