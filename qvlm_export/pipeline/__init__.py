"""The export pipeline: its stages, its work folder, and publishing the finished files."""
