"""An export, or a checkpoint in torch, as a model that answers."""
