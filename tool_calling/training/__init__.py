"""Training by TRL's SFTTrainer over streams."""
