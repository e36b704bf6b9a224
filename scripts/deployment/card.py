"""The model card of an endpoint's repository."""

from __future__ import annotations

from handlers import __version__
from scripts.deployment.plan import CALLERS, Plan, Source
from scripts.deployment.snippets import diffusers_snippet, token_snippet

HUB_LICENSES = ("apache-2.0", "mit")
"""Licences that the Hub knows by name; every other is `other` with a name of its own."""
URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud"


def model_card(plan: Plan, revisions: dict[str, str]) -> str:
    """Markdown with the Hub's metadata. `revisions` are the commits of checkpoints on the Hub, by model."""
    first = plan.sources[0].handler
    known = [one.handler.license for one in plan.sources if one.handler.license in HUB_LICENSES]
    same = len(known) == len(plan.sources) and len(set(known)) == 1
    license_id = first.license if same else "other"
    license_name = "" if same else f"license_name: {first.license if len(plan.sources) == 1 else 'see-below'}\n"
    link = f"license_link: {plan.sources[0].license_link}\n" if len(plan.sources) == 1 else ""
    on_hub = "".join(f"- {one.origin}\n" for one in plan.sources if one.model in revisions)
    return f"""\
---
license: {license_id}
{license_name}{link}library_name: diffusers
{f"base_model:{chr(10)}{on_hub}" if on_hub else ""}tags:
{"".join(f"- {tag}{chr(10)}" for tag in ("remote-vae", *plan.models))}---

# {plan.name}

{describe(plan)} as an Inference Endpoint: it decodes latents to pixels and encodes pixels to
latents, over the protocol of `remote_decode` and `remote_encode` in diffusers.
Made by `make deploy MODEL={plan.model}` of remote-vae {__version__}, which overwrites what is edited here.

{"".join(weights(one, revisions) for one in plan.sources)}- Who may call it: {CALLERS[plan.access]}

## Calling it

With diffusers. `remote_decode` sends no token, so this needs an endpoint with `ACCESS=public`:

```python
{diffusers_snippet(first, URL)}```

With a token, for an endpoint of any access:

```python
{token_snippet(first, URL)}```
"""


def describe(plan: Plan) -> str:
    if len(plan.models) == 1:
        return f"The `{plan.sources[0].handler.vae_class}` of {plan.model}"
    return f"The VAEs of {' and '.join(plan.models)}, each at its own path (`/{plan.models[0]}`),"


def weights(source: Source, revisions: dict[str, str]) -> str:
    """Where one model's weights are from, and their licence."""
    if revision := revisions.get(source.model):
        origin = f"[{source.origin}](https://huggingface.co/{source.origin}) at commit `{revision}`"
    else:
        origin = f"`{source.origin}`" if source.origin.startswith("models/") else source.origin
    fetched = ", from where the endpoint fetches them at every start" if source.kind == "hub" else ""
    licence = f"[{source.handler.license}]({source.license_link})"
    return f"- Weights of {source.model}: {origin}{fetched}\n- Licence of these weights: {licence}\n"
