"""Shows an export as a store of models does: every file is a link into a folder of contents, named by their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def link_into_store(export: Path, store: Path) -> Path:
    """Copies the files of the folder `export` into `store`/blobs; returns a folder of links to them, under the old names."""
    blobs, snapshot = store / "blobs", store / "snapshots" / "main"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in export.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(export)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def hard_link(export: Path, folder: Path) -> Path:
    """Returns a copy of the export whose files are hard links, as backups and deduplicating stores make them."""
    shutil.copytree(export, folder, copy_function=os.link)
    return folder
