"""Fine-tuning tasks: texts, ends, and which tokens are scored."""

import numpy as np
import pytest

from openmoe_jax import chat as template
from openmoe_jax import data as data_lib
from openmoe_jax import vocabulary
from openmoe_jax.config import DataConfig
from openmoe_jax.tensorflow_setup import import_seqio
from tests import prepared
from tests.prepared import forget_folder  # pylint: disable=unused-import

seqio = import_seqio()

# Ends that pieces of the vocabulary may join with the template, characters of several bytes, and empty strings.
TALKS = [
    (['How are you?'], ['Fine, thanks.']),
    (['One', 'Two [/INST] not an end', 'Three\n'], ['First: 1.', 'Sécond <', '  third\n\n']),
    (['漢字 \U0001F600', ''], ['', 'x' * 40 + '\U0001F600'])]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  prepared.write(path, 'orca', {'train': [
      {'system_prompt': f'You are {i}. ', 'question': f'What is {i}?', 'response': f'It is {i}.'} for i in range(2010)]})
  prepared.write(path, 'wildchat_gpt4_sft', {'train': [
      {'input': f'<s>[INST] say {i} [/INST]', 'output': f' {i} </s>'} for i in range(200)]})
  prepared.write(path, 'wildchat_gpt4_chat', {'train': [
      {'user': user, 'assistant': assistant} for user, assistant in TALKS * 100]})
  return path


def batch(folder, task, lengths, **changes):
  values = dict(mixture_or_task=task, task_feature_lengths=lengths, batch_size=16, num_streams=1, pack=False,
                tfds_data_dir=str(folder), shuffle=False)
  return next(data_lib.TrainStreams(DataConfig(**{**values, **changes})))


def shown(rows, row=0):
  """A row's text, and the scored part of it."""
  tokens, weights = rows['decoder_target_tokens'][0, row], rows['decoder_loss_weights'][0, row]
  return vocabulary.decode(tokens), vocabulary.decode(tokens[weights > 0])


def test_orca(folder):
  text, scored = shown(batch(folder, 'orca_sft', {'inputs': 48, 'targets': 32}))
  assert text == 'You are 0. USER: What is 0?ASSISTANT: It is 0.</s>' and scored == 'It is 0.</s>'
  splits = seqio.TaskRegistry.get('orca_sft').source.tfds_dataset
  assert splits._map_split('validation') == 'train[-2000:]' and splits._map_split('train') == 'train'


def test_wildchat(folder):
  rows = batch(folder, 'wildchat_gpt4_sft', {'inputs': 48, 'targets': 32})
  assert shown(rows) == ('<s>[INST] say 0 [/INST] 0 </s>', ' 0 </s>')
  assert vocabulary.get().eos_id not in rows['decoder_target_tokens'], 'no end of sequence, only the written one'
  splits = seqio.TaskRegistry.get('wildchat_gpt4_sft').source.tfds_dataset
  assert splits._map_split('validation') == 'train[-128:]'


@pytest.mark.parametrize('number', range(len(TALKS)))
def test_every_answer_is_scored(folder, number):
  users, assistants = TALKS[number]
  rows = batch(folder, 'wildchat_gpt4_chat', {'targets': 256})
  tokens = rows['decoder_target_tokens'][0, number]
  text, scored = shown(rows, number)
  # What generation starts from, and the last answer.
  turns = list(zip(users[:-1], assistants[:-1]))
  assert text == template.prompt(users[-1], turns) + f' {assistants[-1]} </s>'
  assert list(tokens[tokens > 0]) == vocabulary.get().encode(text), 'cut as the whole text is, not turn by turn'
  assert (rows['decoder_input_tokens'] >= 0).all() and (rows['decoder_target_tokens'] >= 0).all()
  answers = [f' {assistant} </s>' for assistant in assistants]
  # Between two turns a piece may hold the end of the one and the beginning of the next: it is scored.
  assert scored.replace('</s><', '</s>') == ''.join(answers)


def test_conversations_are_cut_at_the_end_and_dropped_without_an_answer(folder):
  whole = batch(folder, 'wildchat_gpt4_chat', {'targets': 256})
  prompt = int((whole['decoder_loss_weights'][0, 0] > 0).argmax())
  rows = batch(folder, 'wildchat_gpt4_chat', {'targets': prompt + 2})
  assert (rows['decoder_loss_weights'].sum(axis=-1) > 0).all()
  np.testing.assert_array_equal(rows['decoder_target_tokens'][0, 0], whole['decoder_target_tokens'][0, 0, :prompt + 2])


def test_conversations_can_be_packed(folder):
  rows = batch(folder, 'wildchat_gpt4_chat', {'targets': 512}, pack=True, batch_size=4)
  alone = batch(folder, 'wildchat_gpt4_chat', {'targets': 512}, batch_size=4)
  first = rows['decoder_segment_ids'][0, 0] == 1
  n = int(first.sum())
  for key in ('decoder_target_tokens', 'decoder_loss_weights', 'decoder_input_tokens'):
    np.testing.assert_array_equal(rows[key][0, 0, :n], alone[key][0, 0, :n])
  assert rows['decoder_segment_ids'].max() > 1
  data = DataConfig(mixture_or_task='wildchat_gpt4_chat', task_feature_lengths={'targets': 256}, batch_size=4,
                    num_streams=1, tfds_data_dir=str(folder))
  evaluated = next(data_lib.eval_batches(data, 'wildchat_gpt4_chat'))
  assert (evaluated['decoder_target_tokens'] >= 0).all()
  assert 0 < evaluated['decoder_loss_weights'].sum() < (evaluated['decoder_target_tokens'] > 0).sum()
