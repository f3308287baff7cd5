"""What is in an export, and its HTML report."""
