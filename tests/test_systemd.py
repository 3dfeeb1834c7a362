"""The systemd unit of deploy/, read as systemd reads it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from planning import ROOT

UNIT = ROOT / "deploy" / "canvasrt.service"
EXAMPLE = ROOT / "deploy" / "canvasrt.env.example"
PROGRAM = "/opt/canvasrt/bin/canvasrt"

Settings = dict[str, list[str]]


def read_unit(text: str) -> dict[str, Settings]:
    """Section -> key -> values in their order: a key may stand more than once."""
    found: dict[str, Settings] = {}
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            continue
        key, _, value = line.partition("=")
        found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def service() -> Settings:
    return read_unit(UNIT.read_text())["Service"]


def one(key: str) -> str:
    (value,) = service()[key]
    return value


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(h|)", text).groups()
    return int(number) * (3600 if unit else 1)


def verify(text: str, folder: Path) -> str:
    """What systemd has to say of a unit; the program is made one that is there."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = folder / "canvasrt.service"
    unit.write_text(text.replace(PROGRAM, sys.executable))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert verify(text, tmp_path) == ""
    assert "'ProtectSytem'" in verify(text.replace("ProtectSystem", "ProtectSytem"), tmp_path)


def test_its_exposure_is_held(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    words = [program, "security", "--offline=true", "--no-pager", "--threshold=35"]

    def is_held(text: str) -> bool:
        unit = tmp_path / "canvasrt.service"
        unit.write_text(text)
        return subprocess.run([*words, str(unit)], capture_output=True, check=False).returncode == 0

    assert is_held(UNIT.read_text())
    assert not is_held(UNIT.read_text().replace("CapabilityBoundingSet=\n", ""))


def test_it_stops_in_order_and_starts_again_only_where_that_helps() -> None:
    drain = float(re.findall(r"--drain-seconds (\d+)", one("ExecStart"))[0])
    assert seconds(one("TimeoutStopSec")) >= drain + 15  # what hangs is killed 5 seconds after the drain
    assert (one("KillMode"), one("KillSignal")) == ("mixed", "SIGTERM")
    assert (one("Restart"), one("RestartPreventExitStatus")) == ("on-failure", "2")
    assert seconds(one("TimeoutStartSec")) >= 6 * 3600  # it covers the download and the build of ExecStartPre
    unit = read_unit(UNIT.read_text())["Unit"]
    assert int(unit["StartLimitBurst"][0]) * int(one("RestartSec")) < seconds(unit["StartLimitIntervalSec"][0])


def test_it_may_write_its_models_and_nothing_else() -> None:
    for key, value in {
        "DynamicUser": "yes", "StateDirectory": "canvasrt", "ProtectSystem": "strict", "ProtectHome": "yes",
        "PrivateTmp": "yes", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "DevicePolicy": "closed",
    }.items():  # fmt: skip
        assert one(key) == value
    assert {each.split()[0] for each in service()["DeviceAllow"]} >= {"char-nvidia", "char-nvidia-uvm"}
    assert not {"PrivateDevices", "MemoryDenyWriteExecute", "PrivateNetwork"} & set(service())


def test_the_token_reaches_prepare_and_is_no_argument(tmp_path: Path) -> None:
    program = tmp_path / "canvasrt"
    program.write_text('#!/bin/sh\necho "$@ token=$HF_TOKEN"\n')
    program.chmod(0o755)
    (tmp_path / "hf-token").write_text("hf_secret\n")
    words = re.fullmatch(r"/bin/sh -c '(.*)'", one("ExecStartPre"))
    assert words is not None
    script = words[1].replace("$$", "$").replace(PROGRAM, str(program))
    environment = {"PATH": "/usr/bin:/bin", "CREDENTIALS_DIRECTORY": str(tmp_path), "CANVASRT_PIPELINE": "/etc/x.yaml"}
    done = subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "prepare /etc/x.yaml token=hf_secret\n"
    assert one("LoadCredential").startswith("hf-token:/etc/canvasrt/")


def test_the_example_documents_what_the_unit_reads() -> None:
    used = set(re.findall(r"\$\$?\{(CANVASRT_\w+)\}", UNIT.read_text()))
    documented = dict(re.findall(r"^(CANVASRT_\w+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))
    assert used == set(documented)
    defaults = dict(each.split("=") for value in service()["Environment"] for each in value.split())
    assert documented.items() <= defaults.items()
