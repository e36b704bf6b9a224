"""The token and what it may do."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import HfApi, get_token

from scripts.deployment.calls import DeployError, HubError, call

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# Permissions of fine-grained tokens, as the Hub's whoami names them, and as its settings page does.
NEEDED = {
    "repo.write": "write repositories",
    "inference.endpoints.write": "manage Inference Endpoints",
}


@dataclass(frozen=True)
class Account:
    """A token that may deploy into `namespace`, a user or an organization."""

    namespace: str
    token: str
    api: HfApi


def open_account(namespace: str | None) -> Account:
    """Finds the token and asks the Hub what it may do. Changes nothing.

    Raises:
        DeployError: there is none, or it may not write into the namespace (None: the user's own).
    """
    token = get_token()
    if token is None:
        raise DeployError(
            f"no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one with write access from {TOKENS_PAGE}"
        )
    api = HfApi(token=token)
    try:
        identity = call("check the token", api.whoami)
    except HubError as error:
        if error.status != 401:
            raise
        raise DeployError(f"Hugging Face does not know this token: is it expired? See {TOKENS_PAGE}") from None
    namespace = namespace or identity["name"]
    _check_membership(identity, namespace)
    _check_permissions(identity.get("auth", {}).get("accessToken", {}), namespace)
    return Account(namespace, token, api)


def _check_membership(identity: dict, namespace: str) -> None:
    roles = {org["name"]: org.get("roleInOrg") for org in identity.get("orgs", [])}
    if namespace == identity["name"]:
        return
    if namespace not in roles:
        yours = ", ".join([identity["name"], *roles])
        raise DeployError(f"NAMESPACE={namespace} is not yours: this token's are {yours}")
    if roles[namespace] == "read":
        raise DeployError(f"NAMESPACE={namespace}: you may only read there; ask an admin of it for the role write")


def _check_permissions(token: dict, namespace: str) -> None:
    """`token` is whoami's description: a classic token reads or writes; a fine-grained one lists its permissions."""
    role = token.get("role")
    if role == "read":
        raise DeployError(f"this token may only read: deploying needs one with write access, see {TOKENS_PAGE}")
    if role != "fineGrained":
        return
    rules = token.get("fineGrained", {})
    granted = set(rules.get("global", []))
    for rule in rules.get("scoped", []):
        if rule["entity"].get("name", "").split("/")[0] == namespace:
            granted.update(rule["permissions"])
    missing = [label for permission, label in NEEDED.items() if permission not in granted]
    if missing:
        raise DeployError(f"this token may not {' and not '.join(missing)} in {namespace}; see {TOKENS_PAGE}")
