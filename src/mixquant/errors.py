"""The base class of errors that users see, and other errors in one line."""

_LONGEST_REASON = 500  # characters


class MixquantError(Exception):
    """An error that the user can fix. The message is one line: what was wrong, what was expected,
    what to do.

    The command line prints such an error without a traceback and exits with code 2. Each subclass
    also derives from the built-in class that callers expect (ValueError, RuntimeError).
    """


def one_line(error: Exception) -> str:
    """The message of an error in one line. A long one loses its middle: some begin with the reason,
    some end with it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _LONGEST_REASON:
        return text
    half = _LONGEST_REASON // 2
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"
