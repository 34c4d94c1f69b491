"""Special tokens in data are data: they are reported, never encoded."""

import re

# The tokenizer would read these, inside a text, as turns, calls or thoughts. The last is another model's tag:
# an answer that holds it is a call that was not recognised.
SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think|TOOLCALL)>")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write one alone, UTF-8 cannot


def find_forbidden(text: str, special_token: re.Pattern = SPECIAL_TOKEN) -> str | None:
    """Return why a text cannot be encoded as it is: a special token or half a character; None if it can."""
    if token := special_token.search(text):
        return f"holds the special token {token[0]}, which would forge a turn; remove it"
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        return f"holds \\u{ord(half[0]):04x}, half a character; remove it or add the other half"
    return None
