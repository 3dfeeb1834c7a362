"""The chart renders what it should, for every GPU, with real helm."""

import pytest
import yaml

from canvasrt import __version__
from canvasrt.pipeline.settings import Pipeline
from canvasrt.profiles.profile import load_profile, profile_names
from canvasrt.serve.settings import ServeSettings
from canvasrt.wire import MODEL
from helm import CHART, Object, containers, faults, gpus, one, pods, render, run, server_pod
from test_docs import UsageError, parse

FLAVORS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt", "torch": "cpu"}


def pipeline_of(objects: list[Object]) -> Object:
    return dict(yaml.safe_load(one(objects, "ConfigMap", "demo-canvasrt-pipeline")["data"]["pipeline.yaml"]))


def volume_size(profile: str) -> str:
    return str(yaml.safe_load((CHART / "profiles" / f"{profile}.yaml").read_text())["persistence"]["size"])


def expressions(pod: Object) -> dict[str, list[str]]:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    assert {each["operator"] for each in term["matchExpressions"]} == {"In"}
    return {each["key"]: each["values"] for each in term["matchExpressions"]}


@pytest.mark.parametrize("major", [4, 3])
@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_deployed_as_its_gpu_needs(name: str, major: int) -> None:
    profile = load_profile(name)
    compiler = profile.choices.compiler.value
    objects = render(name, major=major)
    assert faults(objects, name, "1.34") == []
    pod = server_pod(objects)
    prepare, server = containers(pod)
    assert server["image"] == f"canvasrt/server:{__version__}-{FLAVORS[compiler]}"
    assert prepare["image"] == f"canvasrt/builder:{__version__}-{FLAVORS[compiler]}"
    assert gpus(prepare) == (compiler == "tensorrt")  # TensorRT-RTX builds without the GPU
    found = expressions(pod)
    assert found["kubernetes.io/arch"] == profile.facts.cpu_architectures.value
    assert found.get("nvidia.com/gpu.product", []) == profile.facts.product_names.value
    pipeline = Pipeline.model_validate(pipeline_of(objects))
    assert pipeline.profile == name
    assert (pipeline.bundle is None) == (compiler == "torch")


@pytest.mark.parametrize("major", [4, 3])
def test_lint_is_strict(major: int) -> None:
    for name in profile_names():
        done = run("lint", "--strict", CHART, "-f", CHART / "profiles" / f"{name}.yaml", major=major)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert chart["version"] == __version__


def test_a_server_has_time_to_drain_and_to_load() -> None:
    values = {"server.drainSeconds": 100, "preStopSeconds": 7, "server.loadSeconds": 900, "server.answerSeconds": 10}
    pod = server_pod(render("h100", values))
    server = pod["spec"]["containers"][0]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 100 + 7 + 15
    assert "--drain-seconds=100" in server["args"]
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    startup, liveness = server["startupProbe"], server["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900
    # A repair of the server's own: three failed canary requests, then a load.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 900 + 3 * 10
    assert startup["timeoutSeconds"] > 10
    assert MODEL in startup["exec"]["command"][-1]


def test_settings_reach_the_server() -> None:
    settings = {"max_waiting": 9, "reuse_prefixes": False, "patience": 3}
    server = server_pod(render("h100", {"server.settings": settings, "server.logLevel": "debug"}))["spec"][
        "containers"
    ][0]
    given = [each.removeprefix("--set=") for each in server["args"] if each.startswith("--set=")]
    parsed = ServeSettings.parse("/models/x", given)
    assert (parsed.max_waiting, parsed.reuse_prefixes, parsed.patience, parsed.log_level) == (9, False, 3, "debug")


def test_the_pipeline_gets_what_values_say() -> None:
    values = {
        "model.source": "s3://models/dg", "model.quantize.recipe": "fp8", "model.quantize.device": "cuda",
        "model.weights": "stripped", "model.context": 4096, "model.slots": 2, "model.canvases": 1, "model.chunk": 256,
        "model.s3": {"endpoint": "http://minio:9000", "region": "eu", "existingSecret": "s3"},
        "pipeline.verify": "sizes", "pipeline.keepBundles": 2, "model.token.existingSecret": "hf",
    }  # fmt: skip
    objects = render("h100", values)
    pipeline = pipeline_of(objects)
    name = pipeline["bundle"].pop("name")
    assert name.startswith("h100-")
    assert pipeline == {
        "volume": "/models", "profile": "h100", "checkpoint": {"source": "s3://models/dg"},
        "quantize": {"recipe": "fp8", "device": "cuda"}, "kernels": "/models/kernels", "verify": "sizes", "keep": 2,
        "bundle": {"weights": "stripped", "context": 4096, "slots": 2, "canvases": 1, "chunk": 256},
        "s3": {"endpoint": "http://minio:9000", "region": "eu"},
    }  # fmt: skip
    prepare, server = containers(server_pod(objects))
    secrets = {
        each["name"]: each["valueFrom"]["secretKeyRef"]["name"] for each in prepare["env"] if "valueFrom" in each
    }
    assert secrets == {
        "HF_TOKEN": "hf", "AWS_ACCESS_KEY_ID": "s3", "AWS_SECRET_ACCESS_KEY": "s3", "AWS_SESSION_TOKEN": "s3"
    }  # fmt: skip
    assert "env" not in server


def test_a_server_may_write_kernels_and_nothing_else_of_the_volume() -> None:
    mounts = server_pod(render("rtx-5090"))["spec"]["containers"][0]["volumeMounts"]
    of_models = {
        each["mountPath"]: (each.get("readOnly"), each.get("subPath")) for each in mounts if each["name"] == "models"
    }
    assert of_models == {"/models": (True, None), "/models/kernels": (None, "kernels")}


def test_what_a_cluster_asks_of_pods_reaches_them() -> None:
    taint = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    values = {
        "runtimeClassName": "nvidia", "imagePullSecrets": [{"name": "registry"}], "tolerations": [taint],
        "priorityClassName": "high", "persistence.storageClass": "-", "topologySpread.maxSkew": 2,
    }  # fmt: skip
    objects = render("h100", values)
    spec = server_pod(objects)["spec"]
    assert (spec["runtimeClassName"], spec["priorityClassName"], spec["tolerations"]) == ("nvidia", "high", [taint])
    assert all(pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] for _, pod in pods(objects))
    (spread,) = spec["topologySpreadConstraints"]
    labels = server_pod(objects)["metadata"]["labels"]
    assert spread["maxSkew"] == 2
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert one(objects, "PersistentVolumeClaim")["spec"]["storageClassName"] == ""
    assert "storageClassName" not in one(render("h100"), "PersistentVolumeClaim")["spec"]


