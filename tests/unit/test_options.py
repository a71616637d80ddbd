"""Options: generated from the settings, and the settings that they make."""

from dataclasses import fields, replace

import pytest

from cbqstream import PROFILES
from cbqstream.config import SECTIONS, CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.errors import UsageError
from cbqstream.options import OPTIONS, config_from_options, options_of, profile_defaults, recipe_of
from cbqstream.recipe import read_recipe
from cbqstream.rounding.registry import METHODS
from cbqstream.scheme import Scheme

REQUIRED = {"model": "MODEL", "out": "/OUT", "dataset": "/TEXT"}


def test_every_field_of_the_settings_is_an_option_or_part_of_one():
    """A field without a flag is a section, or a part of the name of the scheme."""
    without = {("scheme", "num_bits"), ("scheme", "activation_bits")} | {
        (None, name) for name in SECTIONS if name != "scheme"
    }
    known = {(option.section, option.field) for option in OPTIONS.values()}
    for section, cls in ((None, QuantizeConfig), *SECTIONS.items()):
        for item in fields(cls):
            assert ((section, item.name) in known) != ((section, item.name) in without)


def test_every_option_is_described_once():
    texts = [option.help for option in OPTIONS.values()]
    assert len(texts) == len(set(texts))
    assert all(text and not text.endswith(".") for text in texts)


def test_no_options_make_the_default_settings():
    config = config_from_options(REQUIRED)
    assert config == QuantizeConfig(
        model="MODEL", out="/OUT", scheme=Scheme.named("W4A16"), calibration=CalibrationConfig(dataset="/TEXT")
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_gives_the_defaults(profile):
    config, expected = config_from_options(REQUIRED, profile), PROFILES[profile]
    assert (config.window, config.transforms, config.reconstruction) == (
        expected.window,
        expected.transforms,
        expected.reconstruction,
    )
    assert profile_defaults(expected)["epochs"] == expected.reconstruction.epochs


def test_options_change_parts_of_a_profile():
    given = {
        "epochs": 9,
        "window_size": 3,
        "smoothing": "never",
        "group_size": -1,
        "max_ram": "2GiB",
        "ignore": ["a", "b"],
    }
    config = config_from_options({**REQUIRED, **given, "scheme": "w3a8"}, "fast")
    assert (config.reconstruction.epochs, config.window.size, config.transforms.smoothing) == (9, 3, "never")
    assert (config.scheme.name, config.scheme.group_size) == ("W3A8", None)
    assert (config.max_ram, config.ignore) == (2 << 30, ("a", "b"))
    assert config.reconstruction == replace(PROFILES["fast"].reconstruction, epochs=9)


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown setting 'epoch' \(epochs\?\)"):
        config_from_options({**REQUIRED, "epoch": 3})


def test_an_unknown_profile_is_refused():
    with pytest.raises(UsageError, match="profile 'best' is not paper, quick, fast, default, accurate"):
        config_from_options(REQUIRED, "best")


def test_a_setting_of_another_rounding_method_is_refused():
    with pytest.raises(UsageError, match="max_shift is a setting of signround, and the rounding is lora_rounding"):
        config_from_options({**REQUIRED, "max_shift": 0.5, "rounding": "lora_rounding"})
    assert config_from_options({**REQUIRED, "rounding_rank": 3}, "paper").reconstruction.rounding_rank == 3


@pytest.mark.parametrize("method", METHODS)
def test_plain_kernels_can_be_chosen_with_every_method(method):
    """An error about Triton recommends it, also where only the search of the grids has a kernel."""
    values = {**REQUIRED, "kernels": "plain", "rounding": method}
    values |= {"window_size": 1, "overlap": 0} if method == "gptq" else {}
    assert config_from_options(values).reconstruction.kernels == "plain"


def test_methods_declare_their_settings():
    settings = {name: tuple(option.field for option in OPTIONS.values() if option.method == name) for name in METHODS}
    assert settings == {
        "signround": ("max_shift",),
        "lora_rounding": ("rounding_lr", "rounding_rank", "penalty_weight"),
        "gptq": ("damping",),
        "nearest": (),
    }


def test_options_and_settings_are_inverse():
    config = config_from_options(
        {**REQUIRED, "scheme": "W2A16", "symmetric": False, "group_size": 64, "override": ["down_proj=W4"], "seed": 3},
        "paper",
    )
    values = options_of(config)
    values = {name: value for name, value in values.items() if OPTIONS[name].method in (None, "lora_rounding")}
    values |= {"max_ram": None, "max_vram": None}
    assert config_from_options(values, "default") == config


@pytest.mark.parametrize("profile", PROFILES)
def test_a_recipe_makes_the_same_settings(tmp_path, profile):
    config = config_from_options({**REQUIRED, "scheme": "W4A8", "keep_first": 1, "ignore": ["mlp.*"]}, profile)
    (tmp_path / "recipe.toml").write_text(recipe_of(config))
    found = read_recipe(tmp_path / "recipe.toml", list(OPTIONS))
    kinds = {name: option.kind for name, option in OPTIONS.items()}
    values = {
        name: value if isinstance(value, list) else value == "True" if kinds[name] is bool else kinds[name](value)
        for name, value in found.items()
    }
    assert config_from_options({**REQUIRED, **values}) == config


def test_a_recipe_names_no_setting_of_another_method():
    config = config_from_options({**REQUIRED, "rounding": "nearest"})
    assert not {"max-shift", "rounding-rank"} & {line.split(" = ")[0] for line in recipe_of(config).splitlines()}
    assert isinstance(config.reconstruction, ReconstructionConfig)
