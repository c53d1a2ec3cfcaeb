"""Loading configs: OmegaConf reads, merges and interpolates, pydantic validates. Torch-free.

A YAML file may name a ``base`` file (relative to itself, or a list of them) that it changes; ``key=value``
overrides come last. Errors name the file, the key and the nearest valid key.
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError

from data_pipeline.errors import UsageError

T = TypeVar("T")


def read_yaml(path: Path) -> DictConfig:
    """The YAML mapping in ``path``, merged over its ``base`` files. UsageError names what is wrong and where."""
    return _read(Path(path), ())


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise UsageError(f"{path}: `base` leads back to the file itself; remove one of the references")
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; give a .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        said = _one_line(error)
        if re.search(r"[{,\[][^#\n]*\?\?\?\s*[,}\]]", path.read_text(errors="replace")):
            said += '; within {} and [] write "???" with quotes'
        raise UsageError(f"{path}: not valid YAML: {said}") from None
    if not isinstance(node, DictConfig):
        raise UsageError(f"{path}: the top level must be a mapping of keys to values")
    bases = node.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else list(bases)
    seen = (*seen, path.resolve())
    merged = [_read(path.parent / base, seen) for base in bases]
    try:
        return OmegaConf.merge(*merged, node)
    except (OmegaConfBaseException, TypeError) as error:  # keys over a list, a list over keys
        raise UsageError(f"{path}: does not fit its base {', '.join(bases)}: {_one_line(error)}") from None


def apply_overrides(node: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """``node`` with ``key=value`` overrides applied; values are YAML, keys may be dotted."""
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise UsageError(f"override {override!r}: write key=value, for example training.steps=100")
    for override in overrides:
        try:
            node = OmegaConf.merge(node, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, TypeError) as error:
            said = "it puts a list where keys are, or keys or a value where a list is" if _misfit(error) else error
            raise UsageError(f"override {override!r}: {_one_line(said)}") from None
        except yaml.YAMLError as error:
            raise UsageError(f"override {override!r}: {_one_line(error)}") from None
    return node


def resolve(node: DictConfig, where: str | Path, run_of: Callable[[str], Path] | None = None) -> dict[str, Any]:
    """``node`` as plain data with every interpolation resolved; ``${run:NAME}`` becomes ``run_of(NAME)``."""

    def run_resolver(name: str) -> str:
        if run_of is None:
            raise UsageError(f"{where}: ${{run:{name}}} has a meaning only inside a pipeline; give a path")
        return str(run_of(name))

    OmegaConf.register_resolver("run", run_resolver, replace=True)
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        if isinstance(cause := _root(error), UsageError):  # from run_of
            raise cause from None
        key = f"key {error.full_key!r}: " if error.full_key else ""
        raise UsageError(f"{where}: {key}{_explain_omegaconf(error)}") from None
    finally:
        OmegaConf.clear_resolver("run")


def validate(kind: type[T] | Any, data: dict[str, Any], where: str | Path) -> T:
    """``data`` as the pydantic type ``kind``; UsageError names file, key and the nearest valid key."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explained(kind, error)}") from None


def load(
    kind: type[T] | Any,
    path: str | Path,
    overrides: Sequence[str] = (),
    run_of: Callable[[str], Path] | None = None,
) -> T:
    """Reads, merges, overrides, resolves and validates one config file."""
    node = apply_overrides(read_yaml(Path(path)), overrides)
    return validate(kind, resolve(node, path, run_of), path)


