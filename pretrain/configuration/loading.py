"""YAML file + `key.path=value` overrides -> RunConfig.

Every mistake is a UserError that names the key and the nearest right one.
"""

import difflib
import functools
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from data_pipeline.errors import UserError
from pretrain.configuration.renamed import renamed_keys
from pretrain.configuration.schema import RunConfig, TaskSection
from pretrain.configuration.tasks import DEFAULT, task_class


def find_config(name: str) -> Path:
    """The file that `name` means: a path, or the bare name of a shipped configuration."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("configs")))
    for candidate in (shipped / name, shipped / f"{name}.yaml"):
        if path.parent == Path(".") and candidate.is_file():
            return candidate
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    hint = _nearest(path.stem, names)
    raise UserError(f"no configuration {name!r}: neither a file nor a shipped name ({', '.join(names)}).{hint}")


def load_config(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read, override and validate. Raises UserError naming file and key."""
    path = find_config(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a mapping of sections was expected, found {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validate, with the section of the task that `raw` names. Raises UserError naming every wrong key."""
    if renamed := list(renamed_keys(raw)):
        raise UserError("\n".join(f"{source}: {sentence}" for sentence in renamed))
    task = raw.get("task") or {}
    name = task.get("name", DEFAULT) if isinstance(task, Mapping) else DEFAULT
    kind = task_class(name)
    schema = _schema_with(kind)
    if isinstance(task, Mapping):
        raw = _with_defaults({**raw, "task": {**task, "name": name}}, kind.augmentation(task))
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, source, schema) for e in error.errors())) from None


def _with_defaults(raw: dict[str, Any], augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the keys of `data.augmentation` that the task brings and the configuration leaves out."""
    data = raw.get("data")
    given = data.get("augmentation") or {} if isinstance(data, Mapping) else None
    if not augmentation or not isinstance(given, Mapping):
        return raw  # what is wrong here, validation says
    return {**raw, "data": {**(data or {}), "augmentation": {**augmentation, **given}}}


@functools.cache
def _schema_with(task: type[TaskSection]) -> type[RunConfig]:
    """RunConfig whose `task` is the section of one task, so that errors and hints name its keys like any others."""
    return create_model("RunConfig", __base__=RunConfig, task=(task, ...))


def dump_config(config: RunConfig) -> str:
    """The resolved whole as YAML; `parse_config(yaml.safe_load(...))` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Write `key.path=value` into `raw`; the value is YAML. Raises UserError naming what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.path=value, for instance optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    set_key(raw, key, _number(value))


def set_key(raw: dict[str, Any], path: str, value: object) -> None:
    """Write `value` at `path` (a.b.0.c), making sections that are missing. Raises UserError where `path` is none."""
    node: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, path)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override {path!r}: {part!r} is a value, not a section")
    node[_list_index(node, last, path) if isinstance(node, list) else last] = value


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override {override!r}: {part!r} is not an index below {len(node)}")
    return int(part)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ErrorDetails, source: str, schema: type[RunConfig]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "the whole file"
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown key {key!r}.{_nearest_key(location, schema)}"
    if error["type"] == "missing":
        return f"{source}: {key!r} is missing"
    if error["type"] == "value_error":  # raised by our own validators, whose words name the keys
        return f"{source}: {error['msg'].removeprefix('Value error, ')}"
    return f"{source}: {key!r} is {error.get('input')!r}: {error['msg']}"


def _section(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return None
        model = found[0]
    return model


def _nearest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _nearest_key(location: list[str], schema: type[RunConfig]) -> str:
    """A hint at the key that was meant: the same name in another section, else the most alike of all names, of equals
    one of the same section.
    """
    *parents, word = location
    paths = list(_all_paths(schema))
    here = ".".join([*(part for part in parents if not part.isdigit()), ""])

    def likeness(path: str) -> tuple[float, bool]:
        name = path.rpartition(".")[2]
        return difflib.SequenceMatcher(None, word, name).ratio(), path == here + name

    best = max(paths, key=likeness)
    if likeness(best)[0] < 0.6:
        return _nearest(".".join(location), paths)
    if here and best.startswith(here):
        best = ".".join([*parents, best.rpartition(".")[2]])  # with the numbers of lists
    return f" Did you mean {best!r}?"


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name in model.model_fields:
        yield prefix + name
        inner = _section(model, [name])
        if inner is not None:
            yield from _all_paths(inner, f"{prefix}{name}.")
