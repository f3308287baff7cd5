"""Refusals of the operating system and of libraries, in words: one table of causes and remedies for every command.

Only what a machine, a disk or a file can be to blame for is recognized. Anything else is an error of this program, and its
traceback is wanted.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

FULL_DISK_BYTES = 2**20  # with less than this free, a full disk is taken to be the cause of a failure
FULL_DISK, OUT_OF_MEMORY = "the disk is full", "memory ran out"
_MEMORY_REMEDY = "close other programs, or use a machine with more"
# errno -> what to do about it.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EFBIG: "raise `ulimit -f`, or use a file system that takes larger files",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.EACCES: "give yourself the right, or choose another place",
    errno.EPERM: "give yourself the right, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "was it removed or renamed meanwhile?",
    errno.ENOTDIR: "was it replaced meanwhile?",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network drive",
    errno.EAGAIN: "close other programs",
}
# Phrase of a library's message -> what it means, and what to do about it.
_PHRASES = (
    ("No space left", f"{FULL_DISK}; free some space"),
    ("failed to map segment", f"{OUT_OF_MEMORY} while a library was loaded; {_MEMORY_REMEDY}"),
    ("can't allocate memory", f"{OUT_OF_MEMORY}; {_MEMORY_REMEDY}"),
    ("not enough memory", f"{OUT_OF_MEMORY}; {_MEMORY_REMEDY}"),
    ("CUDA out of memory", f"{OUT_OF_MEMORY} on the GPU; close other programs, or use --device cpu"),
    ("could not create a primitive", f"{OUT_OF_MEMORY} (oneDNN has none for a product); {_MEMORY_REMEDY}"),
    ("could not create a memory object", f"{OUT_OF_MEMORY} (oneDNN); {_MEMORY_REMEDY}"),
    ("can't start new thread", "the system starts no more threads; raise `ulimit -u`, or close other programs"),
    ("embedded null", "a name holds a NUL byte, which no file's name can; give another"),
)


_KINDS = {
    MemoryError: f"{OUT_OF_MEMORY}; {_MEMORY_REMEDY}",
    RecursionError: "a file is nested too deeply to be read, such as JSON in JSON hundreds of times; give another",
    OverflowError: "a number is too large to compute with ({}); give a smaller one",
    UnicodeError: "a name or a text is not UTF-8 ({}); rename or convert it",
    SafetensorError: "a safetensors file cannot be read or written ({}); check the disk, and the file",
}
# The types of all errors that can be refusals. RecursionError is a RuntimeError, UnicodeError a ValueError.
REFUSALS = (OSError, MemoryError, OverflowError, RuntimeError, ValueError, ImportError, SafetensorError)


def refusal_in_words(error: BaseException) -> str | None:
    """Returns what was refused, by whom, and what to do about it; None for an error that is not known as a refusal.

    torch raises a plain RuntimeError where memory runs out on a CPU, and the dynamic linker an ImportError or OSError, so
    messages are searched.
    """
    text = str(error)
    if isinstance(error, REFUSALS) and (words := next((w for phrase, w in _PHRASES if phrase in text), None)):
        return words
    if isinstance(error, OSError):
        return _os_error_in_words(error)
    return next((words.format(text) for kind, words in _KINDS.items() if isinstance(error, kind)), None)


def _os_error_in_words(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    reason = (
        FULL_DISK if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error) or type(error).__name__
    )
    remedy = _REMEDIES.get(error.errno or 0, "try again, or choose another place")
    return f"{' -> '.join(names)}{': ' if names else ''}{reason}; {remedy}"


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Returns whether a full disk is the cause of `error`, raised while writing to `folder`.

    Libraries report it differently: safetensors in the text of its message, numpy by an OSError without errno, and TensorRT
    not at all. So the free space of the disk is looked at, too.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return "No space left" in str(error) or shutil.disk_usage(existing).free < FULL_DISK_BYTES
