"""Overrides of a pipeline's or a study's YAML change what is there: where a job, an axis or a variable is misspelt,
they would make a new one, which nobody asked for."""

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data_pipeline.errors import UsageError


def refuse_new(node: DictConfig, overrides: Sequence[str], path: Path) -> None:
    """UsageError names what is not in ``node``, as it was read from ``path``, and what is. An axis, or a value of one,
    may be added by an override that gives all of it: grid.lr={key: ..., values: [...]}."""
    added: set[tuple[str, ...]] = set()
    for override in overrides:
        key = re.sub(r"\[([^\]]*)\]", r".\1", override.partition("=")[0])
        match parts := tuple(key.split(".")):
            case ["vars", name, *_]:
                used = re.findall(r"\$\{vars\.(\w+)", OmegaConf.to_yaml(node))
                known = list(dict.fromkeys([*_keys(node, "vars"), *used]))
                _refuse(override, path, "variable", "variables", name, known, "vars.NAME=value")
            case ["jobs" | "trial" as section, name, *_]:
                how = f"{section}.JOB.set.KEY=value"
                _refuse(override, path, "job", "jobs", name, _keys(node, section), how)
            case ["grid"] | ["grid", _] | ["grid", _, "values"] if _is_empty(override):
                raise UsageError(f"{override}: {path}: {key} would be empty; give it a value, or remove it in the file")
            case ["grid", _] | ["grid", _, "values", _]:
                added.add(parts)
            case ["grid", axis, *rest] if parts[:2] not in added:
                how = f"to add one: 'grid.{axis}={{key: ..., values: [...]}}'"
                _refuse(override, path, "axis", "axes", axis, _keys(node, "grid"), how)
                labels = _keys(node, "grid", axis, "values")
                if labels and len(rest) > 2 and parts[:4] not in added:
                    how = f"to add one: 'grid.{axis}.values.{rest[1]}={{...}}'"
                    _refuse(override, path, "value", "values", rest[1], labels, how)


def _is_empty(override: str) -> bool:
    return override.partition("=")[2].replace(" ", "") in ("", "null", "{}", "[]")


def _refuse(override: str, path: Path, one: str, all_of_them: str, name: str, known: Sequence[str], how: str) -> None:
    if name not in known:
        there = ", ".join(known) or "none"
        raise UsageError(f"{override}: {path} has no {one} {name!r}; its {all_of_them}: {there} ({how})")


def _keys(node: DictConfig, *sections: str) -> list[str]:
    for section in sections:
        node = node.get(section) if isinstance(node, DictConfig) else None
    return [str(key) for key in node] if isinstance(node, DictConfig) else []
