"""One typed configuration a run: schema, loading with overrides, dumping. Imports no torch."""

from pretrain.configuration.loading import dump_config, find_config, load_config, parse_config, set_key
from pretrain.configuration.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "find_config", "load_config", "parse_config", "set_key"]
