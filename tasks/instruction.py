"""Fine-tuning tasks (SPEC section 12): WildChat and Orca as the original had them, and conversations turn by turn.

`wildchat_gpt4_sft` and `orca_sft` score the last answer of a conversation. `wildchat_gpt4_chat` scores every answer in
one row of `targets`: tokens of the user and of the template are context, which is written as negative ids, see
`openmoe_jax.data`.
"""

import functools
from typing import Any, Mapping, Optional

from openmoe_jax import chat as template
from openmoe_jax import vocabulary
from openmoe_jax.config import require
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()


def pairs(dataset: Any, inputs: str, targets: str) -> Any:
  """Text for the features inputs and targets; {field} stands for a field of the record, and nothing else is a brace."""

  def fill(pattern, record):
    parts = []
    for i, piece in enumerate(pattern.replace('}', '{').split('{')):
      parts.append(record[piece] if i % 2 else piece)
    return tf.strings.join(parts)

  return dataset.map(lambda record: {'inputs': fill(inputs, record), 'targets': fill(targets, record)})


@tf.autograph.experimental.do_not_convert
def chat(dataset: Any, sequence_length: Optional[Mapping[str, int]], output_features: Mapping[str, Any]) -> Any:
  """Conversations in the template of the released chat model, with a loss on every answer and the `</s>` behind it.

  The text is tokenized as a whole, exactly as it is at inference; a token belongs to an answer if a byte of it does.

  Args:
    dataset: of {'user': strings [turns], 'assistant': strings [turns]}.
    sequence_length: what does not fit into the length of targets is cut off at the end; conversations of which no
      answer is left are dropped.
    output_features: with targets.

  Returns:
    A data set of {'targets': int32 ids}, negative where there is no loss.
  """
  require(bool(sequence_length) and 'targets' in sequence_length, "chat tasks need the length of 'targets' in "
          'DataConfig.task_feature_lengths')
  length = sequence_length['targets']
  tokenizer = output_features['targets'].vocabulary.tf_tokenizer
  beginning, question, answer = template.prompt('\0').partition('<s>[INST] ')[0], '<s>[INST] ', ' [/INST]'

  def tokens(record):
    turns = tf.stack([tf.strings.join([question, record['user'], answer]),
                      tf.strings.join([' ', record['assistant'], ' ' + template.STOP])], axis=1)
    pieces = tf.concat([[beginning], tf.reshape(turns, [-1])], 0)
    ends = tf.cumsum(tf.strings.length(pieces))
    ids, starts, limits = tokenizer.tokenize_with_offsets(tf.strings.reduce_join(pieces))
    first = tf.searchsorted(ends, tf.cast(starts, tf.int32), side='right')
    last = tf.searchsorted(ends, tf.cast(tf.maximum(limits - 1, starts), tf.int32), side='right')
    is_answer = lambda piece: (piece > 0) & (piece % 2 == 0)
    ids = tf.cast(ids, tf.int32)
    return {'targets': tf.where(is_answer(first) | is_answer(last), ids, -ids)}

  return dataset.map(tokens).filter(lambda example: tf.reduce_any(example['targets'][:length] > 0))


def _features(inputs_eos: bool, targets_eos: bool) -> Mapping[str, Any]:
  return {'inputs': seqio.Feature(vocabulary.shared(), add_eos=inputs_eos),
          'targets': seqio.Feature(vocabulary.shared(), add_eos=targets_eos)}


def _add_pairs(name: str, tfds_name: str, validation: str, inputs: str, targets: str, features: Mapping[str, Any]
               ) -> None:
  if name in seqio.TaskRegistry.names():
    return
  seqio.TaskRegistry.add(
      name, source=seqio.TfdsDataSource(tfds_name, splits={'train': 'train', 'validation': validation}, read_only=True),
      preprocessors=[functools.partial(pairs, inputs=inputs, targets=targets), seqio.preprocessors.tokenize,
                     seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos_after_trim],
      output_features=features)


def register() -> None:
  """Adds the tasks to seqio's registry; those already there stay as they are."""
  # The validation examples are training examples, too, as in the original.
  _add_pairs('wildchat_gpt4_sft', 'wildchat_gpt4_sft:1.0.0', 'train[-128:]', '{input}', '{output}',
             _features(False, False))
  _add_pairs('orca_sft', 'orca:1.0.0', 'train[-2000:]', '{system_prompt}USER: {question}ASSISTANT: ', '{response}',
             _features(False, True))
  if 'wildchat_gpt4_chat' not in seqio.TaskRegistry.names():
    splits = {'train': 'train[:-128]', 'validation': 'train[-128:]'}
    seqio.TaskRegistry.add(
        'wildchat_gpt4_chat', source=seqio.TfdsDataSource('wildchat_gpt4_chat:1.0.0', splits=splits, read_only=True),
        preprocessors=[chat], output_features={'targets': seqio.Feature(vocabulary.shared(), add_eos=False)})


register()
