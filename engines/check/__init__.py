"""What was written and built, checked."""
