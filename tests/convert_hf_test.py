"""Hugging Face folders written and read back; what is damaged or leads out of the folder is refused."""

import json
import pathlib
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from openmoe_jax import names, paths
from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, to_dict
from openmoe_jax.convert import int8 as int8_lib
from openmoe_jax.convert import tensors as tensors_lib
from openmoe_jax.convert.huggingface import MANIFEST, HuggingFaceSink, HuggingFaceSource, Tokenizer
from openmoe_jax.convert.tensors import PARAMS, Source, TensorInfo, sum_bits
from openmoe_jax.convert.torch_names import torch_names
from openmoe_jax.convert.transfer import read_all, transfer
from openmoe_jax.convert.weight_files import safetensors_places
import golden

SILENT = lambda text: None
MODEL = ModelConfig(vocab_size=96, emb_dim=16, mlp_dim=24, num_heads=2, head_dim=4, num_layers=4, moe_interval=2,
                    num_experts=4, dtype='float32', scan_blocks=False)


class Numbers(Source):
  """Random parameters of a model, in memory."""

  def __init__(self, model=MODEL, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    self.where, self.model, self.step = 'numbers', model, 11
    self.run = to_dict(RunConfig(model=model))
    self.arrays = {PARAMS + n: rng.standard_normal(s).astype(dtype) for n, s in names.t5x_shapes(model).items()}
    self.tensors = {n: TensorInfo(x.shape, x.dtype) for n, x in self.arrays.items()}
    self.fingerprint = {n: sum_bits(x) for n, x in self.arrays.items()}

  def read(self, name, axis=0, start=0, stop=None):
    x = self.arrays[name]
    return x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(x.ndim))]


def export(folder, source=None, **options):
  source = source or Numbers()
  transfer(source, HuggingFaceSink(source.model, source.run, source.step, **options), folder, say=SILENT)
  return source


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hf') / 'model'
  return folder, export(folder, shard_bytes=20_000)


def assert_same(a, b):
  assert a.tensors.keys() == b.tensors.keys()
  for name in a.tensors:
    x, y = a.read(name), b.read(name)
    assert x.dtype == y.dtype and x.shape == y.shape == a.tensors[name].shape
    np.testing.assert_array_equal(x, y, err_msg=name)


def test_there_and_back(exported):
  folder, source = exported
  back = HuggingFaceSource(folder)
  assert_same(back, source)
  assert back.step == 11 and back.run == source.run
  read_all(back, say=SILENT)
  for name in ('decoder/logits_dense/kernel', 'decoder/layers_0/mlp/wi_0/kernel', 'token_embedder/embedding'):
    x = source.arrays[PARAMS + name]
    for axis in (0, 1):
      index = (slice(2, 7), slice(None)) if axis == 0 else (slice(None), slice(2, 7))
      np.testing.assert_array_equal(back.read(PARAMS + name, axis, 2, 7), x[index])


def test_files_and_index(exported):
  folder, _ = exported
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 3 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  total = 0
  for file in files:
    places = safetensors_places(paths.path(folder) / file)
    assert set(places) == {n for n, f in index['weight_map'].items() if f == file}
    total += sum(place.nbytes for place in places.values())
  assert total == index['metadata']['total_size']
  assert {'config.json', 'generation_config.json', 'README.md', 'modeling_openmoe.py', 'configuration_openmoe.py',
          MANIFEST} <= {p.name for p in folder.iterdir()}
  assert not list(folder.parent.glob('*.partial')) and not list(folder.glob('*tmp*'))


def test_one_file_has_no_index(tmp_path):
  source = export(tmp_path / 'model')
  assert (tmp_path / 'model' / 'model.safetensors').exists()
  assert not (tmp_path / 'model' / 'model.safetensors.index.json').exists()
  assert_same(HuggingFaceSource(tmp_path / 'model'), source)


