"""From image bytes to augmented views."""
