"""Opens the weights of a checkpoint, in safetensors or torch format. Only headers are read, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qvlm_export.calibrate.checkpoint.safetensors_source import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsSource,
    list_indexed_files,
)
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.headers import HeaderReader, HeaderSource, read_safetensors_header, read_torch_header
from qvlm_export.checkpoints.files.snapshot import Snapshot
from qvlm_export.checkpoints.files.source_kinds import explain_files
from qvlm_export.checkpoints.files.torch_source import INDEX_FILE as TORCH_INDEX
from qvlm_export.checkpoints.files.torch_source import SINGLE_FILE as TORCH_SINGLE
from qvlm_export.checkpoints.files.torch_source import TorchSource


@dataclass(frozen=True)
class Format:
    """A format of weights: the names of its files, what opens a folder of them, and what reads the header of one file."""

    single: str
    index: str
    open_folder: Callable[[Path, Callable[[str], str | None]], TensorSource]
    read_header: HeaderReader


FORMATS = (  # the first one that a checkpoint has is used, as in transformers
    Format(SINGLE_FILE, INDEX_FILE, SafetensorsSource, read_safetensors_header),
    Format(TORCH_SINGLE, TORCH_INDEX, TorchSource, read_torch_header),
)


@dataclass(frozen=True)
class Location:
    """Where the files of a checkpoint are. snapshot: None for a local folder, else what `folder` is the cache of."""

    folder: Path
    snapshot: Snapshot | None = None

    @property
    def obstacle(self) -> str:
        """Why only the folder counts although the checkpoint is on the Hub, in words; empty for other checkpoints."""
        return "" if self.snapshot is None else self.snapshot.obstacle

    def names(self) -> set[str]:
        """Returns the names of all files, in the folder or, where the Hub lists them, in the repository."""
        if self.snapshot is None or self.obstacle:
            return {path.name for path in self.folder.glob("*")}
        return set(self.snapshot.files)

    def has(self, name: str) -> bool:
        """Returns whether the checkpoint has a file, in the folder or, where the Hub lists them, in the repository."""
        if self.snapshot is None or self.obstacle:
            return (self.folder / name).exists()
        return name in self.snapshot.files


def open_weights(location: Location, rename: Callable[[str], str | None]) -> TensorSource:
    """Returns the tensors of a checkpoint; safetensors are preferred to torch files.

    rename: stored tensor name -> canonical name; None drops the tensor. Where weights are not downloaded yet, the result
    cannot load (`headers.find_downloads` names the files). Raises UserError when there are no weights, or damaged ones.
    """
    for format_ in FORMATS:
        if location.has(format_.single) or location.has(format_.index):
            return _open_format(location, format_, rename)
    if location.snapshot is not None and location.obstacle:
        raise UserError(f"{location.snapshot.repository}: {location.obstacle}")
    if (found := explain_files(location.names())) is not None:
        raise UserError(f"{location.folder}: holds {found[0]} and no model weights; {found[1]}")
    raise UserError(f"{location.folder}: holds config.json but no weights ({SINGLE_FILE}, {INDEX_FILE} or {TORCH_SINGLE})")


def _open_format(location: Location, format_: Format, rename: Callable[[str], str | None]) -> TensorSource:
    def has(name: str) -> bool:
        is_shard = name not in (format_.single, format_.index)
        return location.has(name) or (is_shard and location.obstacle != "")  # such a shard is reported below

    names = list_indexed_files(location.folder, format_.single, format_.index, has)
    missing = [path.name for path in names if not path.exists()]
    if location.snapshot is None or not missing:
        return format_.open_folder(location.folder, rename)
    if location.obstacle:
        raise UserError(f"{location.snapshot.repository}: {missing[0]}: {location.obstacle}")
    return HeaderSource(location.snapshot, [path.name for path in names], format_.read_header, rename)
