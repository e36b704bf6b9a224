"""The longer texts, from `templates/`: the plan, the cost of an endpoint, the model card of its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from handlers import MODELS, __version__
from scripts.deployment.plan import CALLERS, PENDING, TAG, Plan, addresses, make_variables
from scripts.instances import AS_OF, describe_price, describe_unlisted, dollars, is_cpu
from scripts.models import license_link
from scripts.snippets import calling_code

URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), undefined=StrictUndefined, trim_blocks=True
)


def describe_origin(plan: Plan, model: str) -> str:
    """Return the origin of the model's weights: a repository on the Hub, or files of this machine."""
    if repository := plan.checkpoints.get(model):
        return repository.name
    if not plan.weights:
        return f"models/{model}"
    return "a local file" if len(plan.uploads[model]) == 1 else "a local folder"


FUNCTIONS = (decimal, describe_origin, describe_price, describe_unlisted, dollars, is_cpu, license_link, make_variables)
GLOBALS = {"MODELS": MODELS, "CALLERS": CALLERS, "PENDING": PENDING, "AS_OF": AS_OF, "version": __version__}
GLOBALS |= {function.__name__: function for function in FUNCTIONS}
"""The names in templates, beside the plan."""


def render(name: str, plan: Plan, **values: Any) -> str:
    """Return a template, filled in for this plan."""
    return TEMPLATES.get_template(name, globals=GLOBALS).render(plan=plan, **values)


def model_card(plan: Plan, revisions: dict[str, str]) -> str:
    """Return Markdown with the Hub's metadata. `revisions` are the commits of checkpoints on the Hub, by model."""
    first, *others = (MODELS[key].license for key in plan.models)
    # The Hub knows these licenses by name. Any other one is `other`, with a name and a link.
    is_known = first in ("apache-2.0", "mit") and set(others) <= {first}
    data = ModelCardData(
        license=first if is_known else "other",
        license_name=None if is_known else "see-below" if others else first,
        license_link=None if others else license_link(plan.models[0]),
        library_name="diffusers",
        base_model=[plan.checkpoints[key].name for key in revisions] or None,
        tags=[TAG, *plan.models],
    )
    code = calling_code(addresses(URL, plan.models))
    return render("card.md", plan, metadata=data.to_yaml().strip(), revisions=revisions, code=code)
