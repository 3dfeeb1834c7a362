"""The Dockerfiles of deploy/: linted, read, and carried out on this machine as far as they are ours."""

import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from canvasrt import __version__
from canvasrt.wire import MODEL
from dockerfiles import Builder, Dockerfile, Image, NotUnderstoodError, is_ignored, listing, read
from helm import one, render
from planning import DEMO, ROOT
from triton_servers import free_ports, session_of, wait_until

DEPLOY = ROOT / "deploy"
REQUIREMENTS = ROOT / "requirements"
SERVER = DEPLOY / "server.Dockerfile"
BUILDER = DEPLOY / "builder.Dockerfile"
LOCKED = ("wheels", "server", "rtx", "tensorrt", "torch", "builder")
# What is not carried out here, and why.
ELSEWHERE = {
    "apt-get update": "installs Debian's curl into the image; here it would be into this machine",
    "groupadd": "makes the image's user",
    "install --directory --owner=1000": "makes the folders where volumes are mounted; the test makes them",
}
QUICKLY = {"PIP_NO_COMPILE": "0"}  # pip reads it as the option's value: no bytecode, which takes half of the time
PUZZLE = "12.|..5\n...|...\n...|6.1\n4..|..2\n.4.|2.3\n53.|4.6"


def pins(name: str) -> dict[str, str]:
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    return {key.lower(): version for key, version in re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE)}


def lint(file: Path) -> str:
    program = Path(sys.prefix) / "bin" / "hadolint"
    assert program.is_file(), "hadolint is not there: make setup"
    done = subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("file", [SERVER, BUILDER], ids=lambda file: file.name)
def test_the_linter_has_nothing_to_say_and_what_it_must_not_say_has_a_reason(file: Path, tmp_path: Path) -> None:
    assert lint(file) == ""
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        if "hadolint ignore" in line:
            before = lines[number - 1]
            assert re.match(r"# (?!hadolint)", before), f"line {number + 1} gives no reason"
    planted = tmp_path / "Dockerfile"
    planted.write_text("FROM python:latest\nRUN pip install numpy\n")
    assert {"DL3007", "DL3013"} <= set(re.findall(r"DL\d+", lint(planted)))


@pytest.mark.parametrize(("file", "name"), [(SERVER, "server"), (BUILDER, "builder")])
def test_an_image_runs_as_a_user_with_its_root_read_only(file: Path, name: str) -> None:
    stage = read(file).stage(name)
    assert stage.last("USER").value == "1000:1000"
    assert stage.last("ENTRYPOINT").words() == ["canvasrt"]
    assert stage.last("STOPSIGNAL").value == "SIGTERM"
    environment = " ".join(each.value for each in stage.all("ENV"))
    for setting in ("HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1", "NVIDIA_VISIBLE_DEVICES=all"):
        assert setting in environment
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment
    assert not re.search("TOKEN|SECRET|PASSWORD", file.read_text())


def test_the_server_listens_where_the_chart_and_the_compose_file_look_for_it() -> None:
    stage = read(SERVER).stage("server")
    assert stage.last("EXPOSE").value.split() == ["8000", "8001", "8002"]
    assert stage.last("CMD").words() == ["serve", "/etc/canvasrt/pipeline.yaml", "--host", "0.0.0.0"]
    assert read(BUILDER).stage("builder").last("CMD").words() == ["prepare", "/etc/canvasrt/pipeline.yaml"]
    assert f"/v2/models/{MODEL}/generate" in stage.last("HEALTHCHECK").value


def test_base_images_and_versions_are_exact_and_the_same_everywhere() -> None:
    files = [read(SERVER), read(BUILDER)]
    for file in files:
        for key, value in file.arguments.items():
            assert not key.endswith("_IMAGE") or re.search(r":\d[\w.]*-[\w-]+$", value), f"{key}={value}"
    assert files[0].arguments["PYTHON_IMAGE"] == files[1].arguments["PYTHON_IMAGE"]
    wanted = {"TORCH": pins("dev")["torch"], "TENSORRT": pins("tensorrt")["tensorrt_cu13"], "VERSION": __version__}
    for file in files:
        given = dict(each.value.split("=", 1) for stage in file.stages for each in stage.all("ARG"))
        assert {key: given[key] for key in wanted} == wanted


def test_what_is_installed_is_what_is_tested_and_has_hashes() -> None:
    tested = {**pins("dev"), "tensorrt_cu13": "11.4.0.106", "tensorrt_cu13_bindings": "11.4.0.106"}
    for name in LOCKED:
        assert pins(name), name
        assert pins(name).items() <= tested.items(), name
        blocks = re.split(r"^(?=[\w.-]+==)", (REQUIREMENTS / f"{name}.txt").read_text(), flags=re.MULTILINE)[1:]
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks), name


