"""The table of evaluation tasks (SPEC section 12): names, data, prompts, post-processing, metrics and features."""

from typing import Any, Callable, Mapping, NamedTuple, Optional, Tuple

from openmoe_jax import vocabulary
from openmoe_jax.tasks.evaluation import metrics, postprocessors, prompts, records
from openmoe_jax.tasks.evaluation.sources import RecordSource
from openmoe_jax.tensorflow_setup import import_seqio

seqio = import_seqio()


def _features(inputs_eos: bool, targets_eos: bool) -> Mapping[str, Any]:
  return {'inputs': seqio.Feature(vocabulary.shared(), add_eos=inputs_eos),
          'targets': seqio.Feature(vocabulary.shared(), add_eos=targets_eos)}


V1, V2, V3 = _features(True, True), _features(False, True), _features(False, False)


class EvaluationTask(NamedTuple):
  """What `register` needs to know about a task.

  Attributes:
    data: its data set.
    splits: {split of the task: split of the data set, or a beginning of it}.
    prompt: preprocessors that make `inputs` and `targets` as text.
    postprocess: what seqio applies to predictions and targets, None for nothing.
    metric: (targets, predictions) or (targets, scores) -> dict.
    features: V1, V2 or V3.
    keep: which records are used; None for all.
    append_eos: whether examples end as the features say, or never.
  """
  data: records.Dataset
  splits: Mapping[str, str]
  prompt: Tuple[prompts.Preprocessor, ...]
  postprocess: Optional[Callable[..., Any]]
  metric: Callable[..., Mapping[str, float]]
  features: Mapping[str, Any]
  keep: Optional[Callable[[Mapping[str, Any]], Any]] = None
  append_eos: bool = True


def _validation(split: str) -> Mapping[str, str]:
  return {'validation': split}


def _trivia_qa(prompt: str, split: str, features: Mapping[str, Any], postprocess: Callable[..., Any],
               append_eos: bool = True) -> EvaluationTask:
  return EvaluationTask(records.TRIVIA_QA, _validation(split),
                        (prompts.all_answers, prompts.generation(prompt, 'value', ['answers'])), postprocess,
                        metrics.trivia_qa, features, append_eos=append_eos)


def _mmlu(split: str, features: Mapping[str, Any], *prompt: prompts.Preprocessor) -> EvaluationTask:
  return EvaluationTask(records.MMLU, _validation(split), prompt, postprocessors.first_letter, metrics.accuracy,
                        features)


def _lambada(prompt: str, split: str, features: Mapping[str, Any], postprocess: Callable[..., Any]) -> EvaluationTask:
  return EvaluationTask(records.LAMBADA, _validation(split), (prompts.last_word, prompts.generation(prompt, 'word')),
                        postprocess, metrics.accuracy, features)


def _human_eval(prompt: str, features: Mapping[str, Any]) -> EvaluationTask:
  # The other fields are for whoever runs the programs: pass@k is the score that counts.
  return EvaluationTask(records.HUMAN_EVAL, _validation('train'),
                        (prompts.generation(prompt, 'canonical_solution', records.HUMAN_EVAL_FIELDS),),
                        postprocessors.after_sentinel, metrics.exact_match, features)


def _bool_q(prompt: str, targets: Tuple[str, str], features: Mapping[str, Any]) -> EvaluationTask:
  return EvaluationTask(records.BOOL_Q, _validation('validation'), (prompts.ranking(prompt, targets, 'answer'),),
                        postprocessors.ranked, metrics.rank_classification(2), features)


def _arc(data: records.Dataset, split: str, prompt: str, target: str, features: Mapping[str, Any]) -> EvaluationTask:
  targets = [target.format(letter) for letter in 'ABCD']
  return EvaluationTask(data, _validation(split), (prompts.lettered, prompts.ranking(prompt, targets, 'label')),
                        postprocessors.ranked, metrics.rank_classification(4), features, keep=prompts.four_options)


TASKS = {
    'trivia_qa_v010_nocontext': _trivia_qa(
        prompts.TRIVIA_QA, 'validation', V2, postprocessors.short_answer, append_eos=False),
    'ul2_trivia_qa_v010_nocontext': _trivia_qa(prompts.UL2_TRIVIA_QA, 'validation', V1, postprocessors.all_answers),
    'trivia_qa_v010_nocontext_oneshot': _trivia_qa(prompts.ONE_SHOT, 'validation[:256]', V1, postprocessors.all_answers),
    'trivia_qa_v010_nocontext_fewshot': _trivia_qa(prompts.FEW_SHOT, 'validation[:256]', V1, postprocessors.all_answers),
    'sft_trivia_qa_v010_nocontext': _trivia_qa(
        prompts.SFT_TRIVIA_QA, 'validation[:128]', V2, postprocessors.short_answer, append_eos=False),
    'mmlu': _mmlu('train[:128]', V2, prompts.generation(prompts.MMLU, 'answer')),
    'ul2_mmlu': _mmlu('train', V1, prompts.generation(prompts.MMLU, 'answer')),
    'sft_mmlu': _mmlu('train[:128]', V2, prompts.last_question, prompts.generation(prompts.SFT_MMLU, 'answer')),
    'lambada': _lambada(prompts.LAMBADA, 'test', V2, postprocessors.first_word),
    'ul2_lambada': _lambada(prompts.UL2_LAMBADA, 'test[:32]', V1, postprocessors.first_word_after_sentinel),
    'humaneval': _human_eval(prompts.HUMAN_EVAL, V2),
    'ul2_humaneval': _human_eval(prompts.UL2_HUMAN_EVAL, V1),
    'boolq': _bool_q(prompts.BOOL_Q, (' no', ' yes'), V3),
    'ul2_boolq': _bool_q(prompts.UL2_BOOL_Q, ('no', 'yes'), V1),
    'arc': _arc(records.ARC_CHALLENGE, 'test', prompts.ARC, ' {}', V2),
    'ul2_arc': _arc(records.ARC_EASY, 'test[:32]', prompts.UL2_ARC, '<extra_id_0> {}', V1),
    'wmt16_enro_v003': EvaluationTask(
        records.WMT16_EN_RO, {split: split for split in ('train', 'validation', 'test')},
        (prompts.generation(prompts.WMT16_EN_RO, 'ro'),), None, metrics.bleu, V1),
}


def register() -> None:
  """Adds the tasks to seqio's registry; those already there stay as they are."""
  for name, task in TASKS.items():
    if name not in seqio.TaskRegistry.names():
      preprocessors = [*task.prompt, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()]
      seqio.TaskRegistry.add(
          name, source=RecordSource(name, task.data, task.splits, task.keep),
          preprocessors=preprocessors + ([seqio.preprocessors.append_eos] if task.append_eos else []),
          output_features=task.features, postprocess_fn=task.postprocess, metric_fns=[task.metric])
