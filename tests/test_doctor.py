"""``canvasrt doctor`` on machines of all kinds: what it finds, what fits, what to type."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from solve import CHECKPOINT

import doctor_machines as kinds
from canvasrt.compile.vram import Deployment, Setting
from canvasrt.doctor import containers, gpu, model
from canvasrt.doctor.checks import Check
from canvasrt.doctor.host import LEAST_GLIBC
from canvasrt.doctor.machine import Answer, Disk
from canvasrt.doctor.report import FITS
from canvasrt.errors import CheckpointError, InputError
from canvasrt.profiles.detect import QUERY
from canvasrt.profiles.profile import load_profile, profile_names
from canvasrt.spec import ModelSpec
from doctor_machines import GIB, FakeMachine, check, looked, printed, status, well_formed


def test_the_packages_own_dimensions_are_the_published_ones() -> None:
    assert model.open_model(None).source.spec == ModelSpec.load(kinds.PUBLISHED)
    own, fixture = (looked(kinds.rtx_5090(), checkpoint=folder) for folder in (None, kinds.PUBLISHED))
    assert own.fits == fixture.fits
    assert fixture.next[1].startswith("# put the safetensors files beside")


def test_a_desktop_that_has_everything_has_nothing_to_mend() -> None:
    report = looked(kinds.rtx_5090())
    assert {each.status for each in report.checks} == {"ok", "skipped"}, report.checks
    assert check(report, "driver").finding == "610.57.04, CUDA 13.3"
    assert "profile rtx-5090" in check(report, "GPU 0", "GPU").finding
    assert check(report, "GPU 0 memory").finding == "33.6 GB of 34.2 GB are free"
    assert check(report, "GPUs in containers").finding == "Docker has the nvidia runtime"
    (fit,) = report.fits
    profile = load_profile("rtx-5090")
    on = Deployment.of(model.open_model(None).planned(profile), profile)
    assert fit.needed_bytes == on.budget(Setting.of(profile, on.spec)).total_bytes
    assert fit.memory_bytes == 33_500_000_000  # of 34.2, less what the desktop uses
    assert (fit.fits, fit.where, fit.slots, fit.context) == (True, ("GPU 0",), 4, 65536)
    download, build, serve = report.next
    assert download.startswith("hf download nvidia/diffusiongemma-26B-A4B-it-NVFP4 --local-dir checkpoints/")
    assert build.endswith("--profile rtx-5090 --out engines/rtx-5090-nvfp4-experts")
    assert serve == "canvasrt serve engines/rtx-5090-nvfp4-experts"


def test_memory_that_others_use_counts_and_a_smaller_setting_is_proposed() -> None:
    machine = kinds.rtx_5090()
    machine.answers[gpu.STATE] = printed("0, GPU-5d2a, 32607, 6000, [N/A], Default\n")
    machine.answers[gpu.APPS] = printed("GPU-5d2a, 812, 5400, /usr/bin/blender\n")
    report = looked(machine)
    assert status(report, "GPU 0 memory") == "warning"
    assert "in use by blender (PID 812, 5.7 GB)" in check(report, "GPU 0 memory").finding
    (fit,) = report.fits
    assert (fit.fits, fit.memory_bytes) == (False, 27_800_000_000)
    assert fit.instead.startswith("--context ")
    assert check(report, "GPU 0", FITS).status == "warning"
    assert fit.advice == f"It fits with {fit.instead}, or as asked once the memory is free that others use."
    assert report.next[1].endswith(fit.instead)
    assert report.faults == 0


def test_a_spark_shares_its_memory_with_the_system() -> None:
    report = looked(kinds.spark())
    assert report.faults == 0
    assert "memory shared with the CPU" in check(report, "GPU 0", "GPU").finding
    assert check(report, "glibc").status == "ok"
    assert check(report, "GPUs in containers").finding == "Docker has CDI devices"
    (fit,) = report.fits
    assert (fit.profile, fit.fits, fit.memory_bytes) == ("dgx-spark", True, 128_500_000_000)
    busy = kinds.spark()
    busy.files["/proc/meminfo"] = kinds.meminfo(119.7, 40)
    (fit,) = looked(busy).fits
    assert fit.memory_bytes == (40 * GIB + 8 * 10**9) // 10**8 * 10**8  # 8 GB are the planner's, for the system
    assert not fit.fits
    assert status(looked(busy), "GPU 0 memory") == "warning"
    old = kinds.spark()
    old.system = replace(old.system, glibc="2.31")
    assert "need 2.35 on aarch64" in check(looked(old), "glibc").finding


def test_a_datacenter_node_with_an_old_driver_a_busy_gpu_and_slices() -> None:
    report = looked(kinds.h100_old())
    driver = check(report, "driver")
    assert (driver.status, driver.finding) == (
        "fault",
        "535.183.01 supports CUDA 12.2, and engines need CUDA 13",
    )
    assert "580" in driver.fix
    assert (status(report, "GPU 0 mode"), check(report, "GPU 0 mode").fix) == ("fault", "sudo nvidia-smi -i 0 -c 0")
    assert "python (PID 99, 62.7 GB)" in check(report, "GPU 0 memory").finding
    assert "slices 1g.10gb, 3g.40gb" in check(report, "GPU 1 MIG").finding
    assert (status(report, "tensorrt_cu13"), check(report, "tensorrt_cu13").fix) == (
        "fault",
        "pip install 'canvasrt[tensorrt]'",
    )
    busy, sliced = report.fits
    assert (busy.fits, busy.instead, busy.memory_bytes) == (False, "", 22_600_000_000)
    assert check(report, "GPU 0", FITS).status == "fault"
    assert "once the memory is free" in busy.advice
    assert (sliced.fits, sliced.memory_bytes) == (False, 40_000_000_000)
    assert check(report, "GPU 1", FITS).status == "warning"
    assert sliced.instead in report.next[2]
    assert "hunter2" not in json.dumps([each.finding for each in report.checks])  # arguments of other processes


def test_slices_that_are_not_there_are_a_fault() -> None:
    machine = kinds.h100_old()
    machine.answers[gpu.LIST] = printed("GPU 0: NVIDIA H100\nGPU 1: NVIDIA H100\n")
    found = check(looked(machine), "GPU 1 MIG")
    assert found.status == "fault"
    assert "-mig 0" in found.fix


def test_a_container_is_measured_by_its_own_limits() -> None:
    report = looked(kinds.container())
    assert "in a container" in check(report, "operating system").finding
    assert check(report, "memory").finding == "5.4 GB of 8.6 GB are available, the limit of this container"
    assert status(report, "build, weights inside") == "warning"
    assert status(report, "build, weights stripped") == "ok"
    assert (status(report, "shared memory"), "--shm-size" in check(report, "shared memory").fix) == ("warning", True)
    build, serve = report.next[1:]
    assert build.endswith("--weights stripped")
    assert "--set checkpoint=checkpoints/" in serve
    older = kinds.container()  # control groups of version 1, whose path is the host's
    for name in [name for name in older.files if "cgroup" in name]:
        del older.files[name]
    older.files |= {
        "/proc/self/cgroup": "12:cpu,cpuacct:/docker/4a\n4:memory:/docker/4a\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 * GIB}\n",
    }
    older.disks["/dev/shm"] = Disk("/dev/shm", 8 << 20, 8 << 20)
    report = looked(older)
    assert "2.1 GB of 3.2 GB" in check(report, "memory").finding
    assert (status(report, "build, weights stripped"), status(report, "shared memory")) == ("fault", "fault")
    older.files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert "container" not in check(looked(older), "memory").finding


def test_a_machine_with_nothing_is_told_what_runs() -> None:
    machine = kinds.bare()
    machine.disks["."] = Disk("/home/ada", GIB, GIB)
    report = looked(machine)
    assert report.faults == 0
    assert "engines do not" in check(report, "driver").finding
    assert status(report, "disk") == "warning"
    assert report.next[0].startswith("make demo")


def driver_of(machine: FakeMachine) -> Check:
    return check(looked(machine), "driver")


def test_a_gpu_without_a_driver_is_a_fault() -> None:
    card = {
        "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "/sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    }
    machine = kinds.host(31, 200)
    machine.folders["/sys/bus/pci/devices"] = ["0000:00:02.0", "0000:01:00.0"]
    machine.files |= card
    assert (driver_of(machine).status, "no driver for it" in driver_of(machine).finding) == ("fault", True)
    machine.folders["/run"] = [".containerenv"]
    assert "--gpus all" in driver_of(machine).fix
    machine.files["/sys/bus/pci/devices/0000:01:00.0/vendor"] = "0x8086\n"
    assert driver_of(machine).status == "skipped"


@pytest.mark.parametrize(
    ("said", "header", "wanted", "part"),
    [
        (printed("", 9, "Failed to initialize NVML: Driver/library version mismatch"), "13.0", "fault", "Restart"),
        (printed("NVIDIA-SMI has failed because it couldn't communicate", 9), "13.0", "fault", "modprobe nvidia"),
        (printed('Field "compute_cap" is not a valid field to query.', 2), "13.0", "fault", "580"),
        (Answer(problem="nvidia-smi gave no answer within 20 seconds"), "13.0", "fault", "dmesg"),
        (printed(""), "13.0", "skipped", ""),
        (printed("No devices were found"), "13.0", "skipped", ""),
        (None, "N/A", "fault", "libnvidia-compute"),
        (None, "12.9", "fault", "580"),
    ],
)
def test_a_driver_that_fails(said: Answer | None, header: str, wanted: str, part: str) -> None:
    machine = kinds.rtx_5090()
    machine.answers[gpu.HEADER] = printed(kinds.TABLE.format(driver="580.1", cuda=header))
    if said is not None:
        machine.answers[QUERY] = said
    assert driver_of(machine).status == wanted
    assert part in driver_of(machine).fix


def test_the_drivers_number_counts_where_its_cuda_is_not_told() -> None:
    machine = kinds.h100_old()
    machine.answers[gpu.HEADER] = printed("nothing of this kind")
    assert driver_of(machine).finding == "535.183.01 is older than CUDA 13, which engines need"
    machine = kinds.rtx_5090()
    machine.answers[gpu.HEADER] = printed("CUDA UMD Version: 13.3")  # as newer ones write it
    assert driver_of(machine).finding == "610.57.04, CUDA 13.3"


def test_a_gpu_that_nobody_knows_gets_the_profile_that_is_named() -> None:
    machine = kinds.rtx_5090()
    machine.answers[QUERY] = printed("NVIDIA GeForce RTX 3090, 8.6, 24576, 610.57.04\n")
    report = looked(machine)
    assert check(report, "GPU 0", "GPU").status == "fault"
    assert report.fits == ()
    wrong = check(looked(machine, profile="rtx-4090"), "GPU 0", "GPU")
    assert (wrong.status, "engines for SM 8.9" in wrong.finding) == ("fault", True)
    assert check(looked(kinds.rtx_5090(), profile="rtx-5090"), "GPU 0", "GPU").status == "ok"


@pytest.mark.parametrize(
    ("change", "wanted", "part"),
    [
        ({containers.INFO: printed("{}", 1, "Cannot connect to the Docker")}, ("Docker", "warning"), "systemctl"),
        ({containers.INFO: printed("{}", 1, "permission denied while trying")}, ("Docker", "warning"), "usermod"),
        ({containers.INFO: printed('{"host": {"arch": "amd64"}}')}, ("Docker", "skipped"), ""),  # podman
        ({containers.COMPOSE: printed("", 125, "unknown flag")}, ("Docker Compose", "warning"), "compose-plugin"),
        ({containers.COMPOSE: printed("docker-compose version 1.29.2")}, ("Docker Compose", "warning"), ""),
        (kinds.docker(), ("GPUs in containers", "warning"), "nvidia-ctk runtime configure"),
        (kinds.docker() | {containers.TOOLKIT: kinds.MISSING}, ("GPUs in containers", "warning"), "Install the NVIDIA"),
    ],
)  # fmt: skip
def test_docker_and_what_it_lacks(change: dict[Any, Answer], wanted: tuple[str, str], part: str) -> None:
    machine = kinds.rtx_5090()
    machine.answers |= change
    found = check(looked(machine), wanted[0])
    assert found.status == wanted[1], found
    assert part in found.fix


def test_a_missing_compiler_is_a_fault_only_where_nothing_else_runs_engines() -> None:
    machine = kinds.rtx_5090()
    machine.packages = {"cuda-bindings": "12.9.0"}
    report = looked(machine)
    assert (status(report, "tensorrt_rtx_cu13"), status(report, "cuda-bindings")) == ("warning", "fault")
    assert report.next[0] == "pip install 'canvasrt[rtx]'"
    machine.answers[containers.INFO] = kinds.MISSING
    assert status(looked(machine), "tensorrt_rtx_cu13") == "fault"
    elsewhere = looked(kinds.host(62, 900), profile="h100")
    assert status(elsewhere, "tensorrt_cu13") == "skipped"
    assert all(line.endswith("# on the machine with the GPU") for line in elsewhere.next[-2:])


def test_ports_systems_and_disks() -> None:
    machine = kinds.rtx_5090()
    machine.taken = {8001}
    machine.disks["."] = Disk("/", 99 * GIB, 20 * GIB)
    ports = {"http-port": 9000, "grpc-port": 8001, "metrics-port": 9000}
    report = looked(machine, ports=ports)
    assert "--grpc-port N" in check(report, "8001").fix
    twice = [each for each in report.checks if each.name == "9000"]
    assert [each.status for each in twice] == ["warning", "warning"]
    assert (status(report, "disk"), "Free 32.0 GB" in check(report, "disk").fix) == ("fault", True)
    assert report.next[-1].endswith("--http-port 9000 --metrics-port 9000")
    mac = kinds.bare()
    mac.system = replace(kinds.LINUX, name="Darwin", machine="arm64", glibc=None)
    report = looked(mac)
    assert (status(report, "operating system"), status(report, "glibc")) == ("warning", "skipped")
    musl = kinds.rtx_5090()
    musl.system = replace(kinds.LINUX, glibc=None)
    assert status(looked(musl), "glibc") == "fault"
    assert LEAST_GLIBC == {"x86_64": (2, 28), "aarch64": (2, 35)}


def test_a_volume_and_a_checkpoint_of_ones_own_are_in_the_commands() -> None:
    report = looked(kinds.rtx_5090(), checkpoint=CHECKPOINT, profile="rtx-5090")
    quantize, build, _ = report.next[-3:]
    assert quantize.startswith(f"canvasrt quantize {CHECKPOINT} --recipe nvfp4-experts --out checkpoints/")
    assert quantize.split()[-1] in build
    machine = kinds.host(62, 900)
    machine.disks["/big one"] = Disk("/big one", 2000 * GIB, 2000 * GIB)
    report = looked(machine, volume="/big one", profile="rtx-4090")  # nobody publishes INT4
    download, quantize, build, _ = report.next[-4:]
    assert download.endswith("--local-dir '/big one/checkpoints/diffusiongemma-26b-a4b-it'")
    assert "--recipe int4-experts" in quantize
    assert "BF16 checkpoint 50.5 GB" in check(report, "disk").finding


def test_a_profile_for_a_cpu_runs_the_checkpoint() -> None:
    report = looked(kinds.host(62, 900), profile="cpu", checkpoint=CHECKPOINT)
    assert check(report, "profile cpu", FITS).status == "ok"
    assert report.next[-1] == f"canvasrt generate {CHECKPOINT} --prompt Hello"


def test_what_quantizing_needs_is_what_quantize_plans() -> None:
    from canvasrt.checkpoint import Checkpoint
    from canvasrt.quantize.plan import sizes
    from canvasrt.quantize.recipe import load_recipe

    opened, source = model.open_model(CHECKPOINT), Checkpoint.open(CHECKPOINT)
    for name in ("rtx-5090", "h100", "rtx-4090"):
        profile = load_profile(name)
        planned, exact = model.needs(opened, profile), sizes(source, load_recipe(profile.choices.recipe.value))
        assert planned.quantize_memory_bytes == pytest.approx(exact.memory_bytes, rel=0.1)
        assert planned.quantized_bytes == pytest.approx(exact.disk_bytes, rel=0.1)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GPU profile is called"):
        looked(kinds.bare(), profile="rtx-9090")
    with pytest.raises(CheckpointError):
        looked(kinds.bare(), checkpoint=tmp_path)


@pytest.mark.parametrize("name", [name for name in profile_names() if name != "cpu"])
def test_every_profile_fits_its_own_memory(name: str) -> None:
    (fit,) = looked(kinds.host(500, 5000), profile=name).fits
    assert fit.fits, fit.advice


@pytest.mark.parametrize("kind", kinds.EVERY)
def test_findings_are_sentences_and_secrets_are_not_shown(kind: str) -> None:
    report = looked(kinds.EVERY[kind]())
    well_formed(report)
    assert "hunter2" not in str(report)
