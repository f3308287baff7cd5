"""Turns images and prompts into model inputs: tokens, pixels, and the placement of image features."""
