"""The one error that users see as a sentence."""


class UserError(ValueError):
    """Something the user can mend. The message is one clear sentence that says what to do; the CLI exits with code 2."""
