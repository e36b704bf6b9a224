"""Schemas of the custom resources in deploy/kubernetes: the fields that we use, as their projects publish them.

Compared by hand with the `CustomResourceDefinition`s of KEDA 2.20 (config/crd/bases), KEDA's HTTP add-on 0.15
(config/crd/bases) and the Prometheus Operator 0.93 (example/prometheus-operator-crd), all under Apache-2.0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1)]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h)$")]
Labels = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name


class Resource(Strict):
    metadata: Metadata


class ScaleTarget(Strict):
    name: Name


class Trigger(Strict):
    type: Name
    metadata: dict[str, str]


class ScaledObjectSpec(Strict):
    scaleTargetRef: ScaleTarget
    pollingInterval: Annotated[int, Field(ge=1)]
    cooldownPeriod: Annotated[int, Field(ge=0)] | None = None
    minReplicaCount: Annotated[int, Field(ge=0)]
    maxReplicaCount: Annotated[int, Field(ge=1)]
    triggers: Annotated[list[Trigger], Field(min_length=1)]


class ScaledObject(Resource):
    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    spec: ScaledObjectSpec


class RouteTarget(Strict):
    service: Name
    portName: Name


class RoutingRule(Strict):
    hosts: list[str]


class Concurrency(Strict):
    targetValue: Annotated[int, Field(ge=1)]


class ScalingMetric(Strict):
    concurrency: Concurrency


class RouteTimeouts(Strict):
    readiness: Duration
    responseHeader: Duration


class InterceptorRouteSpec(Strict):
    target: RouteTarget
    rules: list[RoutingRule]
    scalingMetric: ScalingMetric
    timeouts: RouteTimeouts


class InterceptorRoute(Resource):
    apiVersion: Literal["http.keda.sh/v1beta1"]
    kind: Literal["InterceptorRoute"]
    spec: InterceptorRouteSpec


class Selector(Strict):
    matchLabels: Labels


class PodMetricsEndpoint(Strict):
    port: Name
    path: str
    interval: Duration


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[PodMetricsEndpoint]


class PodMonitor(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    spec: PodMonitorSpec


class Rule(Strict):
    alert: Name
    expr: Name
    for_: Annotated[Duration, Field(alias="for")] = "0s"
    labels: Labels
    annotations: Labels


class RuleGroup(Strict):
    name: Name
    rules: list[Rule]


class PrometheusRuleSpec(Strict):
    groups: list[RuleGroup]


class PrometheusRule(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    spec: PrometheusRuleSpec


SCHEMAS = {schema.__name__: schema for schema in (ScaledObject, InterceptorRoute, PodMonitor, PrometheusRule)}
