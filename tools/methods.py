"""``clipmill methods``: the methods and their recipes, one line each."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Args:
    """List the pretraining methods and their recipes."""

    json: bool = False
    """Print as JSON, with all settings of every recipe."""


def main(args: Args) -> int:
    """Print the list; always 0."""
    listed = listing()
    if args.json:
        print(json.dumps(listed, indent=2))
        return 0
    wide = max(len(name) for method in listed for name in method["recipes"])
    lines = []
    for method in listed:
        lines.append(f"{method['name']}: {method['about']}")
        lines += [f"  {name:<{wide}}  {recipe['about']}" for name, recipe in method["recipes"].items()]
        lines.append("")
    lines.append("clipmill pretrain METHOD RECIPE --help lists all settings")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def listing() -> list[dict[str, Any]]:
    """Every method: name, about (the first line of its module), and recipes {name: about, config, train}."""
    from clipmill.models.method import method_module, method_names, recipes
    from clipmill.pipeline.config import TrainConfig, to_json

    found = []
    for name in method_names():
        about = (method_module(name).__doc__ or "").strip().splitlines()[0]
        entries = {
            key: {
                "about": recipe.about,
                "config": to_json(recipe.method),
                "train": to_json(TrainConfig(**recipe.train)),
            }
            for key, recipe in recipes(name).items()
        }
        found.append({"name": name, "about": about, "recipes": entries})
    return found
