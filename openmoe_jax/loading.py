"""Reads a trained model: `load('path or gs:// of a checkpoint')`."""

import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from openmoe_jax import checkpoints
from openmoe_jax import config as config_lib
from openmoe_jax import names
from openmoe_jax import partitioning
from openmoe_jax import paths
from openmoe_jax import text_decoding
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig, require
from openmoe_jax.convert import hf_tokenizer
from openmoe_jax.convert.huggingface import HuggingFaceSource
from openmoe_jax.convert.tensors import PARAMS
from openmoe_jax.model import variables
from openmoe_jax.routers.state import init_state
from openmoe_jax.train_state import init_params


class Model:
  """A trained model.

  Attributes:
    config: its ModelConfig.
    params: parameters, in the layout of `config.scan_blocks`.
    router_state: arrays of routers that have some, else {}; `variables` are both together, which is what runs the model.
    step: training steps done.
    run: the whole configuration of the run, as the dictionary of config.json.
    mesh: the devices of `params`, None for a single one.
    vocabulary: the seqio vocabulary it was trained with, read on first use.
  """

  def __init__(self, config: ModelConfig, params: Any, step: int, run: Dict[str, Any],
               mesh: Optional[jax.sharding.Mesh] = None, router_state: Optional[Any] = None):
    self.config = config
    self.params = params
    self.router_state = router_state or {}
    self.step = step
    self.run = run
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None

  @property
  def variables(self) -> Dict[str, Any]:
    return variables(self.params, self.router_state)

  @functools.cached_property
  def vocabulary(self) -> Any:
    from openmoe_jax import vocabulary  # TensorFlow: only for those who need text
    vocabulary.configure(self.run['data']['vocabulary'], self.run['data']['extra_ids'])
    return vocabulary.get()

  def generate(self, texts: Sequence[str], max_new_tokens: int = 128, **options) -> List:
    """Continues texts: a string for each, greedily by default; see `text_decoding.generate_texts` for the options."""
    return text_decoding.generate_texts(self, texts, max_new_tokens, **{'mesh': self.mesh, **options})

  def score(self, inputs: Sequence[str], targets: Sequence[str], **options) -> text_decoding.TextScores:
    """Log-likelihood of each target given its input; see `text_decoding.score_texts` for the options."""
    return text_decoding.score_texts(self, inputs, targets, **{'mesh': self.mesh, **options})

  def record_routing(self, text: str, policy: str = 'none') -> Any:
    """Where each token of a text goes in each sparse layer, as a data frame; see `recording.tables.record_text`."""
    from openmoe_jax.recording import tables
    return tables.record_text(self, text, policy)

  def ablate(self, mixture: str, tokens: int = 8192, **options) -> Any:
    """What each expert, and each router's decisions, are worth on the tasks of a mixture: change of loss, as a data frame;
    see `analysis.surgery.ablate` for the options and `surgery_report.records` for the columns."""
    from openmoe_jax.analysis import surgery, surgery_report
    from openmoe_jax.recording import collect, tables
    found = surgery.ablate(self, collect.Settings([mixture], tokens=tokens), **options)
    return tables.to_frame(surgery_report.columns(found))


def load(path: paths.PathLike, mesh: Optional[jax.sharding.Mesh] = None, **changes) -> Model:
  """Reads the parameters of a checkpoint; what it is follows from the config.json beside it, gin is not involved.

  Args:
    path: local or gs://; a model_dir, its `checkpoints` folder (both: newest step), or one step's folder; or a Hugging
      Face folder, a released one or one that `openmoe-convert` wrote.
    mesh: devices to put the parameters on; the first device of this machine if not given.
    **changes: fields of ModelConfig that differ from training, such as dtype='bfloat16' or scan_blocks=True.

  Raises:
    ConfigError: there is no checkpoint, or it does not fit the changes.
    CheckpointError: it is damaged.
  """
  if mesh is None:
    mesh = partitioning.make_mesh(MeshConfig(), jax.local_devices()[:1])
  if is_hugging_face(path):
    return _from_hugging_face(path, mesh, changes)
  directory = checkpoints.resolve(path)
  try:
    run = checkpoints.read_config(directory)
    progress = checkpoints.read_progress(directory)
    config = checkpoints.read_model_config(directory).replace(**changes)
    params = checkpoints.read_item(directory, 'params', config, _template(config, mesh), progress)
    state = checkpoints.read_item(directory, 'router_state', config, state_template(config, mesh), progress)
  except (ConfigError, TypeError):
    raise
  except Exception as error:
    raise checkpoints.CheckpointError(f'{directory} cannot be read: {checkpoints.one_line(error)}') from error
  return Model(config, params, progress['step'], run, mesh, state)


