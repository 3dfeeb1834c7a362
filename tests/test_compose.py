"""deploy/compose.yaml, as Docker Compose itself reads it; and the files that it mounts."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvasrt import __version__
from canvasrt.pipeline.settings import Pipeline, load_pipeline
from canvasrt.profiles.profile import load_profile
from dockerfiles import read
from planning import DEMO, ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
CPU = DEPLOY / "compose.cpu.yaml"
PROFILES = sorted(file.stem for file in (ROOT / "src" / "canvasrt" / "profiles").glob("*.yaml"))
FLAVORS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt", "torch": "cpu"}
KILLED_AFTER = 5  # seconds after the drain: docs/serving-operations.md#signals

Config = dict[str, Any]


def config(*files: Path, settings: Path = Path(os.devnull)) -> Config:
    """The files as Compose understands them. The program is the real one; it needs no Docker for this."""
    program = shutil.which("docker-compose", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert program is not None, "docker-compose is not there: make setup"
    words = [program, *(f"--file={file}" for file in files), f"--env-file={settings}", "--profile=*"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CANVASRT_", "COMPOSE_"))}
    done = subprocess.run(
        [*words, "config", "--format=json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def gpu() -> Config:
    return config(COMPOSE)


@pytest.fixture(scope="module")
def cpu() -> Config:
    return config(COMPOSE, CPU)


def faults(found: Config) -> list[str]:
    """What a service must not be like, whichever it is."""
    said = []
    for name, service in found["services"].items():
        if not re.search(r":v?\d+\.\d+\.\d+(-(rtx|tensorrt|cpu))?$", service["image"]):
            said.append(f"{name}: the image {service['image']} is not pinned")
        if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
            said.append(f"{name}: it may write or has capabilities")
        if service.get("security_opt") != ["no-new-privileges:true"]:
            said.append(f"{name}: it may gain privileges")
        for port in service.get("ports", []):
            if port.get("host_ip") != "127.0.0.1":
                said.append(f"{name}: port {port['target']} is open to the network")
        for mount in service.get("volumes", []):
            if mount["type"] == "bind" and not Path(mount["source"]).exists():
                said.append(f"{name}: {mount['source']} is not there")
            if mount["type"] == "bind" and not mount.get("read_only"):
                said.append(f"{name}: {mount['source']} may be written")
        if any("TOKEN" in key for key in service.get("environment") or {}):
            said.append(f"{name}: a token is in its environment, which docker inspect shows")
    return said


def test_services_are_pinned_local_and_contained(gpu: Config, cpu: Config) -> None:
    assert set(gpu["services"]) == set(cpu["services"]) == {"prepare", "serve", "prometheus", "grafana"}
    assert faults(gpu) == faults(cpu) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"image": "grafana/grafana:latest"}, "not pinned"),
        ({"read_only": False}, "may write"),
        ({"security_opt": []}, "privileges"),
        ({"ports": [{"target": 8000, "host_ip": "0.0.0.0"}]}, "open to the network"),
        ({"volumes": [{"type": "bind", "source": "/nowhere", "read_only": True}]}, "is not there"),
        ({"volumes": [{"type": "bind", "source": "/tmp"}]}, "may be written"),
        ({"environment": {"HF_TOKEN": "hf_x"}}, "docker inspect"),
    ],
)
def test_each_fault_would_be_noticed(gpu: Config, change: Config, fault: str) -> None:
    planted = copy.deepcopy(gpu)
    planted["services"]["serve"].update(change)
    (said,) = faults(planted)
    assert fault in said


def test_the_example_documents_every_setting_with_its_default(gpu: Config) -> None:
    example = DEPLOY / ".env.example"
    used = set(re.findall(r"\$\{(CANVASRT_\w+)", COMPOSE.read_text() + CPU.read_text()))
    assert used == set(re.findall(r"^(CANVASRT_\w+)=", example.read_text(), re.MULTILINE))
    assert config(COMPOSE, settings=example) == gpu


def test_settings_reach_what_they_are_for(tmp_path: Path) -> None:
    settings = tmp_path / "env"
    settings.write_text(
        f"CANVASRT_PROFILE=h100\nCANVASRT_FLAVOR=tensorrt\nCANVASRT_VERSION=9.9.9\nCANVASRT_GPU=3\n"
        f"CANVASRT_MODELS={tmp_path}\nCANVASRT_ADDRESS=10.0.0.1\nCANVASRT_HTTP_PORT=80\nCANVASRT_DRAIN_SECONDS=60\n"
        "CANVASRT_STOP_SECONDS=75\n"
    )
    services = config(COMPOSE, settings=settings)["services"]
    for name in ("prepare", "serve"):
        sources = {mount["target"]: mount["source"] for mount in services[name]["volumes"]}
        pipeline = str(DEPLOY / "pipelines" / "h100.yaml")
        assert sources == {"/etc/canvasrt/pipeline.yaml": pipeline, "/models": str(tmp_path)}
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"]) == ("nvidia", ["3"])
        assert services[name]["build"]["args"] == {"FLAVOR": "tensorrt", "VERSION": "9.9.9"}
    assert services["serve"]["image"] == "canvasrt/server:9.9.9-tensorrt"
    assert services["serve"]["ports"][0] == {
        "mode": "ingress", "host_ip": "10.0.0.1", "target": 8000, "published": "80", "protocol": "tcp",
    }  # fmt: skip
    assert "--drain-seconds=60" in services["serve"]["command"]
    assert services["serve"]["stop_grace_period"] == "1m15s"


def test_the_server_waits_for_the_product_and_has_time_to_drain(gpu: Config) -> None:
    serve = gpu["services"]["serve"]
    assert serve["image"] == f"canvasrt/server:{__version__}-rtx"
    assert serve["depends_on"]["prepare"]["condition"] == "service_completed_successfully"
    (drain,) = (int(word.partition("=")[2]) for word in serve["command"] if word.startswith("--drain-seconds="))
    assert int(serve["stop_grace_period"].removesuffix("s")) >= drain + KILLED_AFTER + 10
    assert int(serve["shm_size"]) >= 2**30
    assert any(mount.startswith("/tmp") for mount in serve["tmpfs"])


def test_health_is_asked_as_the_image_asks(gpu: Config) -> None:
    stage = read(DEPLOY / "server.Dockerfile").stage("server")
    health = stage.last("HEALTHCHECK")
    ours = gpu["services"]["serve"]["healthcheck"]
    assert ours["test"] == ["CMD", *json.loads(health.value.removeprefix("CMD "))]
    theirs = dict(flag.removeprefix("--").split("=") for flag in health.flags)
    assert theirs == {
        "interval": ours["interval"], "timeout": ours["timeout"], "retries": str(ours["retries"]),
        "start-period": ours["start_period"].removesuffix("0s"),
    }  # fmt: skip


def test_the_demo_needs_no_gpu(cpu: Config) -> None:
    for name, image in (("prepare", "builder"), ("serve", "server")):
        service = cpu["services"][name]
        assert "deploy" not in service
        assert service["image"] == f"canvasrt/{image}:{__version__}-cpu"
        assert service["build"]["args"]["FLAVOR"] == "cpu"
        sources = {mount["target"]: mount["source"] for mount in service["volumes"]}
        assert sources["/checkpoint"] == str(DEMO)
        assert load_pipeline(Path(sources["/etc/canvasrt/pipeline.yaml"])).profile == "cpu"


def test_the_token_comes_from_a_file(gpu: Config, tmp_path: Path) -> None:
    prepare = gpu["services"]["prepare"]
    (secret,) = prepare["secrets"]
    assert Path(gpu["secrets"][secret["source"]]["file"]).read_text() == ""  # none, unless somebody has one
    (tmp_path / "token").write_text("hf_secret\n")
    program = tmp_path / "canvasrt"
    program.write_text('#!/bin/sh\necho "$@ token=$HF_TOKEN"\n')
    program.chmod(0o755)
    shell, option, script, name = prepare["entrypoint"]
    script = script.replace("$$", "$").replace(secret["target"], str(tmp_path / "token"))
    words = [shell, option, script, name, *prepare["command"]]
    done = subprocess.run(words, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == "prepare /etc/canvasrt/pipeline.yaml token=hf_secret\n"


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "cpu"])
def test_each_gpu_has_a_pipeline_that_makes_what_its_profile_chooses(profile: str) -> None:
    file = DEPLOY / "pipelines" / f"{profile}.yaml"
    pipeline = load_pipeline(file)
    chosen = load_profile(profile).choices
    assert (pipeline.profile, pipeline.volume) == (profile, "/models")
    assert pipeline.bundle is not None
    assert pipeline.bundle.name == f"{profile}-{chosen.recipe.value}"
    assert recipe_of(pipeline) == chosen.recipe.value
    chart = yaml.safe_load((ROOT / "helm" / "canvasrt" / "profiles" / f"{profile}.yaml").read_text())
    assert pipeline.checkpoint is not None
    assert pipeline.checkpoint.source == chart["model"]["source"]
    flavor = FLAVORS[chosen.compiler.value]
    assert f"Images of the flavor {flavor}" in file.read_text()
    page = (ROOT / "docs" / "one-machine.md").read_text()
    disk = chart["persistence"]["size"].removesuffix("Gi")
    assert re.search(rf"^\| `{profile}` \| `{flavor}` \| [^|]+ \| {disk} \|", page, re.MULTILINE)


def recipe_of(pipeline: Pipeline) -> str:
    """What its weights are quantized with, by us or by who published them."""
    if pipeline.quantize is not None:
        return pipeline.quantize.recipe
    assert pipeline.checkpoint is not None
    published = {"NVFP4": "nvfp4-experts", "FP8-dynamic": "fp8"}
    (found,) = (recipe for end, recipe in published.items() if pipeline.checkpoint.source.endswith(end))
    return found


def test_prometheus_finds_the_server_and_the_alerts_find_prometheus(gpu: Config) -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    (job,) = settings["scrape_configs"]
    ((target,),) = (each["targets"] for each in job["static_configs"])
    host, _, port = target.partition(":")
    assert int(port) in {each["target"] for each in gpu["services"][host]["ports"]}
    alerts = (ROOT / "helm" / "canvasrt" / "files" / "alerts.yaml").read_text()
    assert set(re.findall(r'job="([\w-]+)"', alerts)) == {job["job_name"]}
    mounts = {mount["target"]: Path(mount["source"]) for mount in gpu["services"]["prometheus"]["volumes"]}
    assert [mounts[file].name for file in settings["rule_files"]] == ["alerts.yaml"]
    config_file = f"--config.file={next(each for each, file in mounts.items() if file.name == 'prometheus.yaml')}"
    assert config_file in gpu["services"]["prometheus"]["command"]


def test_grafana_finds_prometheus_and_the_dashboard(gpu: Config) -> None:
    grafana = gpu["services"]["grafana"]
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert int(port) in {each["target"] for each in gpu["services"][host]["ports"]}
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = {mount["target"]: Path(mount["source"]) for mount in grafana["volumes"]}
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert json.loads(mounts[home].read_text())["uid"] == "canvasrt"
    for target, file in mounts.items():
        if target.startswith("/etc/grafana/provisioning/"):
            assert Path(target).parent.name == yaml_kind(file)


def yaml_kind(file: Path) -> str:
    """The folder where Grafana looks for it."""
    return "datasources" if "datasources" in yaml.safe_load(file.read_text()) else "dashboards"
