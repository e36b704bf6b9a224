class RequestError(Exception):
    """Why a request gets no picture. The message says what came and what would be right.

    `status` is the HTTP status: 400 malformed, 401 no token, 408 a body that does not arrive, 413 over a limit, 415
    a format that is not taken, 422 well-formed but impossible for this model, 503 try again, 504 past the deadline.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