def test_the_locks_are_as_their_program_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("lock", DEPLOY / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    assert lock.FILES == LOCKED
    for name in LOCKED:
        text = (REQUIREMENTS / f"{name}.txt").read_text()
        blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
        known = {block.partition("==")[0]: set(re.findall("sha256:(\\w+)", block)) for block in blocks}
        monkeypatch.setattr(lock, "hashes", lambda wanted, known=known: {each: known[each] for each in wanted})
        assert lock.locked(text) == text
        assert lock.locked(text.replace("--hash=sha256:", "--hash=sha256:0")) == text


def test_each_image_has_what_its_extras_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(wanted: list[str]) -> set[str]:
        return {re.split(r"[\[>=<]", each)[0].lower() for each in wanted}

    extras = {key: names(wanted) for key, wanted in project["optional-dependencies"].items()}
    server, builder = set(pins("server")), {name for each in ("server", "torch", "builder") for name in pins(each)}
    assert names(project["dependencies"]) <= server
    assert extras["client"] - {"matplotlib"} <= server  # it draws the plot of `canvasrt bench`, and nothing else
    assert (extras["quantize"] | extras["fetch"]) - {"torch"} <= builder
    assert extras["rtx"] <= set(pins("rtx"))
    assert not server & {"torch", "nvidia-modelopt", "boto3", "setuptools"}


def test_only_what_an_image_is_built_from_is_sent_to_the_builder() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    for sent in ("pyproject.toml", "src/canvasrt/cli/main.py", "build/recipes/fp8.yaml", "requirements/server.txt"):
        assert not is_ignored(sent, patterns), sent
    for kept in (".git/config", ".venv/bin/python", "engines/big/plan", "tests/tiny.py", "deploy/.env", "hf-token"):
        assert is_ignored(kept, patterns), kept
    assert is_ignored("src/canvasrt/__pycache__/spec.cpython-311.pyc", patterns)


def test_an_instruction_that_nobody_thought_of_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM nvcr.io/nvidia/tritonserver:1 AS last\nONBUILD RUN rm -rf /\n")
    with pytest.raises(NotUnderstoodError, match="ONBUILD"):
        read(file)
    file.write_text("ARG IMAGE=nvcr.io/nvidia/tritonserver:1\nFROM ${IMAGE} AS last\n")
    with pytest.raises(NotUnderstoodError, match="tritonserver:1 can't be had here"):
        Builder(read(file), tmp_path, tmp_path / "root", {}, {}).build("last")
    file.write_text("FROM python:3 AS last\nARG WORD=one\nWORKDIR /opt/x\nRUN echo $WORD > word\nRUN false\n")
    builder = Builder(read(file), tmp_path, tmp_path / "root", {"WORD": "two"}, {})
    with pytest.raises(subprocess.CalledProcessError):
        builder.build("last")
    assert (tmp_path / "root" / "opt" / "x" / "word").read_text() == "two\n"


@pytest.fixture
def root() -> Iterator[Path]:
    """Where an image's files lie. A short path: the first line of an installed program has at most 127 letters."""
    folder = tempfile.mkdtemp(prefix="canvasrt-image-")
    yield Path(folder) / "root"
    subprocess.run(["rm", "-rf", folder], check=True)  # of tens of thousands of files; Python takes three times as long


def build(file: Dockerfile, name: str, root: Path, flavor: str, machine: dict[str, str]) -> Image:
    # PyPI's address beside this machine's own settings for pip, which choose the build of torch.
    arguments = {"FLAVOR": flavor, "TORCH_INDEX": "https://pypi.org/simple"}
    image = Builder(file, ROOT, root, arguments, ELSEWHERE, machine).build(name)
    assert all(any(text.startswith(known) for known in ELSEWHERE) for text in image.not_executed)
    for volume in ("models", "etc/canvasrt"):
        (root / volume).mkdir(parents=True, exist_ok=True)
    image.environment["TMPDIR"] = str(root / "tmp")  # what /tmp is in the image
    return image


def command(image: Image, *words: str) -> list[str]:
    program = shutil.which("canvasrt", path=image.environment["PATH"])
    assert program is not None
    return [program, *words]


def run(image: Image, *words: str, timeout: float = 120.0) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, env=image.environment, cwd=image.folder, timeout=timeout, capture_output=True, text=True, check=False
    )


