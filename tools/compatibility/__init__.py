"""Checks what users really have: checkpoints, downloads, images, kills; makes docs/compatibility.md."""
