"""Settings: what overrides what, what a file and a flag may say, and what the laptop variant scales."""

import pytest

from spss_fast.config import PRESETS, from_dict, resolve, to_dict, to_toml
from spss_fast.errors import UserError
from spss_fast.settings import Config


def test_presets_are_the_published_settings():
    la, kits = resolve("la"), resolve("kits")
    assert la.data.patch == (112, 112, 80) and kits.data.patch == (176, 176, 64)
    assert kits.data.window == (-160.0, 240.0) and kits.data.resample == (192, 192, 64)
    assert la.training == kits.training == Config().training and la.selection == Config().selection
    assert (la.training.iterations, la.selection.passes, la.selection.negatives) == (6000, 8, 50)


def test_defaults_are_the_published_numbers():
    config = resolve("la")
    registration, selection, training = config.registration, config.selection, config.training
    assert (config.data.n_labeled, config.network.filters, config.network.dropout) == (16, 16, 0.5)
    assert config.network.statistics == "running" and not training.refresh_batches
    assert (registration.registration_epochs, registration.registration_steps, registration.registration_pairs,
            registration.registration_lr, registration.similarity) == (200, 10, 32, 1e-4, "mse")
    assert (registration.opening, registration.closing, registration.far_distance, registration.far_iterations,
            registration.structures) == (5, 5, 10, 5, 1)
    assert (selection.noise, selection.noise_clip, selection.temperature) == (0.1, 0.2, 0.07)
    assert (selection.lambda_start, selection.lambda_growth) == (0.1, 1.01)
    assert (selection.tau_start, selection.tau_growth, selection.tau_every) == (0.8, 1.4, 500)
    assert (selection.ramp_every, selection.ramp_length, selection.ramp_max) == (150, 40, 0.1)
    assert (selection.unsupervised_ce, selection.contrast) == ("probabilities", "bidirectional")
    assert (training.batch_labeled, training.batch_unlabeled) == (2, 2)
    assert (training.lr, training.momentum, training.weight_decay) == (0.01, 0.9, 1e-4)
    assert (training.lr_every, training.lr_factor, training.ema) == (2500, 0.1, 0.99)
    assert (training.fusion, training.fusion_iterations, training.fusion_power) == (0.9, 6000, 0.2)
    assert (training.distance_decay, training.label_weights, training.disagreement_from) == (0.8, "decayed", 1000)


def test_a_flag_beats_the_file_and_the_file_beats_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\niterations = 50\nlr = 0.02\n[data]\npatch = [64, 64, 16]\n")
    config = resolve("kits", {"lr": "0.5"}, file)
    assert (config.training.iterations, config.training.lr, config.data.patch) == (50, 0.5, (64, 64, 16))
    assert config.data.body_crop is True


@pytest.mark.parametrize("dataset", sorted(PRESETS))
def test_settings_survive_toml_and_checkpoints(dataset, tmp_path):
    for labels in ({"foreground": "1,2"}, {"classes": "5,2"}):
        config = resolve(dataset, {"n_labeled": 5, **labels})
        file = tmp_path / "config.toml"
        file.write_text(to_toml(config))
        assert resolve(dataset, {}, file) == config == from_dict(to_dict(config))


def test_a_setting_that_is_none_stays_so_against_its_preset(tmp_path):
    file, flags = tmp_path / "config.toml", {"resample": "none", "window": "none"}
    for dataset in ("kits", "folder"):
        config = resolve(dataset, flags)
        assert config.data.resample is config.data.window is None
        file.write_text(to_toml(config))
        assert resolve(dataset, {}, file) == config


def test_every_class_has_a_label_value():
    assert resolve("la").data.class_values == resolve("la", {"foreground": "2,3"}).data.class_values == (0, 1)
    several = resolve("la", {"classes": "5,2,9"}).data
    assert several.class_values == (0, 5, 2, 9) and several.class_count == 4


def test_the_laptop_variant_scales_lengths_and_schedule():
    full, half = resolve("la"), resolve("la", {"downsample": 2})
    assert half.data.patch == (64, 64, 48)
    assert (half.registration.opening, half.registration.closing) == (3, 3)
    assert half.registration.far_distance == full.registration.far_distance // 2
    assert half.training.distance_decay == full.training.distance_decay**2  # two slices' worth
    assert (full.network.statistics, half.network.statistics) == ("running", "case")
    # an eighth of the voxels, and of the schedule; but for what a teacher must have learnt first
    assert (half.training.iterations, half.training.lr_every) == (750, 312)
    assert (half.selection.ramp_every, half.selection.tau_every) == (18, 62)
    assert half.selection.lambda_growth == full.selection.lambda_growth
    assert (half.training.fusion_iterations, half.training.disagreement_from) == (3000, 1000)
    assert (half.training.lr, half.registration.registration_lr, half.network.dropout) == (0.1, 1e-3, 0.2)
    assert (half.registration.registration_epochs, half.registration.registration_pairs) == (10, 16)
    assert resolve("la", {"downsample": 2, "iterations": 6000}).training.iterations == 6000
    assert resolve("kits", {"downsample": 2}).data.resample == (96, 96, 32)


