"""Errors that a person can mend. The command line prints them as one line, without a traceback."""


class UserError(Exception):
    """Something went wrong that the person can mend: the message says what, where and what to do.

    ``exit_status`` is what the command ends with: 1, the work failed.
    """

    exit_status = 1


class UsageError(UserError):
    """What was asked for cannot be done as asked (bad config, missing folder): exit status 2, never retried."""

    exit_status = 2


class DecodeError(UserError):
    """A sample cannot be decoded, is too large, or is too short for the clip asked for."""
