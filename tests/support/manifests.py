"""Checks of the Kubernetes manifests: schemas, references between resources, and numbers of the service's settings."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pydantic
import yaml
from prometheus_client.parser import text_string_to_metric_families

from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.version import VERSION
from tests.support.custom_resources import SCHEMAS

KUBECTL = Path(sysconfig.get_path("scripts"), "kubectl")
KUBERNETES = ("1.31", "1.37")
"""The oldest version whose fields the manifests use, and the newest one with published schemas."""
INGRESS = "haproxy-ingress.github.io/"
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
VARIABLES = {f"VAE_{name.upper()}" for name in Settings.model_fields} | {"OMP_NUM_THREADS"}
FROM_PROMETHEUS = {"namespace", "pod"}
"""Labels that Prometheus adds to each series of a pod."""


class Manifests:
    """Rendered resources: one Deployment and what belongs to it."""

    def __init__(self, resources: list[dict[str, Any]]) -> None:
        self.resources = resources

    @classmethod
    def render(cls, folder: Path) -> Manifests:
        """Return the resources that `kubectl apply -k` sends.

        Raises:
            RuntimeError: kustomize has an error, or a warning about a field.
        """
        done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            raise RuntimeError(done.stderr)
        return cls(list(yaml.safe_load_all(done.stdout)))

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [resource for resource in self.resources if resource["kind"] == kind]

    def get(self, kind: str, name: str = "remote-vae") -> dict[str, Any]:
        """Return the resource with this name, or an empty dict."""
        return next((resource for resource in self.all(kind) if resource["metadata"]["name"] == name), {})

    @property
    def deployment(self) -> dict[str, Any]:
        return self.get("Deployment")["spec"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.deployment["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        return self.pod["containers"][0]

    @property
    def environment(self) -> dict[str, str]:
        return self.get("ConfigMap", next(find(self.container, "configMapRef"))["name"]).get("data", {})

    @property
    def settings(self) -> Settings:
        """Return the settings that the service has with these variables."""
        names = [name for name in Settings.model_fields if f"VAE_{name.upper()}" in self.environment]
        return Settings.model_validate({name: self.environment[f"VAE_{name.upper()}"] for name in names})

    def startup_seconds(self) -> float:
        probe = self.container["startupProbe"]
        return probe["periodSeconds"] * probe["failureThreshold"]


def find(node: Any, key: str) -> Iterator[Any]:
    """Yield each value of a key, at any depth."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from find(child, key)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([a-z]+)", text).groups()
    return int(number) * UNITS[unit]


def problems(manifests: Manifests) -> list[str]:
    """Return a sentence for each mistake."""
    checks = (check_schemas, check_references, check_settings, check_rights, check_end, check_ingress, check_scaling)
    return [problem for check in checks for problem in check(manifests)]


def check_schemas(manifests: Manifests) -> Iterator[str]:
    for resource in manifests.resources:
        if problem := schema_problem(json.dumps(resource)):
            yield f"{resource['kind']} {problem}"


