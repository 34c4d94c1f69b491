"""What a run leaves: adapter, merged model and the proof of both, GGUF files, cards, uploads."""
