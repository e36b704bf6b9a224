"""The token and what it may do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, InferenceEndpointHardware, constants, get_token

from scripts.deployment.calls import HubError, call
from scripts.deployment.console import DeployError, note

ENDPOINTS_API = constants.INFERENCE_ENDPOINTS_ENDPOINT
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
PERMISSIONS = {
    "repo.write": "write repositories",
    "inference.endpoints.write": "manage your Inference Endpoints",
    "inference.endpoints.infer.write": "make calls to your Inference Endpoints",
}
"""Of fine-grained tokens, as the Hub's whoami names them, and as its settings page does."""


@dataclass(frozen=True)
class Account:
    """A token that may deploy into `namespace`, a user or an organization."""

    namespace: str
    token: str
    api: HfApi

    @cached_property
    def hardware(self) -> list[InferenceEndpointHardware]:
        """What there is, with prices and the namespace's quota; nothing where the platform does not tell."""
        try:
            return call("ask for prices", self.api.list_inference_endpoints_hardware, namespace=self.namespace)
        except HubError as error:
            note(f"  {error.reason}: prices are those of the table in this project, and no quota is checked")
            return []


def open_account(namespace: str | None, needed: Iterable[str] = ()) -> Account:
    """Finds the token and asks the Hub whose it is. Changes nothing.

    Args:
        namespace: None for the user's own.
        needed: permissions, of `PERMISSIONS`, that are checked. To stop what costs, none is: the API will say.

    Raises:
        DeployError: there is no token, or it may not do what is needed.
    """
    token = get_token()
    if token is None:
        hf = os.path.relpath(Path(sys.executable).with_name("hf"))
        raise DeployError(f"no Hugging Face token: set HF_TOKEN to one from {TOKENS_PAGE}, or run `{hf} auth login`")
    # huggingface_hub has this address fixed; a test, or a company's mirror, has another.
    constants.INFERENCE_ENDPOINTS_ENDPOINT = os.environ.get("HF_INFERENCE_ENDPOINTS_ENDPOINT", ENDPOINTS_API)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        identity = call("check the token", api.whoami)
    except HubError as error:
        if error.status != 401:
            raise
        raise DeployError(f"Hugging Face does not know this token: is it expired? See {TOKENS_PAGE}") from None
    namespace = namespace or identity["name"]
    _check_membership(identity, namespace)
    # A login through the browser (OAuth) tells nothing of its permissions; then the API will.
    token_info = (identity.get("auth") or {}).get("accessToken") or {}
    if needed:
        _check_permissions(token_info, namespace, needed)
    return Account(namespace, token, api)


def _check_membership(identity: dict, namespace: str) -> None:
    roles = {org["name"]: org.get("roleInOrg") for org in identity.get("orgs") or []}
    if namespace == identity["name"]:
        return
    if namespace not in roles:
        yours = ", ".join([identity["name"], *roles])
        raise DeployError(f"NAMESPACE={namespace} is not yours: this token's are {yours}")
    if roles[namespace] == "read":
        raise DeployError(f"NAMESPACE={namespace}: you may only read there; ask an admin of it for the role write")


def _check_permissions(token: dict, namespace: str, needed: Iterable[str]) -> None:
    """`token` is whoami's description: a classic token reads or writes; a fine-grained one lists its permissions."""
    if token.get("role") == "read":
        raise DeployError(f"this token may only read: deploying needs one with write access, see {TOKENS_PAGE}")
    if token.get("role") != "fineGrained":
        return
    rules = token.get("fineGrained") or {}
    granted = set(rules.get("global") or [])
    for rule in rules.get("scoped") or []:
        if rule["entity"].get("name", "").split("/")[0] == namespace:
            granted.update(rule["permissions"])
    missing = [f"{PERMISSIONS[one]} ({one})" for one in needed if one not in granted]
    if missing:
        raise DeployError(f"this token may not {' and not '.join(missing)} in {namespace}; see {TOKENS_PAGE}")
