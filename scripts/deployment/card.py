"""The model card of an endpoint's repository."""

from __future__ import annotations

from pathlib import Path

from handlers import __version__
from scripts.deployment.plan import CALLERS, Plan
from scripts.deployment.snippets import diffusers_snippet, token_snippet

HUB_LICENSES = ("apache-2.0", "mit")
"""Licences that the Hub knows by name; every other is `other` with a name of its own."""
URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud"


def model_card(plan: Plan, revision: str | None) -> str:
    """Markdown with the Hub's metadata. `revision` is the checkpoint's commit; None where the weights are local."""
    handler = plan.handler
    if isinstance(plan.weights, Path):
        source = f"`{plan.checkpoint}`" if plan.checkpoint.startswith("models/") else plan.checkpoint
        base_model = ""
    else:
        source = f"[{plan.checkpoint}](https://huggingface.co/{plan.checkpoint}) at commit `{revision}`"
        base_model = f"base_model: {plan.checkpoint}\n"
    if plan.weights == "hub":
        source += ", from where the endpoint fetches them at every start"
    license_id = handler.license if handler.license in HUB_LICENSES else "other"
    license_name = f"license_name: {handler.license}\n" if license_id == "other" else ""
    return f"""\
---
license: {license_id}
{license_name}license_link: {plan.license_link}
library_name: diffusers
{base_model}tags:
- remote-vae
- {plan.model}
---

# {plan.name}

The `{handler.vae_class}` of {plan.model} as an Inference Endpoint: it decodes latents to pixels and encodes pixels to
latents, over the protocol of `remote_decode` and `remote_encode` in diffusers.
Made by `make deploy MODEL={plan.model}` of remote-vae {__version__}, which overwrites what is edited here.

- Weights: {source}
- Licence of the weights: [{handler.license}]({plan.license_link})
- Who may call it: {CALLERS[plan.access]}

## Calling it

With diffusers. `remote_decode` sends no token, so this needs an endpoint with `ACCESS=public`:

```python
{diffusers_snippet(handler, URL)}```

With a token, for an endpoint of any access:

```python
{token_snippet(handler, URL)}```
"""