def test_every_container_runs_a_command_that_there_is() -> None:
    values = {"pipeline.mode": "job", "server.verbose": True, "server.settings": {"slots": 4}}
    for objects in (render("h100"), render("rtx-5090", values)):
        for _, pod in pods(objects):
            for container in containers(pod):
                if "command" not in container:  # the image's entrypoint is canvasrt
                    parse(container["args"])
    with pytest.raises(UsageError):
        parse(["serve", "/models", "--hots=0.0.0.0"])


def test_another_bundle_has_another_name_and_the_same_keeps_it() -> None:
    def bundle(profile: str = "h100", **values: object) -> str:
        return str(
            pipeline_of(render(profile, {key.replace("__", "."): each for key, each in values.items()}))["bundle"][
                "name"
            ]
        )

    same = bundle()
    assert bundle(replicaCount=3, server__drainSeconds=60, pipeline__mode="job") == same
    others = [
        bundle("h200"), bundle(model__context=4096), bundle(model__slots=2), bundle(model__weights="stripped"),
        bundle(model__source="hf://a/b@c"), bundle(model__quantize={"recipe": "fp8", "device": "cpu"}),
        bundle(profile__file="/etc/mine.yaml"),
    ]  # fmt: skip
    assert len({same, *others}) == len(others) + 1


def test_a_job_makes_the_model_and_servers_wait() -> None:
    values = {"pipeline.mode": "job", "persistence.accessMode": "ReadWriteMany", "replicaCount": 8}
    objects = render("h100", values)
    job, pod = one(objects, "Job"), server_pod(objects)
    assert gpus(job["spec"]["template"]["spec"]["containers"][0]) == 1
    (wait,) = pod["spec"]["initContainers"]
    assert wait["args"][:3] == ["prepare", "/etc/canvasrt/pipeline.yaml", "--wait"]
    assert wait["image"] == pod["spec"]["containers"][0]["image"]
    assert gpus(wait) == 0
    assert one(objects, "Deployment")["spec"]["replicas"] == 8
    ahead = one(render("rtx-5090", values), "Job")["spec"]["template"]["spec"]
    assert gpus(ahead["containers"][0]) == 0
    assert expressions({"spec": ahead}) == {"kubernetes.io/arch": ["amd64", "arm64"]}
    # A Job can't be changed, so a changed one is another.
    names = {
        one(render("h100", values | more), "Job")["metadata"]["name"]
        for more in ({}, {"model.context": 4096}, {"image.tag": "x"})
    }
    assert len(names) == 2
    assert (
        len({one(render("h100", values | {"pipeline.image.tag": tag}), "Job")["metadata"]["name"] for tag in "ab"}) == 2
    )


