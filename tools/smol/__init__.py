"""A trained LLaVA of 160 M parameters from pinned wheels: its decoder, tower, projector, data and scores."""
