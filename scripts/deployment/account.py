"""The token and its permissions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, InferenceEndpointHardware, constants, get_token
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from scripts.console import DeployError, note
from scripts.deployment.calls import TOKENS_PAGE, HubError, call

ENDPOINTS_API = constants.INFERENCE_ENDPOINTS_ENDPOINT
PERMISSIONS = {
    "repo.write": "write repositories",
    "inference.endpoints.write": "manage your Inference Endpoints",
    "inference.endpoints.infer.write": "make calls to your Inference Endpoints",
}
"""Permissions of fine-grained tokens: the names in the Hub's whoami, and those on its settings page."""


@dataclass(frozen=True)
class Account:
    """A token that may deploy into `namespace`, a user or an organization."""

    requested_namespace: str | None
    """The NAMESPACE of the command, or None for the token's own user."""
    namespace: str
    token: str
    api: HfApi

    @cached_property
    def hardware(self) -> list[InferenceEndpointHardware]:
        """The platform's hardware with prices and quota; empty where the platform does not respond."""
        try:
            return call("ask for prices", self.api.list_inference_endpoints_hardware, namespace=self.namespace)
        except HubError as error:
            note(f"  {error.reason}: prices are those of the table in this project, and no quota is checked")
            return []

    def request(self, method: str, url: str, **body: Any) -> Any:
        """Send a request for which huggingface_hub has no function, and return the response."""
        response = get_session().request(method, url, headers=build_hf_headers(token=self.token), **body)
        hf_raise_for_status(response)
        return response


def open_account(namespace: str | None, needed: Iterable[str] = ()) -> Account:
    """Find the token, and check on the Hub that it may use the namespace.

    Args:
        needed: the `PERMISSIONS` to check. Commands that stop costs check none: the API refuses what it must.

    Raises:
        DeployError: there is no token, or it may not do this.
    """
    token = get_token()
    if token is None:
        hf = os.path.relpath(Path(sys.executable).with_name("hf"))
        raise DeployError(f"no Hugging Face token: set HF_TOKEN to one from {TOKENS_PAGE}, or run `{hf} auth login`")
    # huggingface_hub has a fixed address; tests and mirrors have another one.
    constants.INFERENCE_ENDPOINTS_ENDPOINT = os.environ.get("HF_INFERENCE_ENDPOINTS_ENDPOINT", ENDPOINTS_API)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    identity = call("check the token", api.whoami)
    account = Account(namespace, namespace or identity["name"], token, api)
    _check_namespace(identity, account.namespace)
    # A login through the browser (OAuth) does not list its permissions: the API checks them later.
    _check_permissions((identity.get("auth") or {}).get("accessToken") or {}, account.namespace, list(needed))
    return account


def _check_namespace(identity: Mapping[str, Any], namespace: str) -> None:
    """Raise `DeployError` for a namespace in which the user may not write."""
    roles = {identity["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in identity.get("orgs") or []}
    if namespace not in roles:
        raise DeployError(f"NAMESPACE={namespace} is not yours: this token's are {', '.join(roles)}")
    if roles[namespace] == "read":
        raise DeployError(f"NAMESPACE={namespace}: you may only read there; ask an admin for the role write")


def _check_permissions(token: Mapping[str, Any], namespace: str, needed: list[str]) -> None:
    """Raise `DeployError` for a token without a needed permission. A classic token can read or write all."""
    if needed and token.get("role") == "read":
        raise DeployError(f"this token may only read: deploying needs one with write access, see {TOKENS_PAGE}")
    if token.get("role") != "fineGrained":
        return
    rules = token.get("fineGrained") or {}
    granted = set(rules.get("global") or [])
    for rule in rules.get("scoped") or []:
        if rule["entity"].get("name", "").split("/")[0] == namespace:
            granted |= set(rule["permissions"])
    if missing := [f"{PERMISSIONS[name]} ({name})" for name in needed if name not in granted]:
        raise DeployError(f"this token may not {' and not '.join(missing)} in {namespace}; see {TOKENS_PAGE}")
