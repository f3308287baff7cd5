"""Errors that are reported to the user without a traceback."""

from __future__ import annotations

import struct
import zlib


class PrefixWarning(UserWarning):
    """A prompt does not begin with the tokens that an export's prefix cache is for."""


class UserError(Exception):
    """An error that the user can correct. The message is one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


class UnfinishedError(UserError):
    """A run was interrupted by something other than its input: a full disk, too little memory, a file that was changed.

    What was finished until then is kept, and the run can be resumed.
    """


# What libraries raise while they parse a damaged file, for the few places that open foreign files. The types are named one
# by one, so that KeyboardInterrupt, MemoryError and our own UserError pass through.
DAMAGED_FILE_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError, SyntaxError,
    AssertionError, ImportError, struct.error, zlib.error,
)  # fmt: skip
