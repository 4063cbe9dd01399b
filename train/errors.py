"""Errors of the trainer that its commands show as one line."""


class ResumeError(Exception):
    """A saved state does not belong to this run; the message names what differs."""
