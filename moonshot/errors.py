"""The errors a user can make: each module has its own, and all are a MoonshotError."""


class MoonshotError(ValueError):
    """Something about the call, the model or the data is wrong; the message says what, and what to do."""


class ArgumentError(MoonshotError):
    """An argument whose value cannot be used."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a kind that cannot be used."""
