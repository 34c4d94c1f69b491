"""Special tokens in data are data: they are reported, never encoded."""

import re

# Inside content these tokens would forge turns, calls or thoughts: the tokenizer turns them into control tokens.
# The last is another model's: an answer with it is a call that was not read.
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think|TOOLCALL)>")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write one alone, UTF-8 cannot


def find_forbidden(text: str, control_token: re.Pattern = CONTROL_TOKEN) -> str | None:
    """Return what is wrong with a text that the tokenizer would take for something else, or cannot take; else None."""
    if token := control_token.search(text):
        return f"holds the control token {token[0]}, which would forge a turn; remove it"
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        return f"holds \\u{ord(half[0]):04x}, one half of a character; remove it or write the other half too"
    return None
