import dataclasses
import math
from pathlib import Path

import pytest

from d2 import config, fileio
from d2.errors import InputError, UsageError
from d2.recon.config import ReconstructConfig


@config.config
class Example:
    """A configuration with one field of each type."""

    steps: int = config.option(50, "denoising steps", ge=1, le=1000)
    scale: float = config.option(2.5, "guidance", ge=0)
    name: str = config.option("full", "a name")
    fast: bool = config.option(False, "a switch")
    elevation_deg: float | None = config.option(None, "degrees", ge=-90, le=90)


def test_later_sources_override_earlier_ones_and_sets_override_all(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 7\nscale: 1e-5\n")
    loaded = config.load(Example, tmp_path / "a.yaml", {"steps": 8, "name": "x"}, sets=("steps=9", "fast=true"))
    assert loaded == Example(steps=9, scale=1e-5, name="x", fast=True)


def test_a_whole_number_is_a_fine_float_but_not_the_other_way_round():
    assert config.load(Example, sets=("scale=3",)).scale == 3.0
    with pytest.raises(InputError, match=r"steps.*integer.*got 3\.0"):
        config.load(Example, sets=("steps=3.0",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=0", "greater than or equal to 1, got 0"), ("steps=-1", "greater than or equal to 1"),
        ("steps=1000000000", "less than or equal to 1000"), ("steps=" + "9" * 4000, "integer of 13288 bits"),
        ("steps=0x" + "f" * 5000, "integer of 20000 bits"), ("scale=.nan", "finite"), ("scale=.inf", "finite"),
        ("scale=1e999", "finite"), ("elevation_deg=200", "less than or equal to 90"), ("name=3", "string"),
        ("fast=1", "boolean"), ("fast=yes", "boolean"), ("steps=true", "integer"), ("steps=", "integer"),
        ("steps=[1]", "integer"), ("name=2020-01-01", "string"), ("steps={a: &b [1], c: *b}", "aliases"),
        ("steps=[", "not valid YAML"), ("stepz=3", "did you mean steps?"), ("zzz=3", "known: steps, scale"),
    ],
)  # fmt: skip
def test_values_out_of_range_or_type_are_one_line_that_names_field_and_range(text, expected):
    with pytest.raises(InputError) as caught:
        config.load(Example, sets=(text,))
    message = str(caught.value)
    assert expected in message and text.partition("=")[0] in message and len(message) < 2100


@pytest.mark.parametrize("text", ["steps", "", "=3", "steps:3"])
def test_a_set_without_an_equals_sign_is_a_usage_error(text):
    with pytest.raises(UsageError, match="expected field=value"):
        config.load(Example, sets=(text,))


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "3", "- steps: 3", ""])
def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match="expected a mapping"):
        config.load(Example, tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["3: 4", "[1]: 2", "null: 1", "{a: 1}: 2"])
def test_keys_that_are_no_text_are_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError):
        config.load(Example, tmp_path / "a.yaml")


def test_an_unknown_preset_lists_those_that_ship():
    with pytest.raises(InputError, match=r"'nosuch'; there are: .*fast.*quality"):
        config.preset_path("nosuch")


@pytest.mark.parametrize("name", ["../configs/fast", "a/b", "", ".", "a\0b"])
def test_a_preset_name_cannot_leave_the_folder(name):
    with pytest.raises(InputError):
        config.preset_path(name)


def test_configurations_cannot_be_changed():
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        Example().steps = 3  # type: ignore[misc]


def test_digest_tells_configurations_apart_by_any_field():
    values = {"steps": 51, "scale": 2.6, "name": "x", "fast": True, "elevation_deg": 0.0}
    digests = {config.digest(Example(**{k: v})) for k, v in values.items()} | {config.digest(Example())}
    assert len(digests) == len(values) + 1
    assert config.digest(Example(steps=50)) == config.digest(Example())


def test_first_difference_names_the_field_with_old_and_new():
    a, b = config.resolved(Example()), config.resolved(Example(steps=7))
    assert config.first_difference(a, b) == "steps: 50 -> 7"
    assert config.first_difference(a, a) is None
    assert config.first_difference({}, a) is not None


def test_a_resolved_configuration_survives_yaml(tmp_path):
    resolved = config.resolved(Example(scale=1e-7, elevation_deg=-12.5))
    fileio.write_yaml(tmp_path / "a.yaml", resolved)
    assert fileio.read_yaml(tmp_path / "a.yaml") == resolved


def test_every_option_of_reconstruct_has_a_help_text_and_an_in_range_default():
    assert all(field.default.description for field in dataclasses.fields(ReconstructConfig))
    ReconstructConfig(**config.resolved(ReconstructConfig()))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_is_flat(path):
    layer = fileio.read_yaml(path)
    assert layer and all(isinstance(key, str) and not isinstance(value, dict) for key, value in layer.items())


@pytest.mark.parametrize("preset", ["quality", "fast"])
def test_presets_of_reconstruct_load(preset):
    loaded = config.load(ReconstructConfig, preset)
    assert all(math.isfinite(v) for v in config.resolved(loaded).values() if isinstance(v, float))


@pytest.mark.parametrize("seed", ["-1", str(2**70), str(2**63)])
def test_seeds_outside_of_63_bits_are_refused(seed):
    with pytest.raises(InputError, match=r"seed: input should be .*"):
        config.load(ReconstructConfig, sets=(f"seed={seed}",))