@cache
def schema_problem(resource: str) -> str | None:
    """Check a resource, as JSON, against the schemas of its kind, which forbid unknown fields."""
    values = json.loads(resource)
    try:
        if schema := SCHEMAS.get(values["kind"]):
            schema.model_validate(values)
            return None
        for version in KUBERNETES:
            kubernetes_validate.validate(values, version, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


def check_references(manifests: Manifests) -> Iterator[str]:
    """Check that each name, port and label leads to something."""
    labels = manifests.deployment["template"]["metadata"]["labels"]
    service = manifests.get("Service")["spec"]
    selectors = [*find(manifests.resources, "matchLabels"), service["selector"]]
    if any(not selector or not selector.items() <= labels.items() for selector in selectors):
        yield "a selector does not match the pods"
    probes = list(find(manifests.container, "httpGet"))
    if [probe["path"] for probe in probes] != ["/health"] * 3:
        yield "startup, readiness and liveness probes ask for /health"
    used = {probe["port"] for probe in probes} | set(find(service, "targetPort"))
    used |= {each["port"] for endpoints in find(manifests.resources, "podMetricsEndpoints") for each in endpoints}
    if not used <= {port["name"] for port in manifests.container["ports"]}:
        yield "a port is not one of the container"
    mounts = {mount["name"] for mount in manifests.container["volumeMounts"]}
    if mounts != {volume["name"] for volume in manifests.pod["volumes"]}:
        yield "volumes and mounts differ"
    claims = {each["metadata"]["name"] for each in manifests.all("PersistentVolumeClaim")}
    if set(find(manifests.pod, "claimName")) != claims:
        yield "the pods do not mount the volume claim"
    backends = [backend["service"] for backend in find(manifests.all("Ingress"), "backend")]
    targets = [(each["name"], each["port"]["name"]) for each in backends]
    targets += [(each["service"], each["portName"]) for each in find(manifests.all("InterceptorRoute"), "target")]
    for name, port in targets:
        if port not in {each["name"] for each in manifests.get("Service", name).get("spec", {"ports": []})["ports"]}:
            yield f"there is no Service {name} with a port {port}"
    hosts = set(find(manifests.all("Ingress"), "host")).union(*find(manifests.resources, "hosts"))
    if len(hosts) > 1:
        yield f"more than one host: {sorted(hosts)}"


def check_settings(manifests: Manifests) -> Iterator[str]:
    """Check the variables and the image."""
    if unknown := manifests.environment.keys() - VARIABLES:
        yield f"the service has no variables {sorted(unknown)}"
    for key in str(manifests.settings.model).split(","):
        if key not in MODELS:
            yield f"there is no model {key!r}"
    device = "cuda" if "nvidia.com/gpu" in manifests.container["resources"]["limits"] else "cpu"
    if not manifests.container["image"].endswith(f"/remote-vae:{VERSION}-{device}"):
        yield f"the tag of the image is not {VERSION}-{device}"
    if manifests.container["resources"]["limits"].get("nvidia.com/gpu", "1") != "1":
        yield "a replica has one GPU"


def check_rights(manifests: Manifests) -> Iterator[str]:
    """Check for what the namespace enforces, which is the standard `restricted` of Kubernetes."""
    pod, own = manifests.pod["securityContext"], manifests.container["securityContext"]
    if "restricted" not in find(manifests.get("Namespace"), "pod-security.kubernetes.io/enforce"):
        yield "the namespace does not enforce `restricted`"
    if not (pod["runAsNonRoot"] and pod["runAsUser"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}):
        yield "the pod may run as root, or without seccomp"
    if own["allowPrivilegeEscalation"] or own["capabilities"] != {"drop": ["ALL"]}:
        yield "the container may gain rights"
    if own["readOnlyRootFilesystem"] and not {"/cache", "/tmp"} <= set(find(manifests.container, "mountPath")):
        yield "the service cannot write to /cache and /tmp"


def check_end(manifests: Manifests) -> Iterator[str]:
    """Check the seconds of a start and of an end."""
    settings, pause = manifests.settings, float(next(find(manifests.container, "preStop"))["exec"]["command"][1])
    needed = pause + settings.drain_delay + settings.grace + 5
    if manifests.pod["terminationGracePeriodSeconds"] <= needed:
        yield f"terminationGracePeriodSeconds: preStop, VAE_DRAIN_DELAY, VAE_GRACE and 5 seconds are {needed:g}"
    if settings.grace < settings.timeout:
        yield "VAE_GRACE is shorter than VAE_TIMEOUT"
    if manifests.deployment["progressDeadlineSeconds"] <= manifests.startup_seconds():
        yield "progressDeadlineSeconds is shorter than the startup probe"
    if manifests.get("PodDisruptionBudget")["spec"].get("maxUnavailable", 0) < 1:
        yield "the budget keeps a node with the only replica from being drained"


def check_ingress(manifests: Manifests) -> Iterator[str]:
    """Check balancing, sizes and timeouts on the way to a replica."""
    settings = manifests.settings
    route = manifests.get("InterceptorRoute")
    readiness, response = (seconds(next(find(route, key), "0s")) for key in ("readiness", "responseHeader"))
    for ingress in manifests.all("Ingress"):
        values = {name.removeprefix(INGRESS): value for name, value in ingress["metadata"]["annotations"].items()}
        number, unit = re.fullmatch(r"(\d+)([kmg]?)", values["proxy-body-size"]).groups()
        if int(number) * SIZES[unit] < settings.max_body_mb * 1e6:
            yield "proxy-body-size is smaller than VAE_MAX_BODY_MB"
        if route and {"maxconn-server", "health-check-uri"} & values.keys():
            yield "the interceptor is one server for all requests, and has no /health"
        needed = max(readiness + response, settings.timeout + 1)
        if seconds(values["timeout-server"]) < needed:
            yield f"timeout-server is shorter than {needed:g} seconds"
        if "option http-server-close" not in values["config-backend"]:
            yield "HAProxy keeps connections that the service closes"
        if values["balance-algorithm"] != "leastconn":
            yield "the ingress does not balance by least connections"
    if route and response <= settings.timeout:
        yield "responseHeader is shorter than VAE_TIMEOUT"
    if route and readiness < manifests.startup_seconds():
        yield "readiness is shorter than the startup probe"


def check_scaling(manifests: Manifests) -> Iterator[str]:
    """Check the autoscaler's target, bounds and triggers."""
    namespace = {"namespace": manifests.get("Namespace")["metadata"]["name"]}
    for scaled in (each["spec"] for each in manifests.all("ScaledObject")):
        if not manifests.get("Deployment", scaled["scaleTargetRef"]["name"]):
            yield "the ScaledObject has another target"
        if scaled["minReplicaCount"] > scaled["maxReplicaCount"]:
            yield "minReplicaCount is above maxReplicaCount"
        for trigger in (each["metadata"] for each in scaled["triggers"]):
            if any(labels != namespace for _, labels in series(trigger.get("query", "0"))):
                yield f"the query is not about the namespace {namespace['namespace']}"
            if "interceptorRoute" in trigger and not manifests.get("InterceptorRoute", trigger["interceptorRoute"]):
                yield "the trigger has another route"
        if manifests.all("InterceptorRoute") and scaled["minReplicaCount"] != 0:
            yield "with a route, minReplicaCount is 0"


def series(query: str) -> list[tuple[str, dict[str, str]]]:
    """Return the name and the label matchers of each series in a PromQL expression.

    Raises:
        ValueError: the expression is not PromQL.
    """
    found: list[tuple[str, dict[str, str]]] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name: matcher.value for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def unknown_series(query: str, exposition: str) -> list[str]:
    """Return the series of a PromQL expression that are not in the text of `/metrics`, with their labels."""
    samples = [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]
    return [
        f"{name} {sorted(labels)}"
        for name, labels in series(query)
        if not any(
            sample.name == name and labels.keys() <= sample.labels.keys() | FROM_PROMETHEUS for sample in samples
        )
    ]
