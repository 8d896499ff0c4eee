"""The one error a person can cause: a sentence that names the value, the bound and the way out."""


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits 2; the server answers 4xx."""
