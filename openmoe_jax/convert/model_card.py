"""README.md of an exported model: what it is, how it was trained, how to load it, and what to mind."""

import json
import re
from typing import Any, Dict, List, Mapping, Tuple

from openmoe_jax.analysis.parameters import count_parameters
from openmoe_jax.config import ModelConfig

_CITATION = '''@article{xue2024openmoe,
  title = {OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models},
  author = {Xue, Fuzhao and Zheng, Zian and Fu, Yao and Ni, Jinjie and Zheng, Zangwei and Zhou, Wangchunshu and
            You, Yang},
  journal = {arXiv preprint arXiv:2402.01739},
  year = {2024}
}'''

_LOAD = '''from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)  # '.': the folder of this file'''

_GENERATE = '''from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '.'  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer('Once upon a time', return_tensors='pt')
outputs = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))'''

_CHAT = '''messages = [{'role': 'user', 'content': 'What is a mixture of experts?'}]
inputs = tokenizer.apply_chat_template(messages, return_tensors='pt', return_dict=True)'''


def model_card(model: ModelConfig, run: Mapping[str, Any], step: int, source: str = '', *, weights: str = '',
               tokenizer: bool = False, chat: bool = False, license: str = '', capacity_mode: str = 'none') -> str:
  """The text of README.md, with the front matter that the Hugging Face hub reads.

  Local paths among the settings are cut to their last part: where something lay says nothing to anybody else.

  Args:
    model: what is exported.
    run: the configuration of its training, as the dictionary of config.json; {} where nobody knows.
    step: training steps done; 0 where nobody knows.
    source: where the weights come from: a path, an address, a name.
    weights: how they are stored, such as 'bfloat16'.
    tokenizer: the folder has the tokenizer's files.
    chat: they have a chat template.
    license: identifier of a licence; '' states none.
    capacity_mode: of the exported config.json.
  """
  name = 'OpenMoE' if model.num_sparse_layers else 'dense OpenMoE'
  counts = count_parameters(model)
  lines = _front_matter(bool(model.num_sparse_layers), license)
  lines += [f'# {_billions(counts.total)} {name} language model', '', _summary(model), '']
  lines += _table(_facts(model, run, step, source, weights, license))
  lines += ['', '## Use', '', '```python', _GENERATE if tokenizer else _LOAD, '```', '']
  if tokenizer and chat:
    lines += ['For a conversation:', '', '```python', _CHAT, '```', '']
  lines += ['`trust_remote_code` lets transformers run the Python files of this folder, which are the model' +
            (' and the tokenizer' if tokenizer else '') + '.', '']
  lines += _start_rule(tokenizer)
  if model.num_sparse_layers:
    lines += ['', '## Full experts', '', *_capacity(model, capacity_mode)]
  settings = _settings(run)
  if settings:
    lines += ['', '## Settings of the training run', '', 'The settings of the model are in config.json.', '',
              *_table(settings)]
  return '\n'.join(lines + ['', '## Citation', '', '```bibtex', _CITATION, '```', ''])


def _front_matter(sparse: bool, license: str) -> List[str]:
  tags = ['openmoe', *(['mixture-of-experts'] if sparse else []), 'custom_code']
  return ['---', 'library_name: transformers', 'pipeline_tag: text-generation',
          *([f'license: {json.dumps(license)}'] if license else []), 'tags:', *(f'- {tag}' for tag in tags), '---', '']


def _summary(model: ModelConfig) -> str:
  kind = (f'{model.num_sparse_layers} of its {model.num_layers} layers hold {model.num_experts} experts each, of which '
          f'every token uses {model.num_selected_experts}' if model.num_sparse_layers else
          f'all of its {model.num_layers} layers are dense')
  return (f'A decoder-only language model of the architecture of OpenMoE (arXiv 2402.01739): {kind}. It was trained '
          'to predict text; nothing filters what it writes. The files of this folder were written by openmoe_jax.')


