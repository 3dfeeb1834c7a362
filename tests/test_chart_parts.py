"""What the chart puts around its servers: monitors, alerts, scaling, policies and ways in, with real helm."""

import json
import re
from typing import Any

import pytest
import yaml

from helm import ROOT, Object, arguments, containers, faults, one, pods, render, run, server_pod
from promql import faults as query_faults
from promql import known

MONITORING, GATEWAY = "monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"
KEDA, POOL = "keda.sh/v1alpha1", "inference.networking.k8s.io/v1"
APIS = (MONITORING, GATEWAY, KEDA, POOL)
PARENT = [{"name": "public", "namespace": "gateways"}]
HPA = {"enabled": True, "maxReplicas": 3}
BY_KEDA = {**HPA, "type": "keda", "prometheus": {"serverAddress": "http://prometheus:9090"}}
EVERYTHING: Object = {
    "metrics.serviceMonitor.enabled": True, "metrics.prometheusRule.enabled": True,
    "metrics.dashboard.enabled": True, "autoscaling": HPA, "networkPolicy.enabled": True,
    "ingress": {"enabled": True, "hosts": [{"host": "a.example.org"}]},
    "httpRoute": {"enabled": True, "parentRefs": PARENT, "hostnames": ["a.example.org"]},
    "grpcRoute": {"enabled": True, "parentRefs": PARENT, "hostnames": ["b.example.org"]},
    "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
}  # fmt: skip
KINDS = {
    "ServiceMonitor", "PrometheusRule", "HorizontalPodAutoscaler", "NetworkPolicy", "Ingress", "HTTPRoute",
    "GRPCRoute", "InferencePool", "PodDisruptionBudget",
}  # fmt: skip


def rendered(values: Object | None = None, profile: str = "h100", major: int = 4) -> list[Object]:
    return render(profile, values, apis=APIS, major=major)


def refused(values: Object, *apis: str) -> str:
    given = [*arguments("h100", values), *(f"--api-versions={api}" for api in apis)]
    done = run("template", "demo", ROOT / "helm" / "canvasrt", *given)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize("major", [4, 3])
def test_everything_together_is_what_a_cluster_takes(major: int) -> None:
    objects = rendered(EVERYTHING, major=major)
    assert {each["kind"] for each in objects} >= KINDS
    assert faults(objects, "h100", "1.34") == []


def test_nothing_is_made_that_was_not_asked_for() -> None:
    kinds = {each["kind"] for each in render("h100", {"podDisruptionBudget.enabled": False})}
    assert not kinds & KINDS
    assert "PodDisruptionBudget" in {each["kind"] for each in render("h100")}


@pytest.mark.parametrize(("key", "kind"), [("serviceMonitor", "ServiceMonitor"), ("podMonitor", "PodMonitor")])
def test_a_monitor_gives_the_labels_that_rules_and_dashboard_want(key: str, kind: str) -> None:
    labels = {"release": "stack", "app.kubernetes.io/version": "mine"}
    values = {f"metrics.{key}": {"enabled": True, "interval": "20s", "labels": labels}, "fullnameOverride": "dg"}
    objects = rendered(values)
    monitor = one(objects, kind)
    (endpoint,) = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
    ports = {port["name"] for port in server_pod(objects)["spec"]["containers"][0]["ports"]}
    assert endpoint["port"] in ports & {port["name"] for port in one(objects, "Service", "dg")["spec"]["ports"]}
    assert endpoint["interval"] == "20s"
    set_to = {each["targetLabel"]: each["replacement"] for each in endpoint["relabelings"]}
    assert set_to == {"job": "canvasrt", "service": "dg"}
    assert labels.items() <= monitor["metadata"]["labels"].items()


def test_rules_reach_prometheus_as_they_are() -> None:
    written = yaml.safe_load((ROOT / "helm" / "canvasrt" / "files" / "alerts.yaml").read_text())["groups"]
    rule = one(rendered({"metrics.prometheusRule.enabled": True}), "PrometheusRule")
    assert rule["spec"]["groups"] == written
    assert "{{ $labels.instance }}" in json.dumps(rule)


