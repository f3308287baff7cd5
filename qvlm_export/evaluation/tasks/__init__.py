"""Benchmarks: how their official files are read, prompts are worded, and answers are scored."""
