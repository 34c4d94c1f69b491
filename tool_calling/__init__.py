"""The machinery of train_qwen3_tool_calling.py: one noun a module, imports only downwards."""
