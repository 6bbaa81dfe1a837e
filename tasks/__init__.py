"""seqio tasks and mixtures. Importing this package registers all of them.

Import it by this one name, `openmoe_jax.tasks`, wherever the folder lies.
"""

from openmoe_jax.tasks import demo  # pylint: disable=unused-import
