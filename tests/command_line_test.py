"""The flags that all programs share."""

import sys

from openmoe_jax import command_line, gin_utils
from openmoe_jax.config import ConfigError
import pytest


def parse(*args):
  return command_line.Parser(prog='test').parse_args(args)


def run_of(*args):
  return command_line.run_config(parse('--gin_file=recipes/demo.gin', '--model_dir=/tmp/d', *args))


def test_gin_flags_in_both_forms_anywhere():
  run = run_of('--gin.BATCH_SIZE=16', '--gin.TRAIN_STEPS', '70', '--tfds_data_dir=/data', '--gin.VOCABULARY=a=b')
  assert (run.data.batch_size, run.train.train_steps, run.data.vocabulary) == (16, 70, 'a=b')
  assert (run.data.tfds_data_dir, run.model_dir) == ('/data', '/tmp/d')


def test_several_files_and_search_paths(tmp_path):
  (tmp_path / 'more.gin').write_text('TRAIN_STEPS = 77')
  assert run_of('--gin_file=more.gin', f'--gin_search_paths=/nowhere,{tmp_path}').train.train_steps == 77


@pytest.mark.parametrize('args, part', [
    (('--modeldir=x',), '--model_dir'),
    (('--gin_fil=x',), '--gin_file'),
    (('surplus',), 'surplus'),
    (('--gin.BATCH_SIZE',), '--gin.BATCH_SIZE=VALUE'),
    (('--gin.BATCH_SIZE', '--print_config'), '--gin.BATCH_SIZE=VALUE'),
    (('--model_dir',), 'model_dir'),
])
def test_mistakes(args, part):
  with pytest.raises(ConfigError, match=part):
    parse(*args)


def test_print_config_needs_no_required_settings():
  args = parse('--gin_file=recipes/demo.gin', '--print_config')
  assert command_line.run_config(args).model_dir == ''


@pytest.mark.parametrize('name', ['recipes/demo.gin', 'recipes/openmoe_8b_orca_sft.gin', 'models/openllama_large.gin'])
def test_printed_configuration_is_complete_readable_and_reusable(name, tmp_path):
  run = gin_utils.load_run_config([name], ['RunConfig.model_dir=/tmp/it\'s "here"'], check_required=False)
  text = command_line.format_config(run)
  (tmp_path / 'again.gin').write_text(text)
  assert gin_utils.load_run_config([str(tmp_path / 'again.gin')]) == run
  lines = [line for line in text.splitlines() if ' = ' in line and not line.startswith('#')]
  assert len(lines) == sum(len(gin_utils.setting_names(cls)) for cls in gin_utils.CLASSES.values())
  assert len({line.index(' = ') for line in lines}) == 1  # aligned
  marked = [line for line in lines if '# not the default' in line]
  assert any(line.startswith('RunConfig.model_dir') for line in marked)
  assert not any(line.startswith('ModelConfig.min_expert_capacity') for line in marked)


def test_an_error_is_one_line_and_exit_status_2(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['/bin/openmoe-train'])

  def main(argv):
    raise ConfigError(f'two\n  lines {argv}')

  with pytest.raises(SystemExit) as caught:
    command_line.run_main(main, ['a'])
  assert caught.value.code == 2
  assert capsys.readouterr() == ('', "openmoe-train: error: two lines ['a']\n")
