"""The base class of the errors that are for people, and other errors in one line."""

_LONGEST_REASON = 500  # characters


class MixquantError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, what was
    expected, what to do.

    The command line prints such an error without a traceback and exits with code 2. Each subclass
    also derives from the built-in class that its callers know it as (ValueError, RuntimeError).
    """


def one_line(error: Exception) -> str:
    """What an error says, in one line. Of a long one the middle is left out: some begin with the
    reason, some end with it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _LONGEST_REASON:
        return text
    half = _LONGEST_REASON // 2
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"
