"""The original's evaluation tasks (SPEC section 12), apart from BIG-bench-Lite; importing this registers them.

Their data are files in a folder (EvalConfig.data_dir; its layout: `sources`) or TFDS data sets, and are not needed before
a task is used.
"""

from openmoe_jax.tasks.evaluation import registry
from openmoe_jax.tasks.evaluation.sources import configure  # pylint: disable=unused-import

NAMES = tuple(registry.TASKS)

registry.register()