def test_alerts_can_be_left_out_by_name() -> None:
    values = {"metrics.prometheusRule": {"enabled": True, "disabled": ["CanvasRTSlotsFull", "CanvasRTErrors"]}}
    text = json.dumps(one(rendered(values), "PrometheusRule"))
    assert "CanvasRTRefusing" in text
    assert '"alert": "CanvasRTSlotsFull"' not in text
    assert '"alert": "CanvasRTErrors"' not in text


def test_the_dashboard_reaches_grafana_as_it_is() -> None:
    values = {"metrics.dashboard": {"enabled": True, "annotations": {"grafana_folder": "Inference"}}}
    config = one(rendered(values), "ConfigMap", "demo-canvasrt-dashboard")
    written = json.loads((ROOT / "helm" / "canvasrt" / "files" / "dashboard.json").read_text())
    assert json.loads(config["data"]["canvasrt.json"]) == written
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"] == {"grafana_folder": "Inference"}


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("scaling", "kind"), [(HPA, "HorizontalPodAutoscaler"), (BY_KEDA, "ScaledObject")])
def test_the_scaler_owns_the_number_of_pods(scaling: Object, kind: str, stateful: bool) -> None:
    objects = rendered({"autoscaling": scaling, "statefulSet.enabled": stateful})
    workload = one(objects, "StatefulSet" if stateful else "Deployment")
    assert "replicas" not in workload["spec"]  # helm upgrade would set it back
    target = one(objects, kind)["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": workload["kind"], "name": workload["metadata"]["name"]}
    assert faults(objects, "h100", "1.34") == []


def test_the_autoscaler_asks_for_what_the_documented_adapter_offers() -> None:
    scaler = one(rendered({"autoscaling": {**HPA, "target": {"waitingRequests": 7, "slotUse": 0.75}}}),
                 "HorizontalPodAutoscaler")  # fmt: skip
    asked = {each["pods"]["metric"]["name"]: each["pods"]["target"] for each in scaler["spec"]["metrics"]}
    assert asked == {
        "canvasrt_requests_waiting": {"type": "AverageValue", "averageValue": "7"},
        "canvasrt_slot_use": {"type": "AverageValue", "averageValue": "750m"},
    }
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "seriesQuery" in text)
    offered = {rule["name"]["as"]: rule for rule in yaml.safe_load(block)["rules"]["custom"]}
    assert set(offered) == set(asked)
    for rule in offered.values():
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="a",pod=~"b"')
        assert query_faults(query.replace("<<.GroupBy>>", "pod"), known()) == []
        assert query_faults(rule["seriesQuery"], known()) == []


def test_keda_asks_for_this_release_only() -> None:
    triggers = one(rendered({"autoscaling": BY_KEDA}), "ScaledObject")["spec"]["triggers"]
    assert [each["metadata"]["threshold"] for each in triggers] == ["4", "0.8"]
    for each in triggers:
        query = each["metadata"]["query"]
        assert query_faults(query, known()) == []
        assert query.count('{namespace="models",service="demo-canvasrt"}') == query.count("canvasrt_")
        assert query.startswith("sum(")  # one number for all Pods, of which AverageValue gives each its part
        assert each["metricType"] == "AverageValue"
    own = {**BY_KEDA, "target": {"waitingRequests": None, "slotUse": 0.5}}
    own["prometheus"] = {**own["prometheus"], "matchers": 'job="x"', "authentication": "prom"}
    (trigger,) = one(rendered({"autoscaling": own}), "ScaledObject")["spec"]["triggers"]
    assert 'canvasrt_slots{job="x"}' in trigger["metadata"]["query"]
    assert trigger["authenticationRef"] == {"name": "prom"}


def policy(values: Object, name: str = "demo-canvasrt") -> Object:
    return dict(one(rendered({"networkPolicy.enabled": True} | values), "NetworkPolicy", name)["spec"])


def egress_ports(spec: Object) -> list[Any]:
    """Those that are open to every address."""
    return [port["port"] for rule in spec["egress"] if "to" not in rule for port in rule["ports"]]


