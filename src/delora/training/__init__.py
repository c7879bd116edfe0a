"""One engine for every task, on transformers' Trainer: configuration, run folders, adapter-only checkpoints."""
