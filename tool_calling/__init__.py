"""The machinery of train_qwen3_tool_calling.py: one noun a module, imports only downwards."""

import sys
from importlib.util import find_spec

# What --help needs; for all else that is missing, see explain_failure.
if missing := [name for name in ("jinja2", "jsonschema", "rich", "yaml") if not find_spec(name)]:
    sys.exit(f"error: not installed: {', '.join(missing)}; run pip install -r requirements.txt")
