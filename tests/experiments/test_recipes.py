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


def test_all_parameters_are_all():
    assert all(trained_by("all parameters, 4e-4").values())


def test_adapters_alone_are_trained_and_every_layer_has_them():
    trained = trained_by("adapters of rank 8, 1e-3")
    assert all(is_adapter(name) == chosen for name, chosen in trained.items())
    layers = {name.split(".")[1] for name, chosen in trained.items() if chosen}
    assert len(layers) == load_model(EMBEDDED).config.num_layers


def test_the_main_jobs_own_are_the_last_layers():
    last = load_model(EMBEDDED).config.num_layers - 1
    trained = [name for name, chosen in trained_by("the main job's").items() if chosen]
    assert {f"blocks.{last}.mlp_norm.weight", "norm.weight"} < set(trained)
    adapters = {name for name in trained if is_adapter(name)}
    assert len(adapters) == len(trained) - 2
    assert all(name.startswith(f"blocks.{last}.") for name in adapters)
