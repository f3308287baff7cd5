"""The benchmarks' official files and scores."""
