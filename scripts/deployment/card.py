"""The model card of an endpoint's repository."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from handlers import MODELS, __version__
from scripts.deployment.plan import CALLERS, TAG, Plan, addresses
from scripts.snippets import calling

HUB_LICENSES = ("apache-2.0", "mit")
"""Licences that the Hub knows by name; every other is `other` with a name of its own."""
URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud"


def license_link(model: str) -> str:
    return MODELS[model].license_link or f"https://huggingface.co/{MODELS[model].checkpoint}"


def origin(plan: Plan, model: str) -> str:
    """Where the model's weights come from: a repository on the Hub, or a folder."""
    checkpoint, folder = MODELS[model].checkpoint, plan.folders.get(model)
    if folder is None:
        return checkpoint
    return f"models/{model}" if folder == Path(checkpoint) else "a local folder"


def model_card(plan: Plan, revisions: dict[str, str]) -> str:
    """Markdown with the Hub's metadata. `revisions` are the commits of checkpoints on the Hub, by model."""
    first, *others = (handler.license for handler in plan.handlers)
    known = first in HUB_LICENSES and set(others) <= {first}
    data = ModelCardData(
        license=first if known else "other",
        license_name=None if known else "see-below" if others else first,
        license_link=None if others else license_link(plan.models[0]),
        library_name="diffusers",
        base_model=[MODELS[key].checkpoint for key in revisions] or None,
        tags=[TAG, *plan.models],
    )
    weights = ""
    for key in plan.models:
        at = f" at commit `{revisions[key]}`" if key in revisions else ""
        fetched = ", from where the endpoint fetches them at every start" if plan.weights == "hub" else ""
        weights += f"- The `{MODELS[key].vae_class}` of {key}, its weights from `{origin(plan, key)}`{at}{fetched};\n"
        weights += f"  the licence of these weights: [{MODELS[key].license}]({license_link(key)})\n"
    return f"""\
---
{data.to_yaml().strip()}
---

# {plan.name}

VAEs as an Inference Endpoint, which decodes latents to pixels and encodes pixels to latents over the protocol of
`remote_decode` and `remote_encode` in diffusers:

{weights}
Who may call it: {CALLERS[plan.access]}. Made by `make deploy MODEL={plan.model}` of remote-vae {__version__}, which
overwrites what is edited here.

{calling(addresses(URL, plan.models))}"""
