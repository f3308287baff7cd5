"""What is decided and checked before any work: recipe, preflight, time and memory."""