def read_run(path: paths.PathLike) -> Dict[str, Any]:
  """The whole configuration of a checkpoint's run, as the dictionary of config.json; its parameters are not read.

  Args:
    path: as for `load`.
  """
  if is_hugging_face(path):
    return _run_of(path, HuggingFaceSource(path))
  directory = checkpoints.resolve(path)
  try:
    return checkpoints.read_config(directory)
  except Exception as error:
    raise checkpoints.CheckpointError(f'{directory} cannot be read: {checkpoints.one_line(error)}') from error


def read_position(path: paths.PathLike) -> Tuple[int, Optional[int]]:
  """Training steps of a checkpoint, and its tokens as the run's settings give them; None where these are not known."""
  hugging_face = is_hugging_face(path)
  step = HuggingFaceSource(path).step if hugging_face else checkpoints.read_progress(checkpoints.resolve(path))['step']
  data = read_run(path)['data']
  tokens = step * data['batch_size'] * sum(data['task_feature_lengths'].values())
  return step, tokens or None


def checkpoints_of(path: paths.PathLike, every: bool) -> List[Any]:
  """Folders that `load` reads, in order of their steps: the newest checkpoint's, or all of a model_dir's.

  Raises:
    ConfigError: there is none, or `every` for a Hugging Face folder.
  """
  if is_hugging_face(path):
    require(not every, f'--all_checkpoints: {path} is a Hugging Face folder, which holds one checkpoint')
    return [paths.path(path)]
  newest = checkpoints.resolve(path)
  if not every:
    return [newest]
  return [newest.parent / str(step) for step in checkpoints.finished_steps(newest.parent)]


def home(path: paths.PathLike) -> Any:
  """The folder that a checkpoint belongs to: model_dir of one of ours, else itself."""
  path = paths.path(path)
  if path.name.isdigit() and path.parent.name == checkpoints.CHECKPOINTS:
    return path.parent.parent
  return path.parent if path.name == checkpoints.CHECKPOINTS else path


def _template(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of the parameters with their shardings."""
  shapes = jax.eval_shape(lambda: init_params(config, 0))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                      partitioning.tree_shardings(shapes, mesh))


def state_template(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of the router state, which every device holds as a whole."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      jax.eval_shape(lambda: init_state(config)))


def is_hugging_face(path: paths.PathLike) -> bool:
  """Whether a folder holds config.json beside weights of PyTorch."""
  found = paths.entries(path)
  return 'config.json' in found and any(name.endswith(('.safetensors', '.bin', '.index.json')) for name in found)


def _from_hugging_face(path: paths.PathLike, mesh: jax.sharding.Mesh, changes: Dict[str, Any]) -> Model:
  source = HuggingFaceSource(path)
  config = source.model.replace(**changes)
  flat = {name: source.read(PARAMS + name) for name in names.t5x_shapes(config)}
  shardings = jax.tree.map(lambda x: x.sharding, _template(config, mesh))
  return Model(config, jax.tree.map(jax.device_put, names.from_t5x_names(config, flat), shardings), source.step,
               _run_of(path, source), mesh)


def _run_of(path: paths.PathLike, source: HuggingFaceSource) -> Dict[str, Any]:
  """The run of a Hugging Face folder, with the vocabulary that lies in it."""
  run = dict(source.run) or config_lib.to_dict(config_lib.RunConfig(model=source.model))
  vocabulary = paths.path(path) / 'spiece.model'
  if vocabulary.exists():
    run['data'] = {**run['data'], 'vocabulary': str(vocabulary)}
    if hf_tokenizer.has_sentinels(vocabulary.read_bytes()):
      run['data']['extra_ids'] = 0
  return run