def _facts(model: ModelConfig, run: Mapping[str, Any], step: int, source: str, weights: str,
           license: str) -> List[Tuple[str, str]]:
  counts = count_parameters(model)
  data, checkpoint = _section(run, 'data'), _section(run, 'checkpoint')
  facts = [('parameters', f'{counts.total:,}')]
  if model.num_sparse_layers:
    facts.append(('activated by one token', f'{counts.active:,}'))
  facts += [('without the two vocabulary matrices',
             f'{counts.total - 2 * counts.parts["output matrix"]:,}' +
             (f', activated {counts.active_without_embeddings:,}' if model.num_sparse_layers else '')),
            ('width, layers, heads', f'{model.emb_dim}, {model.num_layers}, {model.num_heads} of {model.head_dim}'),
            ('hidden width of feed-forward networks', f'{model.mlp_dim}, gate {" x ".join(model.mlp_activations)}'),
            ('rows of the vocabulary matrices', f'{model.vocab_size:,}')]
  if step:
    facts.append(('training steps', f'{step:,}'))
  tokens = _tokens(run, step)
  if tokens:
    facts.append(('training tokens', f'{tokens:,} ({_billions(tokens)}), padding included'))
  if checkpoint.get('initial_checkpoint_path'):
    facts.append(('training began from', _code(checkpoint['initial_checkpoint_path'])))
  if data.get('mixture_or_task'):
    facts.append(('training data', f'the mixture {_code(data["mixture_or_task"])}'))
  if 'vocabulary' in data:
    path = data['vocabulary']
    facts.append(('vocabulary', (f'sentencepiece model {_code(path)}' if path else 'the small one of openmoe_jax') +
                  f' and {_code(data.get("extra_ids", 0))} sentinels'))
  if weights:
    facts.append(('stored as', weights))
  if source:
    facts.append(('converted from', _code(source)))
  return facts + [('licence', license or 'not stated')]


def _tokens(run: Mapping[str, Any], step: int) -> int:
  """Positions seen in training; 0 where other settings than those known may have held for some of the steps."""
  data = _section(run, 'data')
  lengths, rows = data.get('task_feature_lengths'), data.get('batch_size')
  if not isinstance(lengths, Mapping) or _section(run, 'checkpoint').get('initial_checkpoint_path'):
    return 0
  if not all(isinstance(number, int) for number in (rows, *lengths.values())):
    return 0
  return step * rows * sum(lengths.values())


def _start_rule(tokenizer: bool) -> List[str]:
  rule = ('Every sequence starts with id 0, which is also the padding id: it has to stand in front of the first token '
          'with attention mask 1, and padding (attention mask 0) goes to the left of it. No end-of-sequence id follows '
          'a prompt.')
  if tokenizer:
    rule += (' The tokenizer does this by itself; with `add_special_tokens=False` it does not. In a text, a '
             'written-out `</s>` is text, and `<extra_id_0>` behind a space is the sentinel: ids are those of '
             'training.')
  return [rule]


def _capacity(model: ModelConfig, capacity_mode: str) -> List[str]:
  trained = {'t5x': f'took about {model.train_capacity_factor:g} / {model.num_experts} of the tokens of a group of up '
                    f'to {model.group_size} at most, and the others passed it by',
             'colossalai': f'took about {model.num_selected_experts} * {model.train_capacity_factor:g} / '
                           f'{model.num_experts} of the tokens of a batch at most, and the others passed it by',
             'none': 'took every token that asked for it'}[model.capacity_mode]
  here = ("no token is ever dropped, so that a sequence's result depends on the rest of the batch by rounding only"
          if capacity_mode == 'none' else 'tokens that find their expert full pass it by')
  return [f'In training an expert {trained}. `capacity_mode` in config.json says what happens here; it is '
          f'`{capacity_mode}`: {here}. Valid are `none`, `t5x` (the rule of the original training program, with '
          f'capacity factor {model.eval_capacity_factor:g}) and `colossalai` (that of the first PyTorch version).']


def _settings(run: Mapping[str, Any]) -> List[Tuple[str, str]]:
  flat: Dict[str, Any] = {}

  def add(prefix: str, value: Any) -> None:
    if isinstance(value, Mapping) and value:
      for key, part in value.items():
        add(f'{prefix}.{key}' if prefix else str(key), part)
    elif prefix:
      flat[prefix] = value

  add('', {key: value for key, value in run.items() if key not in ('model', 'model_dir')})
  return [(_code(name), _code(value)) for name, value in flat.items()]


def _section(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  section = run.get(name)
  return section if isinstance(section, Mapping) else {}


def _portable(value: Any) -> Any:
  """Without the folders of absolute local paths."""
  if isinstance(value, (list, tuple)):
    return [_portable(part) for part in value]
  if isinstance(value, str) and re.match(r'(/|~|file:|[A-Za-z]:[\\/]|\\\\)', value):
    return re.split(r'[\\/]', value.rstrip('\\/'))[-1]
  return value


def _code(value: Any) -> str:
  """A setting in a cell of a table; a bar would end the cell, a backtick the code."""
  value = _portable(value)
  text = value if isinstance(value, str) and value.strip() else json.dumps(value, default=str)
  return '`' + ' '.join(text.replace('`', "'").replace('|', '\\|').split()) + '`'


def _table(rows: List[Tuple[str, str]]) -> List[str]:
  return ['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows)]


def _billions(number: int) -> str:
  for unit, letter in ((10**12, 'T'), (10**9, 'B'), (10**6, 'M')):
    if number >= unit:
      return f'{number / unit:.3g}{letter}'
  return str(number)
