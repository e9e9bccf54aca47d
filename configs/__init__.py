"""The shipped run configurations, one YAML file each."""
