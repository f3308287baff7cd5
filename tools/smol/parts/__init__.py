"""What the smol LLaVA is made of: pinned wheels, decoder, tower, and how they are put together."""
