"""Which profile a GPU is, from what nvidia-smi prints: lines as real drivers print them, and all that goes wrong."""

import sys
from dataclasses import replace

import pytest

from canvasrt.errors import InputError
from canvasrt.profiles.detect import INSTEAD, Gpu, Match, ask, match, parse, product_of
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

PROFILES = [load_profile(name) for name in profile_names()]

# name, compute_cap, memory.total in MiB, driver_version
LINES = {
    "rtx-4090": ["NVIDIA GeForce RTX 4090, 8.9, 24564, 580.95.05", "GeForce RTX 4090, 8.9, 24564, 525.60.13"],
    "rtx-5090": ["NVIDIA GeForce RTX 5090, 12.0, 32607, 610.57.04"],
    "rtx-pro-6000": [
        "NVIDIA RTX PRO 6000 Blackwell Server Edition, 12.0, 97887, 595.91.07",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 12.0, 97887, 580.105.06",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition, 12.0, 97887, 580.105.06",
    ],
    "l40s": ["NVIDIA L40S, 8.9, 46068, 580.95.05"],
    "h100": ["NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15"],
    "h200": ["NVIDIA H200, 9.0, 143771, 550.54.15"],
    "b200": ["NVIDIA B200, 10.0, 183359, 580.95.05"],
    "dgx-spark": ["NVIDIA GB10, 12.1, [N/A], 580.126.09", "NVIDIA GB10, 12.1, [Not Supported], 580.173.02"],
    "dgx-station": ["NVIDIA GB300, 10.3, 256703, 580.126.16"],
}


def matched(line: str) -> Match:
    (gpu,) = parse(line)
    return match(gpu, PROFILES)


def printing(text: str, code: int = 0) -> tuple[str, ...]:
    """A program that prints like nvidia-smi."""
    return (sys.executable, "-c", f"print({text!r}); raise SystemExit({code})")


