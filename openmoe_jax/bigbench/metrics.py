"""The metrics of BIG-bench's JSON tasks, on the scale of its published results: percent wherever there is one.

They follow the benchmark's program, except that ROUGE is the plain mean over questions, of which the benchmark takes
the median over bootstrap samples without a seed (so that its figure changes in the second digit from run to run), that
a numeric answer's error is relative to the target's size, not its signed value, and that BLEURT, which needs a model of
its own and is no metric of BIG-bench-Lite, is missing.
"""

import hashlib
from typing import Callable, Dict, NamedTuple, Sequence, Tuple

import numpy as np

# Log-likelihoods below count as this, so that a choice that cannot be generated needs no special case.
LOWEST = -1e30
CALIBRATION_BUCKETS = 15
ROUGE = ('rouge1', 'rouge2', 'rougeLsum')

Figures = Dict[str, float]


class Metric(NamedTuple):
  """A metric by which a part may ask to be measured.

  Attributes:
    kind: what it needs of a model: 'choice' log-likelihoods of choices, 'text' generated answers, 'likelihood'
      log-likelihoods of the targets.
    figures: names of what it gives.
  """
  kind: str
  figures: Tuple[str, ...]


METRICS: Dict[str, Metric] = {
    # The calibration figures come along with the grade.
    'multiple_choice_grade': Metric('choice', ('multiple_choice_grade', 'calibration_multiple_choice_brier_score',
                                               'expected_calibration_error')),
    'calibration_multiple_choice_brier_score': Metric('choice', ('calibration_multiple_choice_brier_score',)),
    'expected_calibration_error': Metric('choice', ('expected_calibration_error',)),
    'weighted_log_probabilities': Metric('choice', ('weighted_log_probabilities',)),
    'weighted_probabilities': Metric('choice', ('weighted_probabilities',)),
    'macro_f1': Metric('choice', ('macro_f1',)),
    'exact_str_match': Metric('text', ('exact_str_match',)),
    'case_insensitive_str_match': Metric('text', ('case_insensitive_str_match',)),
    'sequence_f1': Metric('text', ('sequence_f1',)),
    'numeric_match_with_0_1_relative_error': Metric('text', ('numeric_match_with_0_1_relative_error',)),
    'bleu': Metric('text', ('bleu',)),
    'rouge': Metric('text', ROUGE),
    'log_likelihood': Metric('likelihood', ('log_likelihood', 'log_likelihood_per_word', 'log_likelihood_per_char')),
}
# Figures that may be a part's preferred score: (value at 0 normalised, value at 100). Guessing replaces the 0 of
# 'multiple_choice_grade'. The calibration figures are better the smaller they are; the benchmark ranks none by them.
RANGES: Dict[str, Tuple[float, float]] = {
    **{figure: (0., 100.) for metric in METRICS.values() for figure in metric.figures},
    'weighted_log_probabilities': (-10., 0.), 'weighted_probabilities': (-1., 1.), 'log_likelihood': (-10., 0.)}
del RANGES['log_likelihood_per_word'], RANGES['log_likelihood_per_char']


class Choice(NamedTuple):
  """A multiple-choice question with a model's answer; arrays have one entry per choice.

  Attributes:
    texts: the choices.
    worth: their scores.
    absolute: log-likelihoods of the choices, natural, summed over tokens.
    likelihoods: what the choice is made by: `absolute`, or the same made to sum to 1 over the choices.
  """
  texts: Sequence[str]
  worth: np.ndarray
  absolute: np.ndarray
  likelihoods: np.ndarray

  @classmethod
  def create(cls, texts: Sequence[str], worth: Sequence[float], log_likelihoods: Sequence[float], absolute: bool = False
             ) -> 'Choice':
    """Raises ValueError unless there is one number per choice."""
    values = np.asarray(log_likelihoods, np.float64)
    if values.shape != (len(texts),) or not np.all(values < np.inf):  # Catches NaN too.
      raise ValueError(f'{len(texts)} choices need as many log-likelihoods, got {list(log_likelihoods)!r}')
    values = np.maximum(values, LOWEST)
    return cls(texts, np.asarray(worth, np.float64), values, values if absolute else values - _log_sum(values))

  @property
  def picked(self) -> int:
    """Number of the most likely choice. A hash of the log-likelihoods breaks ties, so that no place is favoured."""
    best = np.flatnonzero(self.likelihoods == self.likelihoods.max())
    return int(best[int(hashlib.sha256(self.likelihoods.tobytes()).hexdigest(), 16) % len(best)])

  @property
  def probabilities(self) -> np.ndarray:
    """Of the choices, with sum 1."""
    return np.exp(self.likelihoods - _log_sum(self.likelihoods))

  @property
  def target_probabilities(self) -> np.ndarray:
    """The scores, made to sum to 1 if they do not sum to 0."""
    total = self.worth.sum()
    return self.worth / total if total else np.zeros_like(self.worth)


