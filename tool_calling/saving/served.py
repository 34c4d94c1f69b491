"""Answers of a model behind an OpenAI-compatible server, asked as any client of it asks."""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

import openai
from rich.progress import track

from tool_calling.agreement import Reply
from tool_calling.data.examples import Example, to_row
from tool_calling.prompts import give_ids, take_answer
from tool_calling.samples import Sample
from tool_calling.saving.proof import Questions
from tool_calling.scores import read_answer, to_calls
from tool_calling.terminal import UserError, cut_text, list_first, say, shorten, warn

KEY = "OPENAI_API_KEY"
HERE = ("all://localhost", "all://127.0.0.1")  # asked without the proxy that the environment may name
TIMEOUT = 300  # seconds for one try: a small server works requests off one after another
RETRIES = 3  # of a request that a busy server refuses, or whose connection breaks
AT_ONCE = 64  # requests
SHOWN_FAILURES = 5  # rows whose requests failed that a warning names
NO_SERVER = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)  # so for every row


@dataclass(frozen=True)
class Server:
    """A model behind a server."""

    url: str
    model: str
    client: openai.OpenAI
    flag: str = "--eval_only"  # that errors name

    @classmethod
    def find(cls, url: str, model: str | None, flag: str = "--eval_only") -> "Server":
        """Return the model of that name behind a server, or its only one; UserError if there is none."""
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY}: holds characters that no key has")
        names = [model]
        try:
            direct = openai.DefaultHttpxClient(mounts=dict.fromkeys(HERE))
            more = {"timeout": TIMEOUT, "max_retries": RETRIES, "http_client": direct}
            client = openai.OpenAI(base_url=url, api_key=key or "none", **more)
            found = [served.id for served in client.with_options(timeout=30).models.list().data]
            names = [model] if model else found
        except Exception as error:  # of whatever layer: a name without a host is no OpenAIError
            if not (model and isinstance(error, openai.NotFoundError)):  # not all servers list their models
                raise UserError(f"{flag} {url}: {explain(error)}") from None
        if len(names) != 1:
            listed = f": {list_first(names, 20)}" if names else ""
            advice = f"has {len(names)} models{listed}; name one with --eval_model"
            raise UserError(f"{flag} {url}: {advice}")
        say("server", f"{url}: {names[0]}")
        return cls(url, names[0], client, flag)

    def answer(self, questions: Questions, examples: list[Example]) -> dict:
        """Return the result of a model (see Proof) whose answers a server gives, several at a time.

        The shortest prompt goes first and alone: if that fails, so would all. Others that fail are wrong answers,
        unless they are most.
        """
        samples = questions.samples
        ask = partial(self.ask, examples=examples, longest=questions.max_new_tokens)
        first = min(samples, key=lambda sample: (not sample.tools, sample.prompt_length))
        if error := ask(first).error:
            raise UserError(f"{self.flag} {self.url}: {error}")
        replies, failed = [], []
        shown = {"total": len(samples), "transient": True, "disable": not sys.stdout.isatty()}
        with (
            ThreadPool(min(questions.batch_size or AT_ONCE, len(samples))) as pool,  # its threads end with the run
            contextlib.closing(track(pool.imap(ask, samples), f"answers of {self.model}", **shown)) as bar,
        ):
            for reply, sample in zip(bar, samples):
                replies.append(reply)
                if reply.error:
                    failed.append(f"{sample.source} ({reply.error})")
                if 2 * len(failed) > len(samples):
                    raise UserError(f"{self.flag} {self.url}: most requests fail; the first: {failed[0]}")
        if failed:
            named = list_first(failed, SHOWN_FAILURES)
            warn(f"{self.url}: {len(failed):,} of {len(samples):,} requests failed and count as wrong: {named}")
        answers = {"answers": [reply.text for reply in replies], "calls": [reply.calls for reply in replies]}
        return answers | {"replies": replies, "served": self.model}

    def ask(self, sample: Sample, examples: list[Example], longest: int) -> Reply:
        """Return the greedy answer of the server to the request of a sample; UserError if it will answer none."""
        asked = examples[sample.row]
        messages = to_row(asked._replace(messages=give_ids(asked.messages[: sample.turn])))["messages"]
        for message in messages:
            message.pop("weight", None)
        request = {"messages": messages} | ({"tools": sample.tools} if sample.tools else {})
        try:
            completion = self.client.chat.completions.create(
                model=self.model, temperature=0, max_tokens=longest, **request
            )
            return read_reply(completion, sample)
        except NO_SERVER as error:
            raise UserError(f"{self.flag} {self.url}: {explain(error)}") from None
        except (openai.OpenAIError, ValueError) as error:
            return Reply(error=explain(error, sample.parser))


def read_reply(completion, sample: Sample) -> Reply:
    """Return what a chat completion says; ValueError if it is none.

    A call that the server leaves in the text is one that it cannot run, as it is of a local answer that breaks it.
    """
    try:
        [choice, *_], usage = completion.choices, completion.usage
        content, called = choice.message.content or "", [call.function for call in choice.message.tool_calls or []]
        lines = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in called]
        text, cut = take_answer(content, content), choice.finish_reason == "length"
    except (AttributeError, TypeError, ValueError):
        raise ValueError(shorten(completion)) from None
    left = read_answer(text, sample._replace(completion="")).calls if sample.tools and not called else []
    try:
        calls = to_calls([{"name": call.name, "arguments": json.loads(call.arguments)} for call in called])
    except (ValueError, TypeError, RecursionError):
        calls = None
    text = "\n".join(filter(None, [text.strip(), *lines]))
    return Reply(text, None if left != [] else calls, usage and usage.prompt_tokens, cut, left != [])


def explain(error: Exception, parser: str = "hermes") -> str:
    """Return in a line why a request failed, and what to do.

    Args:
        parser: reads the calls of the model if the server is vLLM.
    """
    if isinstance(error, openai.APITimeoutError):
        return f"gives no answer in {TIMEOUT} s"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot be reached ({cut_text(str(error.__cause__))}); start the server, or give its address"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        advice = f"refuses the key in {KEY}" if os.environ.get(KEY) else f"wants a key; set {KEY}"
        return f"{advice} ({error.status_code})"
    if isinstance(error, openai.APIStatusError):
        body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        text = f"answers {error.status_code}: {cut_text(body) if isinstance(body, str) else shorten(body, 200)}"
        if isinstance(error, openai.NotFoundError) and "model" not in text:
            return f"{text}; expected the address of an OpenAI-compatible server, such as http://localhost:8000/v1"
        if "tool" in text.lower():
            text += f"; vLLM reads calls with --enable-auto-tool-choice --tool-call-parser {parser}"
            text += ", llama-server with --jinja"
        return text
    return f"sends nothing that OpenAI's API has: {cut_text(str(error))}"
