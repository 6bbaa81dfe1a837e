"""Training on slices of Cloud TPUs: `python -m openmoe_jax.tools.tpu`."""
