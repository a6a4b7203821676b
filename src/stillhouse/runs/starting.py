"""The commented YAML file that `stillhouse init` writes."""

from __future__ import annotations

from stillhouse import recipes
from stillhouse.config import Layer, Layered, commented_yaml
from stillhouse.runs.config import RunConfig

PLACES = {
    "student": {"path": "path/or/hub-name/of/the/student"},
    "data": {"train": "train.jsonl", "valid": "valid.jsonl", "max_prompt": 256, "max_response": 256},
}
TEACHER = {"kind": "live", "path": "path/or/hub-name/of/the/teacher"}

HINT = """# Set the paths of the models and of the data; then: stillhouse check FILE, and stillhouse run FILE.
# A line that begins with # and no space is an option with its default: take the # away to set it.
"""


def starting_yaml(method: str) -> str:
    """A YAML file with everything that a method needs, each field explained.

    Raises:
        ConfigError: no method has that name.
    """
    recipe = recipes.find(method)
    values = Layered.merged(Layer.read(recipe.path, "recipe")).values
    asks_teacher = method != "sft"
    tree = {
        "name": method,
        "recipe": method,
        **PLACES,
        **({"teacher": TEACHER} if asks_teacher else {}),
        **values,
    }
    header = "\n".join(f"# {line}".rstrip() for line in recipe.header.splitlines())
    return f"{header}\n\n{HINT}\n{commented_yaml(RunConfig, tree)}"
