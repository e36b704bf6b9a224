"""The token and what it may do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
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
"""Of fine-grained tokens, as the Hub's whoami names them, and as its settings page does."""


@dataclass(frozen=True)
class Account:
    """A token that may deploy into `namespace`, a user or an organization; `asked` is None for the user's own."""

    asked: str | None
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

    def request(self, method: str, url: str, **body: Any) -> Any:
        """The answer to a request for which huggingface_hub has no function."""
        answer = get_session().request(method, url, headers=build_hf_headers(token=self.token), **body)
        hf_raise_for_status(answer)
        return answer


def open_account(namespace: str | None, needed: Iterable[str] = ()) -> Account:
    """Finds the token and asks the Hub whose it is. Raises `DeployError` where there is none, or it may not.

    `needed` are permissions, of `PERMISSIONS`, that are checked. To stop what costs, none is: the API will say.
    """
    token = get_token()
    if token is None:
        hf = os.path.relpath(Path(sys.executable).with_name("hf"))
        raise DeployError(f"no Hugging Face token: set HF_TOKEN to one from {TOKENS_PAGE}, or run `{hf} auth login`")
    # huggingface_hub has this address fixed; a test, or a company's mirror, has another.
    constants.INFERENCE_ENDPOINTS_ENDPOINT = os.environ.get("HF_INFERENCE_ENDPOINTS_ENDPOINT", ENDPOINTS_API)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    identity = call("check the token", api.whoami)
    roles = {identity["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in identity.get("orgs") or []}
    asked, namespace = namespace, namespace or identity["name"]
    if namespace not in roles:
        raise DeployError(f"NAMESPACE={namespace} is not yours: this token's are {', '.join(roles)}")
    if roles[namespace] == "read":
        raise DeployError(f"NAMESPACE={namespace}: you may only read there; ask an admin of it for the role write")
    # A login through the browser (OAuth) tells nothing of its permissions; then the API will. A classic token reads or
    # writes; a fine-grained one lists its permissions.
    described = (identity.get("auth") or {}).get("accessToken") or {}
    if needed and described.get("role") == "read":
        raise DeployError(f"this token may only read: deploying needs one with write access, see {TOKENS_PAGE}")
    if described.get("role") == "fineGrained":
        rules = described.get("fineGrained") or {}
        granted = set(rules.get("global") or [])
        for rule in rules.get("scoped") or []:
            granted |= set(rule["permissions"]) if rule["entity"].get("name", "").split("/")[0] == namespace else set()
        if missing := [f"{PERMISSIONS[one]} ({one})" for one in needed if one not in granted]:
            raise DeployError(f"this token may not {' and not '.join(missing)} in {namespace}; see {TOKENS_PAGE}")
    return Account(asked, namespace, token, api)
