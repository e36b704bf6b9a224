"""Tests of deploy/kubernetes: schemas, references, the service's own numbers, and queries against a real `/metrics`."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import requests
import yaml

from scripts.local_server import ROOT, serve
from tests.support.manifests import Manifests, problems, unknown_series

pytestmark = pytest.mark.slow

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
MONITORING = KUBERNETES / "components" / "monitoring"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    """Return each overlay, and `zero`: the overlay `gpu` with its last component, as its comment says."""
    folder = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    overlays = {name: Manifests.render(folder / "overlays" / name) for name in OVERLAYS}
    file = folder / "overlays" / "gpu" / "kustomization.yaml"
    file.write_text(file.read_text().replace("# - ../../components/scale-to-zero", "- ../../components/scale-to-zero"))
    return overlays | {"zero": Manifests.render(folder / "overlays" / "gpu")}


@pytest.mark.parametrize("name", [*OVERLAYS, "zero"])
def test_the_manifests_have_no_problem(name: str, rendered: dict[str, Manifests]) -> None:
    assert problems(rendered[name]) == []


def test_an_overlay_has_what_its_comment_says(rendered: dict[str, Manifests]) -> None:
    kinds = {name: {resource["kind"] for resource in each.resources} for name, each in rendered.items()}
    plain = {"Namespace", "ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
    assert kinds["cpu"] == plain
    assert kinds["gpu"] - plain == {"PersistentVolumeClaim", "Ingress", "PodMonitor", "PrometheusRule", "ScaledObject"}
    assert kinds["models"] == kinds["gpu"]
    assert kinds["zero"] - kinds["gpu"] == {"InterceptorRoute"}
    assert [str(rendered[name].settings.model).count(",") for name in ("cpu", "gpu", "models")] == [0, 0, 2]
    assert rendered["gpu"].get("ScaledObject")["spec"]["minReplicaCount"] == 1


def environment(manifests: Manifests) -> dict[str, str]:
    return manifests.environment


def annotations(manifests: Manifests) -> dict[str, str]:
    return manifests.get("Ingress")["metadata"]["annotations"]


def spec(kind: str) -> Callable[[Manifests], dict[str, Any]]:
    return lambda manifests: manifests.get(kind)["spec"]


def pod(manifests: Manifests) -> dict[str, Any]:
    return manifests.pod


def container(manifests: Manifests) -> dict[str, Any]:
    return manifests.container


def probe(manifests: Manifests) -> dict[str, Any]:
    return manifests.container["readinessProbe"]


def trigger(manifests: Manifests) -> dict[str, Any]:
    return manifests.get("ScaledObject")["spec"]["triggers"][0]["metadata"]


HAPROXY = "haproxy-ingress.github.io"
MISTAKES = [
    # a field or a type that the schema of its kind does not have
    (probe, "timeoutSecond", 5, "Deployment spec.template.spec.containers.0.readinessProbe: Additional properties"),
    (probe, "periodSeconds", "5", "Deployment spec.template.spec.containers.0.readinessProbe.periodSeconds: '5'"),
    (spec("ScaledObject"), "minReplicas", 1, "ScaledObject spec.minReplicas: Extra inputs"),
    (trigger, "threshold", 2, "ScaledObject spec.triggers.0.metadata.threshold: Input should be a valid string"),
    (spec("PodMonitor"), "endpoints", [], "PodMonitor spec.endpoints: Extra inputs"),
    (spec("InterceptorRoute"), "target", {"service": "remote-vae", "portName": ""}, "InterceptorRoute spec.target"),
    # a name that leads nowhere
    (spec("PodDisruptionBudget"), "selector", {"matchLabels": {"app": "remote-vae"}}, "a selector does not match"),
    (probe, "httpGet", {"path": "/health", "port": "web"}, "a port is not one of the container"),
    (probe, "httpGet", {"path": "/", "port": "http"}, "startup, readiness and liveness probes ask for /health"),
    (spec("ScaledObject"), "scaleTargetRef", {"name": "vae"}, "the ScaledObject has another target"),
    (environment, "VAE_MODEL", "sdxl,fluks", "there is no model 'fluks'"),
    (environment, "VAE_MAX_BODY", "100", "the service has no variables ['VAE_MAX_BODY']"),
    (container, "image", "ghcr.io/OWNER/remote-vae:0.1.0-cpu", "the tag of the image is not"),
    (trigger, "query", 'sum(inf_queue_size{namespace="default"})', "the query is not about the namespace remote-vae"),
    # a number that does not fit the service's
    (pod, "terminationGracePeriodSeconds", 30, "terminationGracePeriodSeconds: preStop, VAE_DRAIN_DELAY"),
    (environment, "VAE_DRAIN_DELAY", "30", "terminationGracePeriodSeconds: preStop, VAE_DRAIN_DELAY"),
    (environment, "VAE_GRACE", "20", "VAE_GRACE is shorter than VAE_TIMEOUT"),
    (spec("Deployment"), "progressDeadlineSeconds", 600, "progressDeadlineSeconds is shorter than the startup probe"),
    (environment, "VAE_MAX_BODY_MB", "600", "proxy-body-size is smaller than VAE_MAX_BODY_MB"),
    (annotations, f"{HAPROXY}/proxy-body-size", "488281k", "proxy-body-size is smaller than VAE_MAX_BODY_MB"),
    (annotations, f"{HAPROXY}/timeout-server", "330s", "timeout-server is shorter than 1230 seconds"),
    (environment, "VAE_TIMEOUT", "600", "responseHeader is shorter than VAE_TIMEOUT"),
    (annotations, f"{HAPROXY}/balance-algorithm", "random(2)", "does not balance by least connections"),
    (annotations, f"{HAPROXY}/config-backend", "", "HAProxy keeps connections that the service closes"),
    (annotations, f"{HAPROXY}/maxconn-server", "4", "the interceptor is one server for all requests"),
    # a right that a server does not need, or one that it lacks
    (
        pod,
        "securityContext",
        {"runAsNonRoot": True, "runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}},
        "root",
    ),
    (container, "volumeMounts", [{"name": "tmp", "mountPath": "/tmp"}], "cannot write to /cache and /tmp"),
    (spec("PodDisruptionBudget"), "maxUnavailable", 0, "keeps a node with the only replica from being drained"),
]


@pytest.mark.parametrize(("place", "key", "value", "problem"), MISTAKES)
def test_a_mistake_is_found(
    place: Callable[[Manifests], dict[str, Any]], key: str, value: Any, problem: str, rendered: dict[str, Manifests]
) -> None:
    """Plant a mistake into the manifests with every component, which have no problem."""
    manifests = copy.deepcopy(rendered["zero"])
    place(manifests)[key] = value
    assert any(problem in found for found in problems(manifests))


def queries() -> list[str]:
    """Return the PromQL of the alerts, the dashboard and the autoscaler. Metrics of kube-state-metrics are not ours."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    scaled = yaml.safe_load((KUBERNETES / "components" / "autoscaling" / "scaled-object.yaml").read_text())
    found = [rule["expr"] for rule in rules if "kube_" not in rule["expr"]]
    found += [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]
    return [*found, scaled["spec"]["triggers"][0]["metadata"]["query"]]


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the text of `/metrics` of `make serve MODEL=tiny` after a decode."""
    with serve("--model", "tiny", log=tmp_path_factory.mktemp("log") / "log") as url:
        parameters, headers = {"shape": "1,8,8,8", "dtype": "float32"}, {"Content-Type": "tensor/binary"}
        response = requests.post(f"{url}/decode", bytes(4 * 8 * 64), params=parameters, headers=headers, timeout=60)
        assert response.ok, response.text
        return requests.get(f"{url}/metrics", timeout=20).text


@pytest.mark.parametrize("query", queries())
def test_a_query_is_about_metrics_of_the_service(query: str, exposition: str) -> None:
    assert unknown_series(query, exposition) == []


def test_an_unknown_metric_is_found(exposition: str) -> None:
    assert unknown_series("sum(rate(vae_requests[5m]))", exposition) == ["vae_requests []"]
    assert unknown_series('vae_passes_total{kind="tiled"}', exposition) == ["vae_passes_total ['kind']"]
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        unknown_series("sum(rate(vae_requests_total[5m])", exposition)


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
