"""The one error that users see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """
