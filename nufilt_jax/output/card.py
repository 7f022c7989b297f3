"""The model card of an output folder, written from its recipe."""

from nufilt_jax.output.recipe import Model, Recipe

_OTHERS = {
    "pretrained": "stay as the base has them",
    "first": "stay as the first task's model has them",
    "average": "are the running average of the tasks' models",
}

_ADAPTER = """
This folder is a LoRA adapter: `peft.PeftModel.from_pretrained(base, THIS_FOLDER)` puts it onto the base.
"""
_LEARNED = """
The method learned from unlabelled examples of every task; `nufilt.json` names their files, with SHA-256.
"""
_ADDED = """
The method adds parameters, which are in `added_parameters.safetensors`: `transformers` does not know them and would run
the model without; `nufilt_jax.load` reads them, and the forward passes of `nufilt_jax.models` use them.
"""


def model_card(recipe: Recipe, published: str, *, needs_data: bool, adds_parameters: bool) -> str:
    """The text of `README.md`: what was merged, how, and how to go on; for bytes of paths that are no text, `?`.

    Args:
      recipe: of the merge.
      published: where its method was.
      needs_data: whether the method learned from examples.
      adds_parameters: whether the merged model has more parameters than the base.
    """
    base, settings = recipe.base, recipe.settings.to_json()
    on_hub = [model for model in (base, *recipe.tasks) if model.revision is not None]
    models = "".join(f"- {model.source}\n" for model in on_hub)
    is_adapter = recipe.settings.output == "adapter"
    header = f"---\nlibrary_name: {'peft' if is_adapter else 'transformers'}\ntags:\n- merge\n- nufilt_jax\n"
    header += f"base_model:\n{models}" if models else ""
    config = "\n".join(
        f"| {key} | {value} |" for key, value in {**settings["config"], "seed": settings["seed"]}.items()
    )
    tasks = "\n".join(f"| {number} | {task.name} | {_place(task)} |" for number, task in enumerate(recipe.tasks, 1))
    patterns = ", ".join(f"`{row.pattern}`" for row in recipe.selected)
    remarks = (_ADAPTER if is_adapter else "") + (_LEARNED if needs_data else "") + (_ADDED if adds_parameters else "")
    card = f"""{header}---

# {_title(recipe)}

Merged one task after another by nufilt_jax, method `{recipe.settings.method}` ({published}).

Base: {_place(base)}

| step | task | model |
| --- | --- | --- |
{tasks}

| setting | value |
| --- | --- |
{config}

{sum(row.layers for row in recipe.selected)} layers were merged by the method: {patterns}. All other parameters
{_OTHERS[recipe.settings.other_params]}.
{remarks}
Inputs with their SHA-256, versions, device, times and losses of every step are in `nufilt.json`; what each step did to
each layer is in `forecast.json`. Where `state/` is there too, one more task can be added:

    python -m nufilt_jax.merge --add THIS_FOLDER --task NAME=MODEL
"""
    return card.encode(errors="replace").decode()


def _title(recipe: Recipe) -> str:
    name = recipe.base.source.rstrip("/").rsplit("/", 1)[-1]
    return f"{name}: {len(recipe.tasks)} tasks merged"


def _place(model: Model) -> str:
    return f"`{model.source}`" + (f" at `{model.revision}`" if model.revision else "")
