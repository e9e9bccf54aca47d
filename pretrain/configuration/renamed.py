"""Keys of earlier versions. A configuration that still uses one is refused with the key that took its place."""

from collections.abc import Iterator, Mapping
from typing import Any

_SUPERVISED = "task: {name: classification}, which takes label_smoothing, mixup and cutmix"
RENAMED = {  # old key -> what to write now; a section stands for every key below it
    "objective": "task",
    "data.tokenizer": None,
}


def renamed_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each old key in `raw`, naming the old key and the new one."""
    objective = raw.get("objective")
    if isinstance(objective, Mapping) and objective.get("preset") == "supervised":
        yield f"the key 'objective.preset: supervised' is now {_SUPERVISED}"
        raw = {key: value for key, value in raw.items() if key != "objective"}
    for old, new in RENAMED.items():
        for key in _keys_at(raw, old):
            if new is None:
                yield f"the key {key!r} no longer exists, and nothing read it: delete the line"
            else:
                yield f"the key {key!r} is now {new + key.removeprefix(old)!r}"


def _keys_at(raw: Mapping[str, Any], path: str) -> list[str]:
    """The keys directly below `path`, or `path` itself where it holds a value; empty where `raw` has no such key."""
    node: Any = raw
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return []
        node = node[part]
    return [f"{path}.{key}" for key in node] if isinstance(node, Mapping) and node else [path]
