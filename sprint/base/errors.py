"""Errors that a person can mend. The command line prints one line and exits with code 2."""


class SprintError(Exception):
    """Bad input: the message says what was wrong, where, and what to do."""


class NotHereError(SprintError):
    """Weights, data or a package that can be fetched and are not here: the message names what to fetch.

    One metric cannot be measured then; the others can.
    """


class Diverged(SprintError):
    """Training found no finite gradient any more: what came of the settings, and no trouble of the machine's."""
