"""The one exception a user is meant to read: it names the file, key or prompt, and the next step."""


class DiffpoError(Exception):
    """Bad input or environment. The command line prints its text alone (no traceback) and exits with status 2."""
