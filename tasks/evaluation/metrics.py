"""Scores in percent; arguments as seqio passes them, t5's implementations wherever it has one.

t5 is imported on first use, since training registers these tasks too and need not wait for it.
"""

import math
import warnings
from typing import Any, Callable, Dict, Sequence


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Dict[str, float]:
  """`em` and `f1`, each the best over a question's answers, after TriviaQA's normalisation."""
  from t5.evaluation import metrics
  return _floats(metrics.trivia_qa(targets, predictions))


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Dict[str, float]:
  """`accuracy`: how many predictions equal their target."""
  from t5.evaluation import metrics
  return _floats(metrics.accuracy(targets, predictions))


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> Dict[str, float]:
  """`exact_match`: as `accuracy`, for programs, of which many others would be right too."""
  return {'exact_match': accuracy(targets, predictions)['accuracy']}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Dict[str, float]:
  """`bleu` of sacrebleu over the whole corpus, with its international tokenisation."""
  from t5.evaluation import metrics
  return _floats(metrics.bleu(targets, list(predictions)))


def rank_classification(num_classes: int) -> Callable[[Sequence[Any], Sequence[float]], Dict[str, float]]:
  """The metric of tasks of which a question's every possible target is scored.

  A score is the log-likelihood of all target tokens together; it is divided by their number, end of sequence included
  where the task has one, and the best target is the prediction. Gives `accuracy`, a mean `f1` over the classes, and with
  two classes `auc-roc` and `auc-pr` as far as both occur.
  """
  def ranked(targets, scores):
    from t5.evaluation import metrics
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # scikit-learn warns where a class never occurs; such figures are left out.
      return _floats(metrics.rank_classification(targets, scores, num_classes=num_classes,
                                                 normalize_by_target_length=True))
  return ranked


def _floats(scores: Dict[str, Any]) -> Dict[str, float]:
  return {name: float(value) for name, value in scores.items() if math.isfinite(value)}
