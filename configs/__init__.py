"""Presets: flat YAML files that override defaults of the configuration dataclasses, nothing more."""