def test_a_replica_can_have_a_volume_of_its_own() -> None:
    objects = render("rtx-5090", {"statefulSet.enabled": True, "replicaCount": 2})
    (claim,) = one(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == volume_size("rtx-5090")
    assert not [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert one(objects, "StatefulSet")["spec"]["serviceName"] in [
        e["metadata"]["name"] for e in objects if e["kind"] == "Service"
    ]


def test_helm_uninstall_leaves_the_volume_unless_told_otherwise() -> None:
    key = "helm.sh/resource-policy"
    assert one(render("h100"), "PersistentVolumeClaim")["metadata"]["annotations"][key] == "keep"
    assert "annotations" not in one(render("h100", {"persistence.keep": False}), "PersistentVolumeClaim")["metadata"]


@pytest.mark.parametrize(
    ("kubernetes", "apis", "version"),
    [("1.34", ("resource.k8s.io/v1",), "v1"), ("1.33", (), None), ("1.32", ("resource.k8s.io/v1beta1",), "v1beta1")],
)
def test_dra_asks_for_a_gpu_by_a_claim(kubernetes: str, apis: tuple[str, ...], version: str | None) -> None:
    values = {
        "gpu.dra": {"enabled": True, "selectors": ["device.attributes['gpu.nvidia.com'].architecture == 'Hopper'"]}
    }
    major = 3 if version == "v1beta1" else 4  # helm 4 knows resource.k8s.io/v1 by itself
    objects = render("h100", values, kubernetes, apis, major)
    assert faults(objects, "h100", kubernetes) == []
    for container in containers(server_pod(objects)):
        assert container["resources"]["claims"] == [{"name": "gpu"}]
        assert not [name for name in container["resources"]["limits"] if "nvidia" in name]
    template = one(objects, "ResourceClaimTemplate")
    if version is not None:
        assert template["apiVersion"] == f"resource.k8s.io/{version}"
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    inner = request if template["apiVersion"].endswith("v1beta1") else request["exactly"]
    assert inner["deviceClassName"] == "gpu.nvidia.com"
    assert inner["selectors"][0]["cel"]["expression"].endswith("'Hopper'")


def test_a_mig_slice_is_another_resource_on_another_product() -> None:
    pod = server_pod(render("h100", {"gpu.mig": "2g.20gb"}))
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/mig-2g.20gb"] == "1"
    assert expressions(pod)["nvidia.com/gpu.product"] == ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3-MIG-2g.20gb"]


def test_nodes_can_be_chosen_by_compute_capability_or_by_hand() -> None:
    found = expressions(server_pod(render("dgx-spark", {"gpu.nodeSelection": "computeCapability"})))
    assert found["nvidia.com/gpu.compute.major"] == ["12"]
    assert found["nvidia.com/gpu.compute.minor"] == ["1"]
    assert found["kubernetes.io/arch"] == ["arm64"]
    own = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}}
    pod = server_pod(render("h100", {"gpu.nodeSelection": "none", "nodeSelector": {"pool": "a"}, "affinity": own}))
    assert list(expressions(pod)) == ["kubernetes.io/arch"]
    assert pod["spec"]["nodeSelector"] == {"pool": "a"}
    assert "podAntiAffinity" in pod["spec"]["affinity"]


def test_a_model_that_is_there_needs_no_pipeline() -> None:
    objects = render("h100", {"pipeline.mode": "none", "model.path": "/bundle/dg", "persistence.enabled": False})
    pod = server_pod(objects)
    assert "initContainers" not in pod["spec"]
    assert pod["spec"]["containers"][0]["args"][:2] == ["serve", "/bundle/dg"]
    assert "--set=kernels=/tmp/dg.kernels" in pod["spec"]["containers"][0]["args"]
    assert [each["kind"] for each in objects if each["kind"] in ("ConfigMap", "PersistentVolumeClaim")] == []


def test_notes_tell_the_next_three_commands() -> None:
    def notes(*more: str) -> str:
        done = run("install", "demo", CHART, "-n", "models", "--dry-run=client", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("NOTES:")[1]

    files = ("-f", str(CHART / "profiles" / "h100.yaml"))
    said = notes(*files)
    assert "logs -f deployment/demo-canvasrt -c prepare" in said
    assert "helm -n models test demo" in said
    assert "port-forward svc/demo-canvasrt" in said
    assert "names no revision" in said
    assert "names no revision" not in notes(*files, "--set", "model.source=hf://a/b@1234")
    assert "component=pipeline" in notes(*files, "--set", "pipeline.mode=job,persistence.accessMode=ReadWriteMany")
    assert "one node can mount" in notes(*files, "--set", "replicaCount=2")


def test_the_test_hook_compares_the_answer() -> None:
    pod = one(render("h100", {"tests.prompt": "a 'quoted' $(prompt)", "tests.expect": "^b"}), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert given["PROMPT"] == "a 'quoted' $(prompt)"
    assert given["ADDRESS"] == "demo-canvasrt:8001"
    assert '"$PROMPT"' in container["args"][0]
