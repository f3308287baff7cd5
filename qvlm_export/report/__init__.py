"""Lists the contents of an export, and writes its HTML report."""