def test_the_network_is_closed_but_for_what_is_named() -> None:
    peer = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}]
    extra = [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 4317, "protocol": "TCP"}]}]
    values = {"networkPolicy": {"enabled": True, "from": peer, "metricsFrom": peer, "egress": extra}}
    objects = rendered(values)
    spec = one(objects, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    requests, metrics = spec["ingress"]
    assert [port["port"] for port in requests["ports"]] == ["http", "grpc"]
    assert metrics == {"from": peer, "ports": [{"port": "metrics", "protocol": "TCP"}]}
    assert requests["from"][:1] == peer
    # helm's test comes from a Pod of the release that is no server.
    (own,) = (each["podSelector"]["matchLabels"] for each in requests["from"][1:])
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects)}
    assert own.items() <= labels["Pod demo-canvasrt-test"].items()
    dns = spec["egress"][0]
    assert {port["protocol"] for port in dns["ports"]} == {"UDP", "TCP"}
    assert {port["port"] for port in dns["ports"]} == {53}
    assert spec["egress"][-1:] == extra
    assert spec["podSelector"]["matchLabels"].items() <= server_pod(objects)["metadata"]["labels"].items()
    assert not spec["podSelector"]["matchLabels"].items() <= labels["Pod demo-canvasrt-test"].items()


@pytest.mark.parametrize(
    ("model", "ports"),
    [
        ({"source": "hf://org/name"}, [443]),
        ({"source": "s3://bucket/x"}, [443]),
        ({"source": "s3://bucket/x", "s3": {"endpoint": "http://minio:9000"}}, [9000]),
        ({"source": "s3://bucket/x", "s3": {"endpoint": "http://[fd00::1]"}}, [80]),
        ({"source": "hf://org/name", "bundleSource": "oci://registry:5000/a/b:1"}, [443, 5000]),
        ({"source": "oci://registry.example.org/a/b:1"}, [443]),
        ({"source": "oci://registry/a/b:1", "oci": {"insecure": True}}, [80]),
        ({"source": "/models/there"}, []),
    ],
)
def test_the_way_to_the_models_source_is_open(model: Object, ports: list[int]) -> None:
    values = {"model": {"quantize": {"recipe": ""}, **model}}
    assert egress_ports(policy(values)) == ports
    as_job = values | {"pipeline.mode": "job"}
    assert egress_ports(policy(as_job)) == []  # a server beside a Job reaches nothing
    assert egress_ports(policy(as_job, "demo-canvasrt-pipeline")) == ports


def test_the_policy_of_the_job_is_about_the_job() -> None:
    objects = rendered({"networkPolicy.enabled": True, "pipeline.mode": "job"})
    wanted = one(objects, "NetworkPolicy", "demo-canvasrt-pipeline")["spec"]
    (job,) = (pod for name, pod in pods(objects) if name.startswith("Job"))
    chosen = wanted["podSelector"]["matchLabels"].items()
    assert chosen <= job["metadata"]["labels"].items()
    assert not chosen <= server_pod(objects)["metadata"]["labels"].items()
    assert "ingress" not in wanted


def test_a_model_in_the_image_needs_no_way_out() -> None:
    # The profile's own source is still in the values, and nobody fetches it.
    assert egress_ports(policy({"model.path": "/models/x", "pipeline.mode": "none"})) == []


