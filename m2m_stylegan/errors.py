"""The one exception that stands for a mistake in the user's input rather than in this code."""


class UserError(ValueError):
    """Something about a file, an option or a dataset is wrong; the text says what was expected, what was found and what to do.

    Command-line tools print the text alone, without a traceback.
    """
