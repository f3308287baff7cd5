"""A trained LLaVA of 157 M parameters from pinned wheels: its decoder, tower, projector, data and scores."""
