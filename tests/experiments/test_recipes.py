"""The recipes for the main job: each is a config that trains what its name says."""

import re

import pytest

from experiments.first_light import recipes
from mar.policy.lora import adapted, is_adapter, trainable_pattern
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model
from mar.run.compose import compose


def trained_by(recipe: str) -> dict[str, bool]:
    """Name of each parameter -> whether the recipe trains it."""
    options = compose([*recipes.SHARED, *recipes.RECIPES[recipe]]).model
    names = [name for name, _ in adapted(load_model(EMBEDDED), options).named_parameters()]
    return {name: bool(re.search(trainable_pattern(options), name)) for name in names}


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_recipe_is_the_main_job_with_as_many_completions(recipe):
    config = compose([*recipes.SHARED, *recipes.RECIPES[recipe]])
    assert config.algo.prompts_per_step * config.algo.group_size == 128
    assert config.train.steps == 100
    assert config.data.eval_split == "validation"
    if rank := re.search(r"rank (\d)", recipe):
        assert config.model.lora_rank == int(rank[1])
    if rate := re.search(r"\de-\d", recipe):
        assert config.model.lr == float(rate[0])


def chosen_by(recipe: str) -> set[str]:
    return {name for name, chosen in trained_by(recipe).items() if chosen}


@pytest.mark.parametrize("recipe", [name for name in recipes.RECIPES if name.startswith("all")])
def test_all_parameters_are_all(recipe):
    assert all(trained_by(recipe).values())


def test_the_main_job_trains_its_gains_and_its_adapter():
    gains = chosen_by("the main job's gains")
    adapter = chosen_by("the main job's adapter")
    assert gains == {"norm.weight", "blocks.5.mlp_norm.weight"}
    assert adapter and all(is_adapter(name) for name in adapter)
    assert chosen_by("the main job's") == gains | adapter


@pytest.mark.parametrize("recipe", [name for name in recipes.RECIPES if "rank" in name])
def test_adapters_alone_are_trained_and_every_layer_has_them(recipe):
    trained = trained_by(recipe)
    assert all(is_adapter(name) == chosen for name, chosen in trained.items())
    layers = {name.split(".")[1] for name, chosen in trained.items() if chosen}
    assert len(layers) == load_model(EMBEDDED).config.num_layers


def test_the_main_jobs_adapter_is_that_of_the_last_layer():
    last = load_model(EMBEDDED).config.num_layers - 1
    assert all(name.startswith(f"blocks.{last}.") for name in chosen_by("the main job's adapter"))
