"""Command-line tools around the library: `python -m openmoe_jax.tools.NAME`; each docstring starts with its command."""
