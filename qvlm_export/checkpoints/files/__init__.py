"""Finds a checkpoint's files, locally or on the Hugging Face Hub, and opens its weights."""