@pytest.mark.parametrize(("profile", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
def test_a_gpu_is_recognized_by_its_name(profile: str, line: str) -> None:
    found = matched(line)
    assert (found.profile, found.certainty, found.notes) == (profile, "product", ())


def test_every_gpu_profile_is_recognized() -> None:
    assert {*LINES, "cpu"} == set(profile_names())


@pytest.mark.parametrize(
    "profile", [profile for profile in PROFILES if profile.name != "cpu"], ids=lambda each: each.name
)
def test_a_node_label_names_the_same_product(profile: GpuProfile) -> None:
    for name in profile.facts.product_names.value:
        for label in (name, f"{name}-SHARED", f"{name}-MIG-1g.10gb", f"{name}-MIG-2g.20gb-SHARED", name.lower()):
            product, piece = product_of(label)
            assert product.lower() == name.lower()
            assert piece == ("1g.10gb" if "1g" in label else "2g.20gb" if "2g" in label else None)


def test_what_a_line_says() -> None:
    assert parse("NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15\n") == [
        Gpu("NVIDIA H100 80GB HBM3", "9.0", 85_520_809_984, "550.54.15")
    ]
    assert parse("NVIDIA GB10, 12.1, [N/A], 580.126.09") == [Gpu("NVIDIA GB10", "12.1", None, "580.126.09")]


def test_several_gpus_are_told_apart_in_their_order() -> None:
    """A DGX Station with a card for its displays."""
    text = "NVIDIA RTX PRO 2000 Blackwell, 12.0, 16303, 580.126.16\r\nNVIDIA GB300, 10.3, 256703, 580.126.16\r\n\r\n"
    found = [match(gpu, PROFILES) for gpu in parse(text)]
    assert [(each.profile, each.certainty) for each in found] == [("rtx-5090", "guess"), ("dgx-station", "product")]


@pytest.mark.parametrize(
    ("line", "profile", "parts"),
    [
        ("NVIDIA H100 PCIe, 9.0, 81559, 550.54.15", "h100", ["a guess by compute capability 9.0"]),
        ("NVIDIA H100 NVL, 9.0, 95830, 550.54.15", "h100", ["100.5 GB, h100 says 85.5: more"]),
        (
            "NVIDIA H200 NVL, 9.0, 143771, 550.54.15",
            "h200",
            ["H200 NVL is the product of no profile", "--profile FILE"],
        ),
        ("NVIDIA L4, 8.9, 23034, 550.54.15", "rtx-4090", ["24.2 GB, rtx-4090 says 25.8: less", "canvasrt plan"]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU, 8.9, 16376, 580.95.05", "rtx-4090", ["may not fit"]),
        ("NVIDIA RTX 6000 Ada Generation, 8.9, 49140, 580.95.05", "l40s", ["a guess"]),
        ("NVIDIA RTX PRO 5000 Blackwell, 12.0, 48935, 580.95.05", "rtx-5090", ["a guess", "more"]),
        ("NVIDIA GB200, 10.0, 189471, 580.95.05", "b200", ["a guess"]),
        ("NVIDIA B300 SXM6 AC, 10.3, 275040, 580.95.05", "dgx-station", ["a guess"]),
        ("NVIDIA Graphics Device, 12.1, [N/A], 580.95.05", "dgx-spark", ["a guess"]),
    ],
)
def test_another_gpu_of_the_same_capability_gets_a_guess_that_says_so(
    line: str, profile: str, parts: list[str]
) -> None:
    found = matched(line)
    assert (found.profile, found.certainty) == (profile, "guess")
    assert [part for part in parts if part not in " ".join(found.notes)] == [], found.notes


@pytest.mark.parametrize(
    ("line", "nearest", "parts"),
    [
        ("NVIDIA A100-SXM4-80GB, 8.0, 81920, 550.54.15", "l40s", ["none has compute capability 8.0", "(8.9)", "Copy"]),
        ("NVIDIA GeForce RTX 3090, 8.6, 24576, 595.84", "rtx-4090", ["compute capability 8.6", "does not run here"]),
        ("NVIDIA Thor, 11.0, [N/A], 580.0", "dgx-station", ["compute capability 11.0"]),
        ("Tesla T4, 7.5, 15360, 550.54.15", "rtx-4090", ["7.5 has no BF16", "8.0 or newer"]),
        (
            "NVIDIA Graphics Device, [N/A], 24564, 580.95.05",
            "rtx-4090",
            ["does not tell its compute", "--profile NAME"],
        ),
    ],
)
def test_an_unknown_gpu_is_told_what_is_known_and_where_to_start(line: str, nearest: str, parts: list[str]) -> None:
    found = matched(line)
    assert (found.profile, found.certainty, found.nearest) == (None, "none", nearest)
    (note,) = found.notes
    assert note.startswith(line.split(",")[0])
    assert [part for part in parts if part not in note] == [], note


def test_a_product_whose_memory_or_capability_is_another_is_reported() -> None:
    more = matched("NVIDIA GeForce RTX 4090, 8.9, 49140, 570.86")  # with more memory chips soldered on
    assert more.profile == "rtx-4090"
    assert "51.5 GB, rtx-4090 says 25.8: more" in more.notes[0]
    strange = matched("NVIDIA GeForce RTX 4090, 8.6, 24564, 570.86")
    assert "compute capability 8.6, rtx-4090 says 8.9" in strange.notes[0]
    assert matched("NVIDIA L40S, 8.9, 45776, 570.86").notes == ()  # drivers differ a little


def test_a_mig_slice_is_told_that_the_profile_is_of_the_whole_gpu() -> None:
    gpu = Gpu("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", "9.0", None, None)
    assert match(gpu, PROFILES).profile == "h100"
    assert "MIG slice 1g.10gb" in match(gpu, PROFILES).notes[0]
    other = replace(gpu, name="NVIDIA-H100-NVL-MIG-1g.12gb")
    assert "MIG slice 1g.12gb" in match(other, PROFILES).notes[-1]


def test_without_a_gpu_profile_nothing_can_be_matched() -> None:
    with pytest.raises(InputError, match="no profile describes a GPU"):
        match(Gpu("NVIDIA L40S", "8.9", None, None), [load_profile("cpu")])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "lists no GPU"),
        ("\n \n", "lists no GPU"),
        ("No devices were found", "not name, compute_cap, memory.total, driver_version"),
        ("NVIDIA L40S, 8.9, 46068", "not name, compute_cap"),
        (", 8.9, 46068, 580", "not name, compute_cap"),
        ("[Unknown Error], 8.9, 46068, 580", "a GPU without a name"),
        ("NVIDIA L40S, sm_89, 46068, 580", "compute_cap 'sm_89'"),
        ("NVIDIA L40S, 8.9, 46068 MiB, 580", "memory.total '46068 MiB'"),
        ("NVIDIA L40S, 8.9, -1, 580", "memory.total '-1'"),
        ("name, compute_cap, memory.total [MiB], driver_version", "compute_cap 'compute_cap'"),
        ("\x00\x01, \x02, \x03, \x04", "not understood"),
        ("x" * 10_000, "not understood"),
    ],
)
def test_other_output_is_refused_with_the_line_and_a_way_out(text: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    message = str(caught.value)
    assert part in message
    assert INSTEAD in message
    assert "\n" not in message
    assert len(message) < 600


def test_the_answer_is_what_the_program_prints() -> None:
    line = LINES["h100"][0]
    assert ask(printing(line)) == f"{line}\n"


def test_a_missing_program_says_what_to_install() -> None:
    with pytest.raises(InputError) as caught:
        ask(("no-such-nvidia-smi",))
    for part in ("no-such-nvidia-smi was not found", "install the NVIDIA driver", "--gpus all", INSTEAD):
        assert part in str(caught.value)


def test_a_program_that_can_not_be_started_is_an_error_of_its_own(tmp_path: object) -> None:
    with pytest.raises(InputError, match="could not be started"):
        ask((str(tmp_path),))


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, "couldn't communicate"),
        ("No devices were found", 6, "nvidia-smi alone must list the GPU"),
        ('Field "compute_cap" is not a valid field to query.', 2, "Update the NVIDIA driver"),
        ("", 1, "said: nothing"),
        ("line\n" * 1000, 1, "line line"),
    ],
)
def test_a_failing_driver_is_quoted_in_one_line(text: str, code: int, part: str) -> None:
    with pytest.raises(InputError) as caught:
        ask(printing(text, code))
    message = str(caught.value)
    assert f"exit code {code}" in message
    assert part in message
    assert INSTEAD in message
    assert "\n" not in message
    assert len(message) < 800


def test_a_driver_that_hangs_is_left_after_a_while() -> None:
    with pytest.raises(InputError, match=r"no answer within 0\.2 seconds"):
        ask((sys.executable, "-c", "import time; time.sleep(30)"), timeout=0.2)
