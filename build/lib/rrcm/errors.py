"""The one exception that means "the person running this can fix it"."""


class RRCMError(Exception):
    """Bad input, said in one line: what is wrong, where, and what to do. Stages print it without a traceback."""