def as_yaml(config: BaseModel) -> str:
    """The resolved config, enough to rerun it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def canonical_json(config: BaseModel, but: Collection[str] = ()) -> str:
    """A config, ``but`` those of its keys, as text that is the same whenever the config is: what fingerprints hash."""
    return json.dumps(config.model_dump(mode="json", exclude=set(but)), sort_keys=True, separators=(",", ":"))


def _explained(kind: Any, error: ValidationError) -> str:
    # A default made of other keys cannot be made where one of those is wrong: that is said already.
    items = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    missing: dict[tuple, list[dict[str, Any]]] = {}  # those of one mapping are one thing to mend
    for item in items:
        if item["type"] == "missing":
            missing.setdefault(item["loc"][:-1], []).append(item)
    several = [alike for alike in missing.values() if len(alike) > 1]
    said = [f"keys {', '.join(repr(_key(kind, item)) for item in alike)} are missing" for alike in several]
    return "; ".join([*said, *(_explain(kind, item) for item in items if not any(item in alike for alike in several))])


def _explain(kind: Any, item: dict[str, Any]) -> str:
    model, at, node = _follow(kind, list(item["loc"]))
    key = _key(kind, item)
    if item["type"] == "extra_forbidden" and model is not None:
        valid = list(model.model_fields)
        near = difflib.get_close_matches(str(at[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        field = model and model.model_fields.get(at[-1])
        return f"key {key!r} is missing" + (f": {field.description}" if field and field.description else "")
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key = ".".join([*map(str, at), "kind"])
        known = ", ".join(str(_tag(model)) for model in _models(node))
        got = f"is {item['ctx']['tag']!r}" if "tag" in item["ctx"] else "is missing"
        return f"key {key!r} {got}; known kinds: {known}"
    if item["type"] == "model_type" and len(models := _models(node)) == 1:
        return f"key {key!r} holds keys, not a value: {', '.join(models[0].model_fields)}"
    if words := _in_words(item):
        return f"key {key!r} {words}" if key else f"it {words}"
    message = item["msg"].removeprefix("Value error, ")
    return f"key {key!r}: {message}" if key else message


def _in_words(item: dict[str, Any]) -> str | None:
    """What was given, and what to give instead; None where pydantic's own words say it."""
    given = item["input"]
    text = f"{given:g}" if isinstance(given, float) else str(given)
    short = "nothing" if given is None else text if len(text) <= 60 else f"{text[:60]}..."
    match item["type"]:
        case "tuple_type" | "list_type":
            return f"is {short}; give a list" + ("" if isinstance(given, dict) or given is None else f": [{short}]")
        case "dict_type":
            return f"is {short}; give keys with values, {{KEY: VALUE}}"
        case "too_short" | "string_too_short":
            least = item["ctx"]["min_length"]
            return f"is too short; give {least} or more" if given else "is empty; give it something"
        case "string_type":
            return f"is {short}; give text"
        case "path_type":
            return f"is {short}; give a path"
        case "float_type" | "float_parsing":
            return f"is {short}; give a number"
        case "int_type" | "int_parsing" | "int_from_float":
            return f"is {short}; give a whole number"
        case "greater_than":
            return f"is {short}; give more than {item['ctx']['gt']:g}"
        case "greater_than_equal":
            return f"is {short}; give {item['ctx']['ge']:g} or more"
        case "less_than":
            return f"is {short}; give less than {item['ctx']['lt']:g}"
        case "less_than_equal":
            return f"is {short}; give {item['ctx']['le']:g} or less"
        case "finite_number":
            return f"is {short}; give a finite number"
        case "literal_error":
            return f"is {short}; give {item['ctx']['expected']}"
    return None


def _key(kind: Any, item: dict[str, Any]) -> str:
    """As people write it: for a discriminated union pydantic puts the tag in front of the key; people write no tag."""
    return ".".join(str(part) for part in _follow(kind, list(item["loc"]))[1] if part != "[key]")


def _follow(kind: Any, location: list) -> tuple[type[BaseModel] | None, list, Any]:
    """Who owns the last key of ``location``, the location without union tags, and the type it leads to."""
    model, at, node = None, [], kind
    for part in location:
        models = _models(node)
        if len(models) > 1 and (tagged := [m for m in models if _tag(m) == part]):
            node = tagged[0]
            continue
        model = models[0] if models else None
        at.append(part)
        field = model.model_fields.get(part) if model else None
        node = field.annotation if field else node
    return model, at, node


def _models(node: Any) -> list[type[BaseModel]]:
    if isinstance(node, type) and issubclass(node, BaseModel):
        return [node]
    return [model for arg in get_args(node) for model in _models(arg)]


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "has no value (???) yet; give one, for example on the command line: key=value"
    return str(error).splitlines()[0]  # the other lines repeat the key


def _root(error: BaseException) -> BaseException:
    """OmegaConf wraps what a resolver raised, sometimes twice."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def _misfit(error: Exception) -> bool:
    return isinstance(error, TypeError) or "container types" in str(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    items = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()]
    return {key: value for item in items for key, value in item.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old → new`` for each dotted key in which two configs differ."""
    keys = sorted(old.keys() | new.keys())
    pairs = [(key, old.get(key, "(absent)"), new.get(key, "(absent)")) for key in keys]
    return [f"{key}: {a} → {b}" for key, a, b in pairs if a != b]
