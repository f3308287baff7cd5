"""Runs an export, or a checkpoint in torch, on images and prompts: logits, generation and chat."""
