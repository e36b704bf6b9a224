"""ComfyUI's Cancel."""


class InterruptProcessingException(Exception):
    pass


interrupted = False


def throw_exception_if_processing_interrupted() -> None:
    global interrupted
    if interrupted:
        interrupted = False
        raise InterruptProcessingException
