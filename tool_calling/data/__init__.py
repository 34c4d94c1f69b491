"""Rows of any known format in, checked examples out: neither torch nor a tokenizer is needed."""
