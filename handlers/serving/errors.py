"""Exception for a request that gets no result."""


class RequestError(Exception):
    """An error of a request. The message says what was wrong, what is expected, and how to fix it.

    HTTP statuses: 400 malformed, 401 no token, 403 foreign page, 406 no acceptable format, 408 body did not arrive,
    413 over a limit, 415 unsupported format, 422 impossible for this model, 503 try again, 504 past the deadline.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
