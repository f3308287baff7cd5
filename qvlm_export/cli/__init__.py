"""The command-line interface: one file for each command."""
