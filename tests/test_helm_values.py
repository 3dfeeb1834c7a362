"""The chart's values for each GPU: current, complete, and with sizes that agree with the planner."""

from pathlib import Path

import pytest
import yaml

from canvasrt.compile.sizes import with_recipe
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Deployment, Setting
from canvasrt.errors import InputError
from canvasrt.profiles.helm_values import PUBLISHED, helm_file, helm_files, helm_values, write_helm_files
from canvasrt.profiles.profile import load_profile, profile_names
from canvasrt.quantize.recipe import load_recipe
from test_profiles_cli import refused, run

FILES = Path(__file__).parents[1] / "helm" / "canvasrt" / "profiles"
PUBLISHED_26B = Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b"


def test_the_files_are_those_of_the_profiles(tmp_path: Path) -> None:
    run("--format", "helm", "--out", tmp_path / "values")
    written = {file.name: file.read_text() for file in (tmp_path / "values").iterdir()}
    assert written == {file.name: file.read_text() for file in FILES.iterdir()}
    assert sorted(written) == [f"{name}.yaml" for name in profile_names()]


def test_a_changed_profile_changes_its_file(tmp_path: Path) -> None:
    source = Path(load_profile.__code__.co_filename).parent / "h100.yaml"
    own = tmp_path / "h100-pcie.yaml"
    own.write_text(source.read_text().replace("name: h100", "name: h100-pcie").replace("80GB-HBM3", "PCIe"))
    values = yaml.safe_load(run("show", own, "--format", "helm").stdout)
    assert values["profile"]["name"] == "h100-pcie"
    assert values["profile"]["productNames"] == ["NVIDIA-H100-PCIe"]
    assert helm_file(load_profile(str(own))) not in helm_files().values()


def test_all_profiles_can_be_printed_at_once() -> None:
    printed = list(yaml.safe_load_all(run("--format", "helm").stdout))
    assert [each["profile"]["name"] for each in printed] == profile_names()


@pytest.mark.parametrize("name", sorted(set(profile_names()) - {"cpu"}))
def test_sizes_are_those_of_the_planner(name: str) -> None:
    profile = load_profile(name)
    recipe = profile.choices.recipe.value
    source = with_recipe(ModelSource.open(PUBLISHED_26B), load_recipe(recipe))
    planned = Deployment.of(source, profile).budget(Setting.of(profile, source.spec)).items()["weights"]
    # A checkpoint has the vision tower too, which is not planned yet: 1.1 GB in BF16.
    assert PUBLISHED[recipe].built_bytes == pytest.approx(planned + 0.6e9, rel=0.08)


def test_where_nobody_publishes_the_recipe_it_is_quantized() -> None:
    values = helm_values(load_profile("rtx-4090"))
    assert values["model"] == {"source": PUBLISHED["none"].source, "quantize": {"recipe": "int4-experts"}}
    assert helm_values(load_profile("h100"))["model"]["quantize"] == {"recipe": ""}


def test_a_recipe_of_which_no_checkpoint_is_known_is_refused() -> None:
    profile = load_profile("h100")
    recipe = profile.choices.recipe.model_copy(update={"value": "mine"})
    changed = profile.model_copy(update={"choices": profile.choices.model_copy(update={"recipe": recipe})})
    with pytest.raises(InputError, match=r"profile h100: no checkpoint of recipe mine .*fp8"):
        helm_values(changed)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert "table or helm" in refused(InputError, "--format", "yaml")
    assert "leave out" in refused(InputError, "--format", "helm", "--json")
    assert "--format helm" in refused(InputError, "--out", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out"):
        write_helm_files(tmp_path / "file" / "folder")
