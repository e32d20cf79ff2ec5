"""The exception for users: its message names the file, key or prompt, and the next step."""


class DiffpoError(Exception):
    """Bad input or environment. The command line prints the message without a traceback and exits with status 2."""
