"""Entry point for the Hugging Face Inference Toolkit.

The toolkit creates its own app, executes this file, and calls `EndpointHandler(model_dir)`. Its routes cannot carry
raw tensors, so this file mounts the project's app in front of them.
"""

from handlers import get_handler
from handlers.serving.http import toolkit
from handlers.serving.http.app import build_app, drain_on_sigterm, limit_reads
from handlers.serving.settings import Settings

toolkit.check_workers()
settings = Settings.load()
app = build_app(settings.model, settings.cors_origins)


class EndpointHandler(get_handler(settings.model)):  # type: ignore[misc]  # the class is known at run time
    """Model or models that `endpoint.json` or `VAE_MODEL` names. `app` serves them once they are loaded."""

    def __init__(self, path: str = "") -> None:
        drain_on_sigterm(app)
        limit_reads()
        if toolkit.is_lazy():
            toolkit.load_in_background(lambda: self.load(path))
        self.load(path)

    def load(self, path: str) -> None:
        """Load the VAE. From then on `app` takes requests."""
        super().__init__(path)
        app.state.handler = self


toolkit.mount(app)
