"""The longer texts, from `templates/`: the plan, what an endpoint costs, the model card of its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from handlers import MODELS, __version__
from scripts.deployment.plan import CALLERS, PENDING, TAG, Plan, addresses, variables
from scripts.instances import AS_OF, describe_price, describe_unlisted, dollars
from scripts.models import license_link
from scripts.snippets import calling

URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud"
TEMPLATES = FileSystemLoader(Path(__file__).with_name("templates"))


def origin(plan: Plan, model: str) -> str:
    """Where the model's weights come from: a repository on the Hub, or a folder."""
    checkpoint, folder = MODELS[model].checkpoint, plan.folders.get(model)
    if folder is None:
        return checkpoint
    return f"models/{model}" if folder == Path(checkpoint) else "a local folder"


SHOWN = {"MODELS": MODELS, "CALLERS": CALLERS, "PENDING": PENDING, "AS_OF": AS_OF, "version": __version__}
SHOWN |= {
    one.__name__: one for one in (decimal, describe_price, describe_unlisted, dollars, license_link, origin, variables)
}
"""What templates can name, beside the plan."""


def text(name: str, plan: Plan, **more: Any) -> str:
    """A template filled in for this plan."""
    templates = Environment(loader=TEMPLATES, undefined=StrictUndefined, trim_blocks=True)
    return templates.get_template(name, globals=SHOWN).render(plan=plan, **more)


def model_card(plan: Plan, revisions: dict[str, str]) -> str:
    """Markdown with the Hub's metadata. `revisions` are the commits of checkpoints on the Hub, by model."""
    first, *others = (MODELS[key].license for key in plan.models)
    known = first in ("apache-2.0", "mit") and set(others) <= {first}  # by the Hub; another is `other`, with a name
    data = ModelCardData(
        license=first if known else "other",
        license_name=None if known else "see-below" if others else first,
        license_link=None if others else license_link(plan.models[0]),
        library_name="diffusers",
        base_model=[MODELS[key].checkpoint for key in revisions] or None,
        tags=[TAG, *plan.models],
    )
    code = calling(addresses(URL, plan.models))
    return text("card.md", plan, metadata=data.to_yaml().strip(), revisions=revisions, code=code)