@contextmanager
def started(words: list[str], image: Image) -> Iterator[tuple["subprocess.Popen[str]", list[str], str]]:
    """The process, what it says on standard error, and its first line on standard output."""
    process = subprocess.Popen(
        words, env=image.environment, cwd=image.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        ready, _, _ = select.select([process.stdout], [], [], 90)
        yield process, log, process.stdout.readline() if ready else ""
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(10)
        process.stdout.close()
        process.stderr.close()


def run_helm_test(image: Image, address: str, expect: str) -> "subprocess.CompletedProcess[str]":
    """What the Pod of ``helm test`` runs, in the image and with the environment that the chart gives it."""
    values = {"tests.prompt": PUZZLE, "tests.expect": expect, "tests.maxTokens": 48}
    (container,) = one(render("cpu", values), "Pod")["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]} | {"ADDRESS": address}
    return subprocess.run(
        [*container["command"], *container["args"]],
        env={**image.environment, **given}, cwd=image.folder, timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_cpu_server_answers_over_http_and_grpc_and_drains(root: Path) -> None:
    image = build(read(SERVER), "server", root, "cpu", {})
    pipeline = root / "etc" / "canvasrt" / "pipeline.yaml"
    pipeline.write_text(f"volume: {root}/models\nprofile: cpu\ncheckpoint:\n  source: {DEMO}\n")
    http, grpc, metrics = map(str, free_ports(3))
    assert image.command[:2] == ["canvasrt", "serve"]
    words = command(image, *image.command[1:], "--json", "--http-port", http, "--grpc-port", grpc)
    health = [word.replace(":8000", f":{http}") for word in image.health]
    before = listing(root)
    with started([*words, "--metrics-port", metrics], image) as (process, log, ready):
        assert ready.startswith("{"), "".join(log)
        leader = int(re.findall(r'"triton_pid": (\d+)', ready)[0])
        assert run(image, *health).returncode == 0
        request = urllib.request.Request(
            f"http://127.0.0.1:{http}/v2/models/{MODEL}/generate",
            b'{"text_input": "123456", "max_tokens": 8, "max_denoising_steps": 2}',
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert b'"text_output"' in answer.read()
        answered = run(image, *command(image, "generate", "--url", f"127.0.0.1:{grpc}", "--prompt", PUZZLE))
        assert answered.returncode == 0, answered.stderr
        assert len(answered.stdout.strip()) >= 36, answered.stdout
        for expect, code in ((r"^[1-6]{3}\|[1-6]{3}", 0), ("Paris", 1)):
            tested = run_helm_test(image, f"127.0.0.1:{grpc}", expect)
            assert tested.returncode == code, tested.stdout + tested.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(45) == 0, "".join(log)
    wait_until(lambda: not session_of(leader), 10, lambda: f"left over: {session_of(leader)}")
    assert run(image, *health).returncode != 0  # so that the 0 above meant something
    after = listing(root)
    written = {name for name in before.keys() ^ after.keys() if not name.startswith("tmp/")}
    written |= {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert not written, "a read-only container would have failed to write these"
    assert not [name for name in after if name.startswith("tmp/canvasrt-serve-")]


def test_the_rtx_server_has_no_torch_and_says_that_there_is_no_gpu(root: Path) -> None:
    image = build(read(SERVER), "server", root, "rtx", QUICKLY)
    python = str(root / "opt" / "canvasrt" / "bin" / "python")
    absent = run(image, python, "-c", "import torch")
    assert "No module named 'torch'" in absent.stderr
    assert run(image, python, "-c", "import tensorrt_rtx, cuda.bindings.driver, grpc").returncode == 0
    bundle = root / "models" / "demo"
    options = ["--checkpoint", str(DEMO), "--profile", "rtx-5090", "--out", str(bundle)]
    made = run(image, *command(image, "build", *options))
    assert made.returncode == 0, made.stderr
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU, and the rest is about one without")
    refused = run(image, *command(image, "serve", str(bundle)))
    assert refused.returncode == 2, refused.stderr
    assert "error: no usable NVIDIA driver on this machine" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_builder_prepares_a_quantized_checkpoint(root: Path) -> None:
    image = build(read(BUILDER), "builder", root, "cpu", QUICKLY)
    (root / "etc" / "canvasrt" / "pipeline.yaml").write_text(
        f"volume: {root}/models\nprofile: cpu\ncheckpoint:\n  source: {DEMO}\n"
        "quantize:\n  recipe: nvfp4-experts\n  samples: 2\n"
    )
    assert image.command[:2] == ["canvasrt", "prepare"]
    prepared = run(image, *command(image, *image.command[1:]))
    assert prepared.returncode == 0, prepared.stderr
    (made,) = (root / "models" / "checkpoints").glob("*/model.safetensors")
    assert made.stat().st_size < (DEMO / "model.safetensors").stat().st_size
    python = str(root / "opt" / "canvasrt" / "bin" / "python")
    assert run(image, python, "-c", "import boto3, huggingface_hub, oras").returncode == 0


def test_a_flavor_that_is_none_is_refused(root: Path) -> None:
    for file, name in ((SERVER, "server"), (BUILDER, "builder")):
        run_of_flavor = next(each for each in read(file).stage("wheels").all("RUN") if "FLAVOR is" in each.value)
        words = ["/bin/sh", "-ec", run_of_flavor.value]
        environment = {**os.environ, "FLAVOR": "rocm"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1, name
        assert "FLAVOR is rtx, tensorrt or cpu, not 'rocm'" in done.stderr
