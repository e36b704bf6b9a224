class RequestError(Exception):
    """The request is wrong. The message says what came and what would be right; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
