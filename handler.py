"""The entry point in the Hugging Face Inference Toolkit.

The toolkit executes this file at startup, when its own app exists, and then calls `EndpointHandler(model_dir)`. Its
routes cannot carry raw tensors, so the project's app goes in front of them.
"""

import sys

from starlette.routing import Mount

from handlers import get_handler
from handlers.serving.http.app import build_app, drain_on_sigterm, limit_reads
from handlers.serving.settings import Settings

settings = Settings.load()
app = build_app(settings.model, settings.cors_origins)


class EndpointHandler(get_handler(settings.model)):  # type: ignore[misc]  # which class is known when it runs
    """The model or models that `endpoint.json` or `VAE_MODEL` names; once loaded, `app` serves them."""

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        app.state.handler = self
        drain_on_sigterm(app)
        limit_reads()


for module in ("webservice_starlette", "huggingface_inference_toolkit.webservice_starlette"):
    if module in sys.modules:
        router = sys.modules[module].app.router
        router.routes.insert(0, Mount("/", app=app))
        router.default = app  # of paths that do not begin with a slash
