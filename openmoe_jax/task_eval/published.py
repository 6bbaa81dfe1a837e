"""Figures of the OpenMoE paper (Xue et al. 2024, arXiv 2402.01739) that results are put beside."""

from typing import Dict, Mapping, NamedTuple, Tuple

# {task of ours: (figure of ours, {model: published figure})}.
_TRIVIA_QA = {'TinyLLaMA-1.1B': 11.2, 'OpenLLaMA-3B': 29.7, 'OpenMoE-8B': 32.7, 'OpenMoE-34B': 31.3}
_HUMAN_EVAL = {'TinyLLaMA-1.1B': 9.1, 'OpenLLaMA-3B': 0., 'OpenMoE-8B': 9.8, 'OpenMoE-34B': 10.3}
_ENGLISH_ROMANIAN = {'TinyLLaMA-1.1B': 2.6, 'OpenLLaMA-3B': 1.9, 'OpenMoE-8B': 3.1, 'OpenMoE-34B': 3.4}
_BOOL_Q = {'TinyLLaMA-1.1B': 57.8, 'OpenLLaMA-3B': 66.0, 'OpenMoE-8B': 61.2}
_ARC_CHALLENGE = {'TinyLLaMA-1.1B': 30.1, 'OpenLLaMA-3B': 34.0, 'OpenMoE-8B': 30.3}

BIGBENCH_LITE = {'BIG-G 8B': 3.77, 'BIG-G-sparse 8B': 4.63, 'GPT-3 6B': 5.40, 'OpenMoE-8B': 6.93}

PUBLISHED: Mapping[str, Tuple[str, Mapping[str, float]]] = {
    'trivia_qa_v010_nocontext': ('em', _TRIVIA_QA),
    'humaneval': ('pass@1', _HUMAN_EVAL),
    'wmt16_enro_v003': ('bleu', _ENGLISH_ROMANIAN),
    'boolq': ('accuracy', _BOOL_Q),
    'arc': ('accuracy', _ARC_CHALLENGE),
    'bigbench_lite': ('normalised', BIGBENCH_LITE),
}

# BIG-bench-Lite with 3 shots, by task (table 14): BIG-G 8B, BIG-G-sparse 8B, GPT-3 6B, OpenMoE-8B.
_BIGBENCH_MODELS = tuple(BIGBENCH_LITE)
_BIGBENCH_TASKS: Mapping[str, Tuple[float, float, float, float]] = {
    'auto_debugging': (0.0, 0.0, 0.0, 17.65), 'bbq_lite_json': (58.63, 46.13, 49.85, 42.67),
    'code_line_description': (4.66, 2.44, 20.18, 2.44), 'conceptual_combinations': (-2.16, 1.07, -3.36, 0.81),
    'conlang_translation': (31.38, 33.25, 37.92, 36.93), 'emoji_movie': (3.75, 7.5, -5.0, 3.75),
    'formal_fallacies_syllogisms_negation': (0.78, -0.39, -0.8, -0.56), 'hindu_knowledge': (12.44, 8.63, 19.29, 16.24),
    'known_unknowns': (-34.78, -4.35, -8.7, -13.04), 'language_identification': (1.39, -0.33, 1.66, 1.77),
    'linguistics_puzzles': (0.0, 0.0, 0.0, 0.05), 'logic_grid_puzzle': (-2.45, 0.01, -0.28, 0.89),
    'logical_deduction': (1.38, 4.2, 1.05, 0.09), 'misconceptions_russian': (-34.69, -38.78, -34.69, -38.78),
    'novel_concepts': (10.16, 14.06, 17.97, 6.25), 'operators': (10.48, 16.67, 20.0, 20.48),
    'parsinlu_reading_comprehension': (0.0, 0.0, 0.0, 11.97), 'play_dialog_same_or_different': (12.5, 4.69, -3.8, 1.1),
    'repeat_copy_logic': (0.0, 6.25, 0.0, 3.12), 'strange_stories': (-7.15, -4.77, 9.54, 14.52),
    'strategyqa': (7.23, 8.4, -3.8, 3.36), 'symbol_interpretation': (6.06, 0.13, 4.17, 2.65),
    'vitaminc_fact_verification': (6.25, 1.27, -3.2, 21.34), 'winowhy': (4.69, 5.27, 11.6, 10.14)}


def bigbench_tasks() -> Dict[str, Dict[str, float]]:
  """{task of BIG-bench-Lite: {model: published normalised score}}."""
  return {task: dict(zip(_BIGBENCH_MODELS, scores)) for task, scores in _BIGBENCH_TASKS.items()}


class PublishedModel(NamedTuple):
  """A point of the paper's figure 3.

  Attributes:
    name: of the model.
    score: BIG-bench-Lite, 3 shots, mean of the 24 normalised scores.
    active: parameters that one token uses, without the vocabulary's matrices.
    total: all parameters.
    tokens: trained on.
  """
  name: str
  score: float
  active: float
  total: float
  tokens: float


# Parameters of the dense models and of BIG-G-sparse's dense part are their names'; those of OpenMoE-8B are counted from
# its checkpoint's shapes, which the paper's own 2.1 B are not.
FIGURE_3: Tuple[PublishedModel, ...] = (
    PublishedModel('BIG-G 8B', BIGBENCH_LITE['BIG-G 8B'], 8e9, 8e9, 131e9),
    PublishedModel('BIG-G-sparse 8B', BIGBENCH_LITE['BIG-G-sparse 8B'], 8e9, 60_261_322_752, 131e9),
    PublishedModel('GPT-3 6B', BIGBENCH_LITE['GPT-3 6B'], 6e9, 6e9, 300e9),
    PublishedModel('OpenMoE-8B', BIGBENCH_LITE['OpenMoE-8B'], 2_751_834_112, 11_855_046_656, 1.1e12))
