"""The service as a deployment of Ray Serve: docs/running.md has the commands, and says what is lost."""

from ray import serve
from starlette.applications import Starlette


def load_app() -> Starlette:
    """Load the model of `VAE_MODEL`, and return the service's app. Ray calls this once in each replica."""
    from handler import EndpointHandler, app
    from handlers.serving.settings import REPOSITORY

    EndpointHandler(str(REPOSITORY))
    return app


@serve.deployment
@serve.ingress(load_app)
class RemoteVAE:
    def check_health(self) -> None:
        """Let Ray replace a replica whose device is lost or stuck."""
        from handler import app

        if problem := app.state.handler.pipeline.device_queue.problem:
            raise RuntimeError(problem)


application = RemoteVAE.bind()
