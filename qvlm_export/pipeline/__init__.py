"""The export: stages, work folder, publishing."""
