"""Entry point for the Hugging Face Inference Toolkit.

At startup the toolkit creates its own app, executes this file, and calls `EndpointHandler(model_dir)`. Its routes
cannot carry raw tensors, so this file mounts the project's app in front of them.
"""

import sys

from starlette.routing import Mount

from handlers import get_handler
from handlers.serving.http.app import build_app, drain_on_sigterm, limit_reads
from handlers.serving.settings import Settings

settings = Settings.load()
app = build_app(settings.model, settings.cors_origins)


class EndpointHandler(get_handler(settings.model)):  # type: ignore[misc]  # the class is known at run time
    """Model or models that `endpoint.json` or `VAE_MODEL` names. `app` serves them once they are loaded."""

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        app.state.handler = self
        drain_on_sigterm(app)
        limit_reads()


for module in ("webservice_starlette", "huggingface_inference_toolkit.webservice_starlette"):
    if module in sys.modules:
        router = sys.modules[module].app.router
        router.routes.insert(0, Mount("/", app=app))
        router.default = app  # for paths that do not begin with a slash