def choice_figures(names: Sequence[str], questions: Sequence[Choice]) -> Figures:
  """Figures of the metrics in `names` that are about multiple choice."""
  figures = [figure for name in names if METRICS[name].kind == 'choice' for figure in METRICS[name].figures]
  return {figure: float(CHOICE_FIGURES[figure](questions)) for figure in dict.fromkeys(figures)}


def grade(questions: Sequence[Choice]) -> float:
  """Mean score of the most likely choices, in percent."""
  return 100 * np.mean([question.worth[question.picked] for question in questions])


def brier_score(questions: Sequence[Choice]) -> float:
  """Expected squared error of the choices' probabilities (Brier 1950), mean over all choices, in percent."""
  errors = []
  for question in questions:
    targets, given = question.target_probabilities, question.probabilities
    errors.append(targets * (1 - given) ** 2 + (1 - targets) * given ** 2)
  return 100 * np.mean(np.concatenate(errors))


def calibration_error(questions: Sequence[Choice]) -> float:
  """|accuracy - confidence| by buckets of confidence, weighted by their questions (Naeini et al. 2015), in percent."""
  given = [question.probabilities for question in questions]
  confidence = np.array([values.max() for values in given])
  right = np.array([values.argmax() == question.target_probabilities.argmax()
                    for values, question in zip(given, questions)], np.float64)
  edges = np.arange(1, CALIBRATION_BUCKETS) / CALIBRATION_BUCKETS
  buckets = np.searchsorted(edges, confidence, side='right')
  gaps = [abs(np.sum(right[buckets == bucket] - confidence[buckets == bucket])) for bucket in np.unique(buckets)]
  return 100 * sum(gaps) / len(questions)


def weighted_log_probabilities(questions: Sequence[Choice]) -> float:
  """Mean of sum(score * log-likelihood), in nats."""
  return np.mean([question.worth @ question.absolute for question in questions])


def weighted_probabilities(questions: Sequence[Choice]) -> float:
  """Mean of sum(score * likelihood)."""
  return np.mean([question.worth @ np.exp(question.absolute) for question in questions])


def macro_f1(questions: Sequence[Choice]) -> float:
  """F1 with the choices' texts as classes, mean over classes, in percent; every question has one right choice.

  Raises:
    ValueError: a question has more than one right choice or a partly right one.
  """
  from sklearn.metrics import f1_score
  if any(np.count_nonzero(question.worth) != 1 or question.worth.max() != 1 for question in questions):
    raise ValueError('macro_f1 needs exactly one choice of score 1 per question and 0 for the others')
  return 100 * f1_score([question.texts[int(question.worth.argmax())] for question in questions],
                        [question.texts[question.picked] for question in questions], average='macro')


CHOICE_FIGURES: Dict[str, Callable[[Sequence[Choice]], float]] = {
    'multiple_choice_grade': grade, 'calibration_multiple_choice_brier_score': brier_score,
    'expected_calibration_error': calibration_error, 'weighted_log_probabilities': weighted_log_probabilities,
    'weighted_probabilities': weighted_probabilities, 'macro_f1': macro_f1}


