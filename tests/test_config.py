"""Settings: every field is documented, presets are valid, and mistakes are named."""

import pytest

from spos_fast import InputError
from spos_fast.config import SECTIONS, Config
from spos_fast.config_io import PRESETS, config_from, documented_fields, merged, parse_flag, plain, read_config


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_are_valid(preset):
    """Every preset that is shipped reads without a complaint, and survives JSON's plain values."""
    config = config_from(read_config(preset), preset)
    assert config_from(plain(config), "again") == config


def test_the_paper_is_a_preset():
    """arXiv 1904.00420, sections 3 and 4, as far as they give numbers."""
    config = config_from(read_config("imagenet"), "imagenet")
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (150_000, 1024, 0.5)
    assert (config.retrain.steps, config.retrain.bn_steps) == (300_000, 1250)
    assert config.train.weight_decay == config.retrain.weight_decay == 4e-5
    assert config.train.label_smoothing == 0.1 and config.train.momentum == 0.9
    search = config.search
    assert (search.population, search.generations, search.top_k) == (50, 20, 10)
    assert (search.mutation_probability, search.crossover, search.mutation) == (0.1, 25, 25)
    assert search.macs_max == 330e6 and search.calibration_images == 20_000


def test_every_setting_is_documented():
    """``--help`` takes its texts from the docstrings."""
    for variants in SECTIONS.values():
        for variant in variants:
            for name, _, _, text in documented_fields(variant):
                assert len(text) > 5, name


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trian": {}}, "trian is no setting"),
        ({"train": {"step": 3}}, "train.step is no setting"),
        ({"train": 3}, "table"),
        ({"train": {"steps": "many"}}, "train.steps: got 'many'"),
        ({"train": {"steps": True}}, "train.steps"),
        ({"train": {"steps": 0}}, "train.steps: got 0"),
        ({"space": {"stage_channels": 3}}, "space.stage_channels"),
        ({"search": {"bn_mode": "mean"}}, "cumulative, pooled, ema"),
        ({"search": {"crossover": 40, "mutation": 20}}, "population"),
        ({"search": {"macs_min": 2e6, "macs_max": 1e6}}, "macs"),
        ({"search": {"macs_max": float("inf")}}, "search.macs_max: got inf"),
        ({"search": {"latency_ms_max": float("inf")}}, "search.latency_ms_max: got inf"),
        ({"train": {"params_min": float("nan")}}, "train.params_min: got nan"),
        (
            {"search": {"population": 1, "crossover": 0, "mutation": 0, "objectives": ["accuracy", "macs"]}},
            "search.population: got 1; a Pareto search",
        ),
        ({"retrain": {"init": "magic"}}, "scratch or inherited"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_named(values, says):
    """One line with the setting, the value and what would be right."""
    with pytest.raises(InputError, match=says) as caught:
        config_from(values, "test.toml")
    assert "\n" not in str(caught.value)


def test_files_and_flags(tmp_path):
    """Flags lie over the file; numbers may be written as 1e6; lists with commas."""
    (tmp_path / "a.toml").write_text("seed = 4\n[train]\nsteps = 10\nlr = 1\n")
    values = merged(read_config(str(tmp_path / "a.toml")), {"train": {"steps": parse_flag("x", "2e1", int)}})
    config = config_from(values, "a")
    assert config.seed == 4 and config.train.steps == 20 and config.train.lr == 1.0
    assert parse_flag("x", "1,2,3", tuple[int, ...]) == (1, 2, 3)
    assert parse_flag("x", "0.2,1", tuple[float, ...]) == (0.2, 1.0) and parse_flag("x", "", tuple[int, ...]) == ()
    assert parse_flag("x", "true", bool) is True and parse_flag("x", "off", bool) is False
    for text, kind in (("1.5", int), ("x", float), ("maybe", bool), ("1,x", tuple[int, ...])):
        with pytest.raises(InputError):
            parse_flag("x", text, kind)
    (tmp_path / "t.toml").write_text('[search]\nlatency_table = "sub/desk.json"\n')
    assert read_config(str(tmp_path / "t.toml"))["search"]["latency_table"] == str(tmp_path / "sub" / "desk.json")
    (tmp_path / "b.toml").write_text("[train\n")
    for name in ("b.toml", "absent.toml"):
        with pytest.raises(InputError, match="config"):
            read_config(str(tmp_path / name))
    assert Config() == config_from({}, "nothing")
