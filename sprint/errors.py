"""The one exception a user may see: a single line that says what was wrong, where, and what to do."""


class SprintError(Exception):
    """Bad input or an impossible request. The command line prints it as one line and exits with code 2."""
