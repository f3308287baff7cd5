"""The one error that users see."""

from __future__ import annotations

import struct
import zlib


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


class UnfinishedError(UserError):
    """Something came between that does not lie in the input as it was given: a full disk, too little memory, a changed file.

    What was finished until then stays, and can be gone on with.
    """


# What libraries raise when a file they parse is damaged: whatever their parsers stumble over. For the few places that open
# foreign files; named one by one, so that a keyboard interrupt, a lack of memory or our own UserError passes through.
DAMAGED_FILE_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError, SyntaxError,
    AssertionError, ImportError, struct.error, zlib.error,
)  # fmt: skip
