"""From records to texts: the prompts of the original's evaluation tasks (SPEC section 12), letter by letter.

A prompt is a preprocessor, tf.data.Dataset -> tf.data.Dataset. Curly brackets in its template are fields of the record.
"""

import re
from typing import Any, Callable, Mapping, Sequence

from openmoe_jax.tensorflow_setup import import_tensorflow

tf = import_tensorflow()

Preprocessor = Callable[[Any], Any]

TRIVIA_QA = 'Answer the following trivia question:\nQuestion: {question}Answer:'
SFT_TRIVIA_QA = 'USER: Answer the following trivia question:\nQuestion: {question}Answer: ASSISTANT: '
UL2_TRIVIA_QA = '[NLU] Question: {question} Answer: <extra_id_0>'
ONE_SHOT = ('[NLU] Question: Which American-born Sinclair won the Nobel Prize for Literature in 1930?\n'
            'Answer: sinclair lewis.\n\nQuestion: {question}\nAnswer: <extra_id_0> .')
# Not every answer is right; they are the original's.
FEW_SHOT = ('[NLU] '
            'Question: Which American-born Sinclair won the Nobel Prize for Literature in 1930?\nAnswer: sinclair lewis.\n'
            'Question: Which branch of medicine is concerned with disorders of the blood?\nAnswer: Automated hematology.\n'
            'Question: What are the international registration letters of a vehicle from Turkey?\nAnswer: T.R.\n'
            'Question: Which musical featured the song Flash Bang, Wallop?\nAnswer: One-half.\n'
            'Question: Neil Armstrong was a pilot in which war?\nAnswer: Korean.\n'
            'Question: {question}\nAnswer: <extra_id_0>')
MMLU = '{prompt}'
SFT_MMLU = 'USER: Answer the following question:\n{question}\nChoose your answer from:{options}\nASSISTANT: '
LAMBADA = '{beginning}'
UL2_LAMBADA = '[NLU] {beginning} <extra_id_0>'
HUMAN_EVAL = 'Complete the following Python code without any tests or explanation\n{prompt}'
UL2_HUMAN_EVAL = f'[S2S] {HUMAN_EVAL} <extra_id_0>'
BOOL_Q = '{passage}\n\nQuestion: {question}? Tell me yes or no? \n\nAnswer:'
UL2_BOOL_Q = '[NLU] {passage}\n\nQuestion: {question}?\n\nOPTIONS:\n- no\n- yes\n\nAnswer: <extra_id_0>'
ARC = 'Question: {question}\n\nOptions:{options}\n\nAnswer:'
UL2_ARC = f'[NLU] {ARC} <extra_id_0>'
WMT16_EN_RO = 'translate English to Romanian: {en}'


def fill(template: str, record: Mapping[str, Any]) -> Any:
  """The template, a scalar string tensor, with the record's texts in place of its fields."""
  pieces = re.split(r'\{(\w+)\}', template)
  return tf.strings.join([record[piece] if i % 2 else piece for i, piece in enumerate(pieces)])


def generation(inputs: str, targets: str, keep: Sequence[str] = ()) -> Preprocessor:
  """One example a record: template `inputs`, field `targets`, and the fields `keep` for post-processing."""
  def preprocess(dataset):
    return dataset.map(lambda record: {'inputs': fill(inputs, record), 'targets': record[targets],
                                       **{name: record[name] for name in keep}})
  return preprocess


def ranking(inputs: str, targets: Sequence[str], label: str) -> Preprocessor:
  """One example for each possible target, to be scored; `label` is the field that holds the number of the right one.

  Examples carry idx [number of the record, number of the target] and is_correct, for t5's rank classification.
  """
  def preprocess(dataset):
    from t5.data import preprocessors  # Takes seconds, which training has no need to spend.
    return preprocessors.rank_classification(
        dataset, inputs_fn=lambda record: tf.fill([len(targets)], fill(inputs, record)),
        targets_fn=lambda record: tf.constant(list(targets)),
        is_correct_fn=lambda record: tf.equal(tf.range(len(targets)), tf.cast(record[label], tf.int32)))
  return preprocess


def all_answers(dataset: Any) -> Any:
  """Adds what counts as right for TriviaQA: the answer itself and its aliases."""
  return dataset.map(lambda record: {**record, 'answers': tf.concat([[record['value']], record['aliases']], 0)})


def last_word(dataset: Any) -> Any:
  """Divides a passage into its last word and its `beginning`, without the space between them."""
  def divide(record):
    passage = tf.strings.strip(record['passage'])
    word = tf.strings.split(passage, sep=' ')[-1]
    return {'word': word,
            'beginning': tf.strings.substr(passage, 0, tf.strings.length(passage) - tf.strings.length(word) - 1)}
  return dataset.map(divide)


def last_question(dataset: Any) -> Any:
  """Takes the last block of an MMLU prompt, up to its 'Answer', apart: first line `question`, the others `options`."""
  def divide(record):
    block = tf.strings.split(record['prompt'], sep='\n\n')[-1]
    lines = tf.strings.split(tf.strings.split(block, sep='\nAnswer')[0], sep='\n')
    return {'question': lines[0], 'options': tf.strings.reduce_join(lines[1:], separator='\n'),
            'answer': record['answer']}
  return dataset.map(divide)


def four_options(record: Mapping[str, Any]) -> Any:
  """Whether a question has as many options as the prompt has letters."""
  return tf.equal(tf.size(record['options']), 4)


def lettered(dataset: Any) -> Any:
  """Puts four options into one text, a line each: '\\n(A): first\\n(B): second' and so on."""
  def join(record):
    letters = tf.constant([f'\n({letter}): ' for letter in 'ABCD'])
    return {**record, 'options': tf.strings.reduce_join(tf.strings.join([letters, record['options']]))}
  return dataset.map(join)