def text_figures(names: Sequence[str], targets: Sequence[Sequence[str]], answers: Sequence[str]) -> Figures:
  """Figures of the metrics in `names` that are about generated answers.

  Args:
    targets: the right answers of each question.
    answers: what was generated, after `requests.answer`.
  """
  figures = {}
  for name in names:
    if name in TEXT_FIGURES:
      found = TEXT_FIGURES[name](targets, answers)
      figures.update({key: float(value) for key, value in (found if name == 'rouge' else {name: found}).items()})
  return figures


def exact_match(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> float:
  """Answers equal to one of their targets, in percent."""
  return 100 * np.mean([answer in right for right, answer in zip(targets, answers)])


def case_insensitive_match(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> float:
  """As `exact_match`, in lower case and without white space at the ends."""
  return exact_match([[text.strip().lower() for text in right] for right in targets],
                     [answer.strip().lower() for answer in answers])


def sequence_f1(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> float:
  """Space-separated labels equal to the first target's, mean per question, in percent; missing ones count as 'O'."""
  shares = []
  for right, answer in zip(targets, answers):
    wanted, got = right[0].split(' '), answer.split(' ')
    got += ['O'] * (len(wanted) - len(got))
    shares.append(np.mean([a == b for a, b in zip(wanted, got)]))
  return 100 * np.mean(shares)


def numeric_match(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> float:
  """Answers within a tenth of the first target's size (within 0.1 if it is 0), in percent."""
  def close(target, answer):
    try:
      wanted, got = float(target), float(answer)
    except ValueError:
      return False
    return abs(got - wanted) / (abs(wanted) or 1) <= 0.1
  return 100 * np.mean([close(right[0], answer) for right, answer in zip(targets, answers)])


def bleu(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> float:
  """sacrebleu over all answers, international tokenisation; a question with fewer targets repeats its first."""
  import sacrebleu
  most = max(map(len, targets))
  references = [[right[i] if i < len(right) else right[0] for right in targets] for i in range(most)]
  return sacrebleu.corpus_bleu(list(answers), references, tokenize='intl').score


def rouge(targets: Sequence[Sequence[str]], answers: Sequence[str]) -> Figures:
  """Mean over questions of the best F-measure over a question's targets (Lin 2004), for each of `ROUGE`, in percent.

  Only Latin letters and digits count: rouge_score's tokenizer drops everything else.
  """
  from rouge_score import rouge_scorer
  scorer = rouge_scorer.RougeScorer(ROUGE)
  best = []
  for right, answer in zip(targets, answers):
    scores = [scorer.score(_sentences(target), _sentences(answer)) for target in right]
    best.append([max(score[kind].fmeasure for score in scores) for kind in ROUGE])
  return dict(zip(ROUGE, 100 * np.mean(best, axis=0)))


def _sentences(text: str) -> str:
  """Line breaks behind the sentences of tokenised text, by which rougeLsum takes a text apart."""
  return text.replace(' . ', ' .\n')


TEXT_FIGURES: Dict[str, Callable] = {
    'exact_str_match': exact_match, 'case_insensitive_str_match': case_insensitive_match, 'sequence_f1': sequence_f1,
    'numeric_match_with_0_1_relative_error': numeric_match, 'bleu': bleu, 'rouge': rouge}


def likelihood_figures(targets: Sequence[Sequence[str]], log_likelihoods: Sequence[Sequence[float]]) -> Figures:
  """Mean log-likelihood of the right answers in nats, all targets of a question together.

  Where every question has one target also per word and per character.

  Raises:
    ValueError: not one number per target.
  """
  rows = [Choice.create(right, np.ones(len(right)), values).absolute for right, values in zip(targets, log_likelihoods)]
  figures = {'log_likelihood': float(np.mean([_log_sum(row) for row in rows]))}
  if all(len(right) == 1 for right in targets):
    figures['log_likelihood_per_word'] = float(np.mean(
        [row[0] / max(1, len(right[0].split())) for row, right in zip(rows, targets)]))
    figures['log_likelihood_per_char'] = float(np.mean(
        [row[0] / max(1, len(right[0])) for row, right in zip(rows, targets)]))
  return figures


def _log_sum(values: np.ndarray) -> float:
  """log(sum(exp(values)))."""
  peak = values.max()
  return peak + np.log(np.sum(np.exp(values - peak)))
