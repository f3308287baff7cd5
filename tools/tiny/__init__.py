"""The tiny LLaVA: scenes, training, planted outliers, its scores."""
