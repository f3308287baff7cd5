"""Fast float32 linear algebra whose results do not depend on the number of threads, to the last bit."""