def test_the_laptop_variant_shrinks_a_settings_file_of_full_resolution_and_no_other(tmp_path):
    full, half = tmp_path / "full.toml", tmp_path / "half.toml"
    full.write_text("patch = [96, 96, 64]\niterations = 4000\n")
    half.write_text("patch = [96, 96, 64]\niterations = 4000\ndownsample = 2\n")
    assert resolve("folder", {}, full).data.patch == (96, 96, 64)
    shrunk = resolve("folder", {"downsample": 2, "lr_every": 77}, full)
    assert (shrunk.data.patch, shrunk.training.iterations, shrunk.training.lr_every) == ((48, 48, 32), 500, 77)
    full.write_text("patch = [96, 96, 64]\niterations = 4000\ndownsample = 1\n")  # as a run's config.toml says it
    assert resolve("folder", {"downsample": 2, "lr_every": 77}, full) == shrunk
    for flags in ({}, {"downsample": 2}):
        kept = resolve("folder", flags, half)
        assert (kept.data.patch, kept.training.iterations, kept.data.downsample) == ((96, 96, 64), 4000, 2)
        assert kept.network.statistics == "case"  # of the preset's shrinking
    with pytest.raises(UserError, match=r"half\.toml holds settings for downsample = 2"):
        resolve("folder", {"downsample": 4}, half)


@pytest.mark.parametrize("values, said", [
    ({"iteration": 5}, "unknown setting iteration in the command line .did you mean iterations"),
    ({"iterations": "5.5"}, "setting iterations = '5.5'"),
    ({"iterations": -1}, "must not be negative"),
    ({"patch": "112,112"}, "needs 3 values"),
    ({"patch": "100,112,80"}, "multiples of 16"),
    ({"body_crop": "perhaps"}, "setting body_crop"),
    ({"amp": "fp8"}, "choose one of"),
    ({"window": "240,-160"}, "lower bound"),
    ({"opening": 4}, "must be odd"),
    ({"classes": "1,2", "foreground": "3"}, "foreground and classes exclude each other"),
    ({"classes": "2"}, "two or more different"),
    ({"classes": "1,2,1"}, "two or more different"),
    ({"classes": "0,1"}, "between 1 and 255"),
    ({"classes": "1,256"}, "between 1 and 255"),
    ({"classes": "kidney,liver"}, "setting classes = 'kidney,liver'"),
    ({"n_labeled": 1}, "at least batch_labeled"),
    ({"downsample": 0}, "must be 1 or more"),
    ({"resample": "0,96,96"}, "sides must be at least 1"),
    ({"foreground": "0,1"}, "foreground .* between 1 and 255"),
    ({"patch": [112.7, 112, 80]}, "needs a whole number"),
    ({"classes": [1.5, 2]}, "needs a whole number"),
    ({"iterations": float("inf")}, "needs a whole number"),
    ({"iterations": True}, "needs a number"),
    ({"lr": "nan"}, "lr = nan must not be negative"),
    ({"dropout": 1.5}, "dropout = 1.5 must be at most 1"),
    ({"window": "nan,240"}, "lower bound"),
    ({"temperature": 0}, r"temperature = 0.0 must be at least 0.001"),
])
def test_values_that_do_not_fit_are_named(values, said):
    with pytest.raises(UserError, match=said):
        resolve("la", values)


LEAST_ONE = ("log_every", "checkpoint_every", "lr_every", "ramp_every", "ramp_length", "tau_every", "fusion_iterations",
             "batch_labeled", "passes", "filters", "registration_pairs", "structures", "phantoms")


@pytest.mark.parametrize("name", LEAST_ONE)
def test_no_setting_is_divided_by_zero(name):
    with pytest.raises(UserError, match=f"setting {name} = 0 must be at least 1"):
        resolve("la", {name: 0})
    resolve("la", {name: 1})


@pytest.mark.parametrize("name", ["n_test", "max_in_plane", "workers", "preview_every", "far_distance"])
def test_zero_may_have_a_meaning_but_less_has_none(name):
    resolve("la", {name: 0})
    with pytest.raises(UserError, match=f"setting {name} = -3 must not be negative"):
        resolve("la", {name: -3})


@pytest.mark.parametrize("text, said", [
    ("iterations = ", "not valid TOML"),
    ("[trainig]\niterations = 5", "unknown table"),
    ("speed = 5", "unknown setting speed"),
])
def test_bad_settings_files_are_named(text, said, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{said}(.|\n)*mine.toml|mine.toml(.|\n)*{said}"):
        resolve("la", {}, file)


@pytest.mark.parametrize("labeled, batch, batches", [(16, 2, 8), (5, 2, 2), (3, 3, 1)])
def test_an_epoch_passes_over_the_annotated_volumes_once(labeled, batch, batches):
    assert resolve("la", {"n_labeled": labeled, "batch_labeled": batch}).batches_per_epoch == batches
