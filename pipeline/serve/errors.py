"""A request that is refused; the page shows the message as it is."""


class RefusedError(Exception):
    """The request cannot be done, and nothing was changed.

    Parameters
    ----------
    message : str
        What is wrong and what to do, for the person at the page.
    status : int
        HTTP status.
    reason : str
        A word that the page's code can act on.
    """

    def __init__(self, message: str, *, status: int = 422, reason: str = "invalid") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason

    def content(self) -> dict[str, str]:
        """Return the body of the answer."""
        return {"error": str(self), "reason": self.reason}