@pytest.mark.parametrize('part_bytes', [64, 1000])
def test_parts_do_not_matter(tmp_path, monkeypatch, exported, part_bytes):
  monkeypatch.setattr(tensors_lib, 'PART_BYTES', part_bytes)
  export(tmp_path / 'model', shard_bytes=20_000)
  for file in exported[0].iterdir():
    assert (tmp_path / 'model' / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize('model', [MODEL.replace(num_experts=0, moe_interval=1), MODEL.replace(parallel_moe=True),
                                   MODEL.replace(extra_mlp=False), MODEL.replace(mlp_activations=('silu', 'linear'))])
def test_other_models(tmp_path, model):
  source = export(tmp_path / 'model', Numbers(model))
  back = HuggingFaceSource(tmp_path / 'model')
  assert_same(back, source)
  same = {f: getattr(model, f) for f in ('parallel_moe', 'extra_mlp', 'mlp_activations', 'num_experts')}
  assert {f: getattr(back.model, f) for f in same} == same


def test_bfloat16(tmp_path):
  source = export(tmp_path / 'model', Numbers(dtype=ml_dtypes.bfloat16))
  assert_same(HuggingFaceSource(tmp_path / 'model'), source)
  assert json.loads((tmp_path / 'model' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


def test_names_and_shapes_are_the_released_ones(tmp_path):
  model = ModelConfig(vocab_size=384, emb_dim=64, mlp_dim=80, num_heads=4, head_dim=16, num_layers=4, moe_interval=2,
                      num_experts=8)
  export(tmp_path / 'model', Numbers(model))
  places = safetensors_places(paths.path(tmp_path) / 'model' / 'model.safetensors')
  assert {n: list(p.shape) for n, p in places.items()} == golden.load_json('torch_state_dict_shapes.json')


def test_int8_is_within_half_a_step(tmp_path):
  source = export(tmp_path / 'model', int8=True)
  back = HuggingFaceSource(tmp_path / 'model')
  size = lambda folder: (folder / 'model.safetensors').stat().st_size
  export(tmp_path / 'whole')
  assert size(tmp_path / 'model') < .5 * size(tmp_path / 'whole')
  for name, torch_name in torch_names(MODEL).items():
    x, y = source.read(PARAMS + name), back.read(PARAMS + name)
    if not int8_lib.is_quantized(name):
      np.testing.assert_array_equal(x, y)
      continue
    axis = 0 if torch_name.transposed else 1  # over what a scale is taken: the inputs
    step = np.max(np.abs(x), axis=axis, keepdims=True) / 127
    assert np.all(np.abs(x - y) <= step / 2 * (1 + 1e-5)) and np.any(x != y)
  assert json.loads((tmp_path / 'model' / 'config.json').read_text())['weight_format'] == 'int8'


def test_quantize_by_hand():
  weight = np.float32([[1, -2, .5], [0, 0, 0]])
  values, scale = int8_lib.quantize(weight)
  np.testing.assert_array_equal(values, np.int8([[64, -127, 32], [0, 0, 0]]))  # 63.5 and 31.75 rounded, half to even
  np.testing.assert_allclose(scale, [[2 / 127], [1]], rtol=1e-7)


def copied(exported, tmp_path):
  shutil.copytree(exported[0], tmp_path / 'copy')
  return tmp_path / 'copy'


def refused(folder, message):
  with pytest.raises(ConfigError, match=message) as error:
    read_all(HuggingFaceSource(folder), say=SILENT)
  assert '\n' not in str(error.value)


def change_json(file, change):
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


def test_a_changed_byte_is_noticed(exported, tmp_path):
  folder = copied(exported, tmp_path)
  file = folder / 'model-00002-of-00006.safetensors' if (folder / 'model-00002-of-00006.safetensors').exists() else (
      sorted(folder.glob('model-00002*'))[0])
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(bytes(data))
  refused(folder, 'does not have the checksum')


def test_a_cut_or_missing_shard(exported, tmp_path):
  folder = copied(exported, tmp_path)
  file = sorted(folder.glob('model-00002*'))[0]
  file.write_bytes(file.read_bytes()[:-4])
  refused(folder, 'damaged or cut off')
  file.unlink()
  refused(folder, f'{file.name} is missing')


@pytest.mark.parametrize('name', ['../model.safetensors', '/etc/passwd', '..', '', 'a/b.safetensors', 'a\\b'])
def test_an_index_that_leads_out_of_the_folder(exported, tmp_path, name):
  folder = copied(exported, tmp_path)
  shutil.copy(sorted(folder.glob('model-00001*'))[0], tmp_path / 'model.safetensors')
  change_json(folder / 'model.safetensors.index.json', lambda c: c['weight_map'].update({'lm_head.weight': name}))
  refused(folder, 'only names of files in the folder')


def test_indexes_that_say_nothing(exported, tmp_path):
  folder = copied(exported, tmp_path)
  index = folder / 'model.safetensors.index.json'
  index.write_text('{"weight_map": 3}')
  refused(folder, 'has no weight_map')
  index.write_text('not json')
  refused(folder, 'is not JSON')
  index.write_text('[]')
  refused(folder, 'is not a JSON object')
  shutil.copy(exported[0] / index.name, index)
  first = sorted(folder.glob('model-00001*'))[0].name
  change_json(index, lambda c: c['weight_map'].update({'lm_head.weight': first}))
  refused(folder, "lm_head.weight.* are in .*, which has them not")


def test_differences_are_listed_by_name(exported, tmp_path):
  folder = copied(exported, tmp_path)
  change_json(folder / 'config.json', lambda c: c.update(vocab_size=97))
  refused(folder, r'! lm_head.weight \[96, 16\] instead of \[97, 16\].*embed_tokens')
  shutil.copy(exported[0] / 'config.json', folder / 'config.json')
  change_json(folder / 'config.json', lambda c: c.update(num_hidden_layers=6))
  refused(folder, r'- model.layers.4.input_layernorm.weight \[16\] \(missing\)')
  change_json(folder / 'config.json', lambda c: c.update(num_hidden_layers=2))
  refused(folder, r'\+ model.layers.2.input_layernorm.weight \[16\] \(unexpected\)')


def test_config_json_is_needed(exported, tmp_path):
  folder = copied(exported, tmp_path)
  (folder / 'config.json').unlink()
  refused(folder, 'config.json is missing')
  (folder / 'config.json').write_text('{"hidden_size": "large"}')
  refused(folder, 'config.json')


def test_no_weights(exported, tmp_path):
  folder = copied(exported, tmp_path)
  for file in folder.glob('*.safetensors*'):
    file.unlink()
  refused(folder, 'holds no weights')
  (folder / 'model.safetensors').write_bytes(pickle.dumps({'lm_head.weight': 1}))
  refused(folder, 'is not a safetensors file')


@pytest.mark.torch
def test_pytorchs_own_shards(exported, tmp_path):
  torch = pytest.importorskip('torch')
  folder = copied(exported, tmp_path)
  source = HuggingFaceSource(exported[0])
  state = {t.name: torch.from_numpy(np.ascontiguousarray(source.read(PARAMS + n).T if t.transposed else
                                                         source.read(PARAMS + n)))
           for n, t in torch_names(MODEL).items()}
  for file in folder.glob('*.safetensors*'):
    file.unlink()
  half = len(state) // 2
  parts = {'pytorch_model-00001-of-00002.bin': dict(list(state.items())[:half]),
           'pytorch_model-00002-of-00002.bin': dict(list(state.items())[half:])}
  parts['pytorch_model-00001-of-00002.bin']['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(2)
  weight_map = {}
  for file, part in parts.items():
    torch.save(part, folder / file)
    weight_map.update({name: file for name in part})
  (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': weight_map}))
  assert_same(HuggingFaceSource(folder), source)
  torch.save({'lm_head.weight': pathlib.Path('x')}, folder / 'pytorch_model-00002-of-00002.bin')
  refused(folder, 'cannot be read as weights of PyTorch')


def test_tokenizer_files_come_with_it(tmp_path):
  from openmoe_jax.vocabulary import demo_model_path
  model = MODEL.replace(vocab_size=8576)
  export(tmp_path / 'model', Numbers(model), tokenizer=Tokenizer(pathlib.Path(demo_model_path()).read_bytes(), 300))
  assert (tmp_path / 'model' / 'tokenizer_config.json').exists()


def test_what_pytorch_cannot_do_is_refused_at_once():
  with pytest.raises(ConfigError, match='inputs_bidirectional_attention'):
    HuggingFaceSink(MODEL.replace(inputs_bidirectional_attention=True), {}, 0)


def test_a_jax_model_reads_it(exported):
  """The parameters of a folder, in the model's tree."""
  source = HuggingFaceSource(exported[0])
  params = names.from_t5x_names(MODEL, {n.removeprefix(PARAMS): source.read(n) for n in source.tensors})
  assert len(jax.tree.leaves(params)) == len(source.tensors)
