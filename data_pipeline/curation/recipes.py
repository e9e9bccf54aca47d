"""The file that `internimage shards build` reads: where the rows come from, and what is done with them, in this order.

sources   fetch | pack | set, one or more     -> OUTPUT/sources/NAME
filter    rules over columns                  -> statuses there
takedown  a list                              -> statuses there
dedup     within, across, against held-out    -> statuses there
shards    samples a shard, shuffle            -> OUTPUT/shards
verify                                        -> nothing, or exit code 3
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.curation.duplicates import DuplicateRules
from data_pipeline.curation.filters import FilterRules
from data_pipeline.errors import UserError
from data_pipeline.preparation import Columns, ImageRules, TableFormat, WebRules


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecipe(_Section):
    """One of fetch (a table of URLs), pack (a folder or table of images) and set (shards that are there)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    fetch: str | None = None
    pack: str | None = None
    set: str | None = None
    columns: Columns = Columns()
    table: TableFormat = TableFormat()
    images: ImageRules = ImageRules()
    web: WebRules = WebRules()
    retry: tuple[str, ...] = ()
    retries: int = Field(default=0, ge=0)  # how often rows of these reasons are asked for again
    rows_per_shard: int = Field(default=10_000, ge=1, le=10_000)
    captionless: Literal["keep", "reject", "empty"] = "keep"
    labels: Literal["auto", "folders", "none"] = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceRecipe":
        if sum(value is not None for value in (self.fetch, self.pack, self.set)) != 1:
            raise ValueError("give one of fetch, pack and set")
        return self


class FilterRecipe(_Section):
    """scores: a Parquet file to join, for every source that has this name; by default there is none."""

    rules: FilterRules
    scores: dict[str, str] = {}


class DedupRecipe(_Section):
    rules: DuplicateRules = DuplicateRules()
    against: tuple[str, ...] = ()


class TakedownRecipe(_Section):
    list: str
    erase: bool = False


class ShardsRecipe(_Section):
    samples_per_shard: int = Field(default=10_000, ge=1, le=10_000)
    shuffle: int | None = None


class VerifyRecipe(_Section):
    decode: bool = False


class ForecastRecipe(_Section):
    """What is expected of a source of URLs, for the forecast: set these from a first million rows.

    success: share of the URLs that give an image. fetched_kb, kept_kb: of an image, as it comes and as it is packed.
    kept: share of the images that filter and dedup leave. images_per_second: of one machine. price_per_tb: of what is
    fetched, if it costs anything.
    """

    success: float = Field(default=0.75, gt=0, le=1)
    fetched_kb: float = Field(default=150, gt=0)
    kept_kb: float = Field(default=45, gt=0)
    kept: float = Field(default=0.8, gt=0, le=1)
    images_per_second: float = Field(default=800, gt=0)
    machines: int = Field(default=1, ge=1)
    price_per_tb: float = Field(default=0, ge=0)


class Recipe(_Section):
    sources: tuple[SourceRecipe, ...] = Field(min_length=1)
    filter: FilterRecipe | None = None
    takedown: TakedownRecipe | None = None
    dedup: DedupRecipe | None = None
    shards: ShardsRecipe = ShardsRecipe()
    verify: VerifyRecipe = VerifyRecipe()
    forecast: ForecastRecipe = ForecastRecipe()

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("two sources have one name")
        return self


def recipe_path(name: str) -> Path:
    """Returns the file that `name` means: a path, or the bare name of a shipped recipe. Raises UserError."""
    if Path(name).is_file():
        return Path(name)
    import configs

    folder = Path(configs.__path__[0]) / "recipes"
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UserError(f"recipe {name!r} is neither a file nor a shipped one ({known})")
    return shipped


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe; `overrides` replace values at dotted keys, as `sources.0.fetch`. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is no mapping; it begins with `sources:`")
    for key, value in (overrides or {}).items():
        _set(content, key, value, path)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{path}: {where}: {first['msg']}{more}") from None


def _set(content: dict[str, Any], key: str, value: object, path: Path) -> None:
    *parents, last = key.split(".")
    place: Any = content
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} has no place for {key}") from None
