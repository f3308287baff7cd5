"""Downloads the weights of a checkpoint, with progress, once everything that can be checked without them is checked."""

from __future__ import annotations

from qvlm_export.checkpoints.checkpoint import Checkpoint, reopen_checkpoint
from qvlm_export.checkpoints.files.download import download_files, format_size, remaining_bytes
from qvlm_export.checkpoints.files.headers import find_downloads
from qvlm_export.pipeline.progress import Reporter

DOWNLOAD = "download"


def fetch_weights(checkpoint: Checkpoint, reporter: Reporter) -> Checkpoint:
    """Returns the checkpoint with weights that can be loaded, after downloading those that are not in the cache.

    Raises UserError when a download fails, or when what came is not what the headers said. Ctrl-C raises KeyboardInterrupt
    with a sentence for the user.
    """
    downloads = find_downloads(checkpoint.source)
    if not downloads:
        return checkpoint
    total = remaining_bytes(downloads)
    repositories = " and ".join(dict.fromkeys(download.snapshot.repository for download in downloads))
    reporter.note(f"downloading {format_size(total)} of {repositories} to {downloads[0].snapshot.folder.parents[1]}")
    done = 0
    with reporter.stage(DOWNLOAD, total) as stage:

        def report(count: int) -> None:
            nonlocal done
            done += count
            stage.fraction(done / max(total, 1))

        try:
            download_files(downloads, report)
        except KeyboardInterrupt as error:
            missing = format_size(remaining_bytes(downloads))
            raise KeyboardInterrupt(
                f"interrupted; {missing} of the download are missing, the same command fetches only the rest"
            ) from error
    return reopen_checkpoint(checkpoint)
