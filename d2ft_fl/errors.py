"""Errors that people see. Each message is one line: the value, what is allowed, what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class D2FTError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(D2FTError):
    """A configuration, file or plug-in cannot be used as it stands."""


class UnkeptBudget(ConfigError):
    """A strategy cannot keep the budget that its configuration matches: no mistake, but no run."""


class ReplyError(D2FTError):
    """A client's reply is not what its assignment asked for."""


class Divergence(ReplyError):
    """Training diverges: a loss or a weight is not finite, or far too large."""


class RunError(D2FTError):
    """A run cannot go on."""


class Refusal(D2FTError):
    """A client does not start what does not fit its budget or its memory."""
