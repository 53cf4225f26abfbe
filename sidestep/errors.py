"""The one exception sidestep raises for something the user can mend."""


class UserError(Exception):
    """A wrong setting, a missing file or an unusable checkpoint.

    The command line prints only the message, on one line, so write it for the person at the terminal:
    what is wrong, where it was set, and what to type instead.
    """
