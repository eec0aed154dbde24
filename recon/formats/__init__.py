"""Splat files, one module for each format."""