def test_ways_in_lead_to_the_ports_of_the_service() -> None:
    objects = rendered(EVERYTHING | {"service.httpPort": 80, "service.grpcPort": 90, "httpRoute.timeout": "600s"})
    ports = {port["name"]: port["port"] for port in one(objects, "Service", "demo-canvasrt")["spec"]["ports"]}
    (http,) = one(objects, "HTTPRoute")["spec"]["rules"]
    assert http["backendRefs"] == [{"name": "demo-canvasrt", "port": ports["http"]}]
    assert http["timeouts"] == {"request": "600s"}
    (grpc,) = one(objects, "GRPCRoute")["spec"]["rules"]
    assert grpc["backendRefs"] == [{"name": "demo-canvasrt", "port": ports["grpc"]}]
    (rule,) = one(objects, "Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "demo-canvasrt", "port": {"name": "http"}}
    assert (path["path"], path["pathType"]) == ("/v2", "Prefix")
    # A pool speaks to Pods: their port, whatever the Service's is.
    container = containers(server_pod(objects))[-1]
    (pool,) = one(objects, "InferencePool")["spec"]["targetPorts"]
    assert pool["number"] == {port["name"]: port["containerPort"] for port in container["ports"]}["http"]


def test_a_drain_may_take_a_pod_that_is_not_ready() -> None:
    spec = one(rendered({"podDisruptionBudget.maxUnavailable": "25%"}), "PodDisruptionBudget")["spec"]
    assert spec["maxUnavailable"] == "25%"
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize(
    ("values", "api", "key"),
    [
        ({"metrics.serviceMonitor.enabled": True}, MONITORING, "metrics.serviceMonitor.enabled"),
        ({"metrics.podMonitor.enabled": True}, MONITORING, "metrics.podMonitor.enabled"),
        ({"metrics.prometheusRule.enabled": True}, MONITORING, "metrics.prometheusRule.enabled"),
        ({"autoscaling": BY_KEDA}, KEDA, "autoscaling.enabled"),
        ({"httpRoute": EVERYTHING["httpRoute"]}, GATEWAY, "httpRoute.enabled"),
        ({"grpcRoute": EVERYTHING["grpcRoute"]}, GATEWAY, "grpcRoute.enabled"),
        ({"inferencePool": EVERYTHING["inferencePool"]}, POOL, "inferencePool.enabled"),
    ],
)
def test_an_api_that_the_cluster_lacks_is_named(values: Object, api: str, key: str) -> None:
    said = refused(values)
    assert key in said
    assert f"--api-versions {api}" in said
    assert render("h100", values, apis=(api,))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ingress.enabled": True}, "ingress.hosts is empty"),
        ({"httpRoute.enabled": True}, "httpRoute.parentRefs is empty"),
        ({"grpcRoute.enabled": True}, "grpcRoute.parentRefs is empty"),
        (
            {
                f"{key}Route": {"enabled": True, "parentRefs": PARENT, "hostnames": ["a.org"]}
                for key in ("http", "grpc")
            },
            "grpcRoute.hostnames and httpRoute.hostnames are the same",
        ),
        ({"inferencePool.enabled": True}, "inferencePool.endpointPicker.name is empty"),
        ({"autoscaling": {"enabled": True, "type": "keda"}}, "autoscaling.prometheus.serverAddress is empty"),
        ({"autoscaling": {**HPA, "minReplicas": 4}}, "autoscaling.minReplicas is 4 and autoscaling.maxReplicas 3"),
        ({"autoscaling": {**BY_KEDA, "minReplicas": 4}}, "autoscaling.minReplicas is 4 and autoscaling.maxReplicas 3"),
        (
            {"autoscaling": {**HPA, "target": {"waitingRequests": None, "slotUse": None}}},
            "autoscaling.target.waitingRequests and autoscaling.target.slotUse are both null",
        ),
        (
            {"metrics.serviceMonitor.enabled": True, "metrics.podMonitor.enabled": True},
            "metrics.serviceMonitor.enabled and metrics.podMonitor.enabled are both true",
        ),
        (
            {"metrics.prometheusRule": {"enabled": True, "disabled": ["CanvasRTNoSuch"]}},
            "metrics.prometheusRule.disabled names CanvasRTNoSuch",
        ),
        # By the schema:
        ({"autoscaling": {**HPA, "minReplicas": 0}}, "minReplicas"),
        ({"networkPolicy": {"enabled": True, "from": [{"podSelecto": {}}]}}, "podSelecto"),
        ({"metrics.serviceMonitor": {"enabled": True, "interval": "15"}}, "interval"),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_of_its_key(values: Object, said: str) -> None:
    assert said in refused(values, *APIS)
