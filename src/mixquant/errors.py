"""The base class of the errors that are for people."""


class MixquantError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, what was
    expected, what to do.

    The command line prints such an error without a traceback and exits with code 2. Each subclass
    also derives from the built-in class that its callers know it as (ValueError, RuntimeError).
    """
