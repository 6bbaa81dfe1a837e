"""seqio tasks and mixtures. Importing this package registers all of them.

Import it by this one name, `openmoe_jax.tasks`, wherever the folder lies.
"""

import tensorflow_datasets as tfds

from openmoe_jax.tasks import demo  # pylint: disable=unused-import
from openmoe_jax.tasks import domains  # pylint: disable=unused-import
from openmoe_jax.tasks import evaluation  # pylint: disable=unused-import
from openmoe_jax.tasks import instruction  # pylint: disable=unused-import
from openmoe_jax.tasks import pretraining  # pylint: disable=unused-import
from openmoe_jax.tensorflow_setup import import_seqio

# TFDS would keep small data sets in memory, and a saved data position would then hold all of their text.
import_seqio().utils.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))
