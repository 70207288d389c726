"""The one exception that is meant for the user."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is one clear sentence.

    The command line prints the message on stderr and exits with code 2, without a traceback. Every
    other exception is a defect of the program and keeps its traceback.
    """
