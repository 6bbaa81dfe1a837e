"""What the paper proposes against its router's weaknesses, compared at the size of the demo model.

  python -m openmoe_jax.tools.router_study --output=runs/router_study          # or: make router-study
  python -m openmoe_jax.tools.router_study --output=runs/router_study --seeds=0,1,2,3,4,5   # more seeds, later

Every variant (`router_variants`) is trained with every seed on the same number of tokens. A seed decides initialisation
and order of the data and is the same for all variants: what is reported is the difference to the default within seeds,
with 95 % intervals over seeds (Student's t). A stopped study goes on with the same command; what is lost is the
training of one variant with one seed.
"""

import argparse
import csv
import functools
import io
import itertools
import json
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import command_line, data as data_lib, decoding, mt_bench, paths, scoring
from openmoe_jax.analysis import drop_statistics, plots, routing_statistics, seeds as seeds_lib
from openmoe_jax.attention import make_logit_mask
from openmoe_jax.bar import Bar
from openmoe_jax.config import ModelConfig, RunConfig, require, to_dict
from openmoe_jax.model import OpenMoE
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.routers.groups import group_tokens, ungroup
from openmoe_jax.tools import router_speed
from openmoe_jax.tools.bench_timing import cpu_seconds
from openmoe_jax.tools.freeze_router import make_table
from openmoe_jax.tools.router_variants import BASELINE, DOMAINS, Settings, Texts, VARIANTS, model_of
from openmoe_jax.train_state import TrainState, init_params, init_train_state
from openmoe_jax.train_step import make_train_step, random_keys

Result = Dict[str, Any]
_FREEZING_BATCHES = 50
LOSSES = {'loss_in': 'loss in domain', 'loss_out': 'out of domain', 'loss_conversations': 'conversations'}
TABLES = {
    'Validation loss, every choice served': LOSSES,
    'Validation loss with the capacity of evaluation': {f'{name}_eval': title for name, title in LOSSES.items()},
    'Routing in domain': {'drop': 'dropped in training', 'drop_slope': 'rise along the row', 'load_cv': 'CV of loads',
                          'kappa': 'stability (kappa)'},
}
SPEED = {'cpu_seconds': 'CPU-seconds a step', 'seconds': 'seconds a step', 'mflops': 'training MFLOPs a token'}


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  flags = command_line.Parser(prog='router_study', description=__doc__)
  flags.add_argument('--output', default='runs/router_study', help='results and pictures (%(default)s)')
  flags.add_argument('--variants', default=','.join(VARIANTS), help='names, by commas; default: %(default)s')
  flags.add_argument('--seeds', default='0,1,2', help='numbers, by commas (%(default)s)')
  flags.add_argument('--steps', type=int, default=300, help='training steps (%(default)s)')
  flags.add_argument('--warmup', type=int, help='steps before routing is frozen, or conversations end; default: a '
                     'quarter')
  flags.add_argument('--domains', default=','.join(DOMAINS), help='out of domain, as far as this machine has them '
                     '(%(default)s)')
  flags.add_argument('--batches', type=int, default=16, help='of validation, per source (%(default)s)')
  flags.add_argument('--mt_bench', metavar='FILE', help="MT-Bench's question.jsonl: further conversations")
  flags.add_argument('--speed_rounds', type=int, default=20, help='in which every variant makes a few timed steps; 0 '
                     'for none (%(default)s)')
  args = flags.parse_args(argv)
  run = _run_config(args)
  results, speed = study(run, settings_of(args))
  for file in write_report(args.output, results, speed):
    print(f'wrote {file}')
  print('\n' + '\n'.join(report(results, speed)))


def settings_of(args: argparse.Namespace) -> Settings:
  """Checked flags; raises `ConfigError`."""
  names = command_line.names(args.variants)
  for name in names:
    require(name in VARIANTS, f'--variants: {name!r} is not known; valid: {", ".join(VARIANTS)}')
  numbers = [seed.strip() for seed in args.seeds.split(',')]
  require(all(seed.isdecimal() for seed in numbers) and len(set(numbers)) == len(numbers), f'--seeds={args.seeds} must '
          'be different whole numbers, such as 0,1,2')
  require(args.steps >= 4, f'--steps={args.steps} must be at least 4')
  require(args.batches >= 2, f'--batches={args.batches} must be at least 2')
  warmup = args.steps // 4 if args.warmup is None else args.warmup
  require(0 < warmup < args.steps, f'--warmup={warmup} must be at least 1 and less than --steps={args.steps}')
  require(args.speed_rounds >= 0, f'--speed_rounds={args.speed_rounds} must not be negative')
  if args.mt_bench:
    mt_bench.read_questions(args.mt_bench)
  return Settings(tuple(names), tuple(map(int, numbers)), args.steps, warmup,
                  tuple(command_line.names(args.domains)), args.batches, args.mt_bench or '',
                  args.speed_rounds)


def _run_config(args: argparse.Namespace) -> RunConfig:
  """The recipe, cut to the steps: the warm-up of the learning rate keeps the demo's share of a twentieth."""
  args.gin_file = args.gin_file or ['recipes/demo.gin']
  args.model_dir = args.output
  args.gin_bindings = [f'TRAIN_STEPS={args.steps}', f'OptimizerConfig.warmup_steps={max(args.steps // 20, 1)}',
                       *args.gin_bindings]
  run = command_line.run_config(args)
  require(run.model.num_experts > 0 and run.model.router == 'top_k', 'the study is of models with experts and the '
          f"router 'top_k', not {run.model.num_experts} experts and {run.model.router!r}")
  require(run.train.num_microbatches == 1, f'TrainConfig.num_microbatches = {run.train.num_microbatches} must '
          'be 1 here')
  return run


# Training and measuring.


class Pass(NamedTuple):
  """What a forward pass over some batches shows; N rows in all, K sparse layers.

  Attributes:
    log_prob: float [N, L] of the targets, NaN where there is none.
    expert: int [K, N, L, S], kept: bool of the same shape; None of a dense model.
    is_token: bool [N, L].
  """
  log_prob: np.ndarray
  expert: Optional[np.ndarray]
  kept: Optional[np.ndarray]
  is_token: np.ndarray


def run_over(config: ModelConfig, variables: Any, batches: Sequence[data_lib.Batch], train: bool = False) -> Pass:
  """A model over batches, with the capacity (and the random draws) of training or of evaluation."""
  parts = [_forward(config, train, variables, batch, jax.random.key(i)) for i, batch in enumerate(batches)]
  log_prob, expert, kept, is_token = zip(*jax.device_get(parts))
  join = lambda arrays: None if arrays[0] is None else np.concatenate(arrays, axis=1)
  return Pass(np.concatenate(log_prob), join(expert), join(kept), np.concatenate(is_token))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config: ModelConfig, train: bool, variables: Any, batch: Any, key: jax.Array):
  ids, targets = batch['decoder_input_tokens'], batch['decoder_target_tokens']
  rows, length = ids.shape
  hidden, kernel, record = OpenMoE(config, record_routing=config.num_experts > 0).apply(
      variables, batch, train, rngs=random_keys(key), method='features')
  log_probs, _ = scoring.log_likelihoods(hidden, kernel, targets, config.loss_chunk_tokens)
  log_probs = jnp.where(targets > 0, log_probs, np.nan)
  if record is None:
    return log_probs, None, None, make_logit_mask(ids)
  grouping = group_tokens(config, rows, length, train)

  own = lambda x: ungroup(x, grouping, rows, length)
  return log_probs, own(record.assignment.expert_index), own(record.assignment.kept), make_logit_mask(ids)


class Study:
  """Trains and measures; what is compiled is kept for all seeds."""

  def __init__(self, run: RunConfig, settings: Settings, texts: Texts):
    self._run, self._settings, self._texts = run, settings, texts
    self._optimizer = make_optimizer(run.optimizer, settings.steps)
    self._step = functools.lru_cache(maxsize=None)(
        lambda config: make_train_step(config, self._optimizer))
    self._inside = [batch for source in texts.inside for batch in texts.validation(source)]

  def train(self, name: str, seed: int, advance: Callable[[int], None]) -> Result:
    """One variant with one seed: its result."""
    variant, steps, warmup = VARIANTS[name], self._settings.steps, self._settings.warmup
    config = model_of(self._run, variant)
    batches = self._texts.training(seed, variant.conversations)
    params = jax.jit(init_params, static_argnums=0)(config, seed)
    state = init_train_state(config, self._optimizer, params)
    seconds, losses, dropped, half_way = [], [], [], None
    began = time.monotonic()
    for number, batch in enumerate(batches):
      if variant.freeze and number == warmup:
        config, state = self._freeze(config, state, batches[:warmup])
      if number == steps // 2 and config.num_experts:
        half_way = run_over(decoding.dropless(config), state.variables, self._inside)
      before = cpu_seconds()
      state, metrics = self._step(config)(state, batch)
      metrics = jax.device_get(metrics)
      seconds.append(cpu_seconds() - before)
      losses.append(float(metrics['cross_ent_loss']))
      dropped.append(float(metrics.get('fraction_tokens_left_behind', 0.)))
      advance(1)
    require(bool(np.isfinite(losses).all()), f'{name} with seed {seed}: the loss is no longer finite')
    last = max(steps // 10, 1)
    return {
        'variant': name, 'seed': seed, 'steps': steps, 'tokens': steps * self._run.data.batch_size *
        self._run.data.row_length, 'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
        'mlp_dim': config.mlp_dim, 'training_loss': float(np.mean(losses[-last:])), 'losses': losses,
        'without_expert_in_training': float(np.mean(dropped[-last:])),
        'cpu_seconds_per_step': float(np.median(seconds[steps // 2:])),
        **self._losses(config, state), **self._routing(config, state, half_way),
        'wall_seconds': time.monotonic() - began}

  def _freeze(self, config: ModelConfig, state: TrainState, seen: Sequence[data_lib.Batch]
              ) -> Tuple[ModelConfig, TrainState]:
    """Routing by a table of what the router does with the batches of the warm-up: no further text is read."""
    count = max(1, min(_FREEZING_BATCHES, len(seen) * 5 // 6))
    table, _ = make_table(config, state.params, itertools.cycle(seen[::-1]), count)
    return config.replace(router='frozen'), state.replace(router_state={'experts': table})

  def _losses(self, config: ModelConfig, state: TrainState) -> Result:
    """Nats per target: of each source, and means over the sources of a kind."""
    texts, found = self._texts, {}
    for ending, own in (('', decoding.dropless(config)), ('_eval', config)):
      if not config.num_experts:
        own = config  # the same for both: compiled once
      for kind, sources in (('in', texts.inside), ('out', texts.outside), ('conversations', texts.conversations)):
        for source in sources:
          log_prob = run_over(own, state.variables, texts.validation(source)).log_prob
          found[f'loss{ending}/{source}'] = float(-np.nanmean(log_prob, dtype=np.float64))
        found[f'loss_{kind}{ending}'] = float(np.mean([found[f'loss{ending}/{source}'] for source in sources]))
    return found

  def _routing(self, config: ModelConfig, state: TrainState, half_way: Optional[Pass]) -> Result:
    """Drops under the capacity of training, loads, and agreement with the routing half-way; none of a dense model."""
    if not config.num_experts:
      return {}
    training = run_over(config, state.variables, self._inside, train=True)
    end = run_over(decoding.dropless(config), state.variables, self._inside)
    rows, positions = np.nonzero(end.is_token)
    ids = np.concatenate([batch['decoder_input_tokens'] for batch in self._inside])[end.is_token]
    kept = training.kept[:, end.is_token]  # [K, tokens, S]
    layers = len(kept)
    every = lambda x: np.tile(x, layers)
    drops = drop_statistics.drops(kept.reshape(-1, kept.shape[-1]), every(rows))
    along = drop_statistics.by_position(1. - kept.mean(axis=-1).reshape(-1), every(positions), every(rows),
                                        end.is_token.shape[1])
    before, after = half_way.expert[:, end.is_token], end.expert[:, end.is_token]
    same = [routing_statistics.agreement(before[layer, :, 0], after[layer, :, 0], ids, rows) for layer in range(layers)]
    loads = np.stack([np.bincount(after[layer].reshape(-1), minlength=config.num_experts) for layer in range(layers)])
    loads = loads / loads.mean(axis=1, keepdims=True)
    return {'drop': drops.choices.value, 'drop_by_rank': [rank.value for rank in drops.ranks],
            'without_expert': drops.without_expert.value, 'drop_by_position': along.curve.value.tolist(),
            'drop_slope': along.slope.value, 'load': loads.tolist(), 'load_cv': float(loads.std(axis=1).mean()),
            'load_most': float(loads.max()), 'same_expert': float(np.mean([own.same.value for own in same])),
            'kappa': float(np.mean([own.kappa.value for own in same]))}


# The whole.


def study(run: RunConfig, settings: Settings, say: Callable[[str], None] = print) -> Tuple[List[Result], List[Result]]:
  """Trains and times what is missing in `run.model_dir`.

  Returns:
    All results of training there, in the order of `VARIANTS`, and those of `router_speed`.

  Raises:
    ConfigError: the folder holds a study with other settings, or is in use.
  """
  folder = paths.path(run.model_dir)
  folder.mkdir(parents=True, exist_ok=True)
  with paths.locked(folder / '.lock', f'{folder} is used'):
    _same_settings(folder / 'study.json', run, settings)
    # Seed by seed, so that a study that was stopped compares as many variants as it can.
    pending = [(name, seed) for seed in settings.seeds for name in settings.variants
               if not _file(folder, name, seed).exists()]
    speed = router_speed.measured(folder, settings.variants, settings.speed_rounds)
    timed = 0 if speed or not settings.speed_rounds else settings.speed_rounds + 1
    runs = len(settings.variants) * len(settings.seeds)
    if pending or timed:
      texts = Texts(run, settings)
      total = runs * settings.steps + timed * len(settings.variants) * router_speed.STEPS
      with Bar(total, say, 'router study', lambda n: f'{n:.1f} steps') as bar:
        bar.advance((runs - len(pending)) * settings.steps)
        own = Study(run, settings, texts)
        for name, seed in pending:
          result = own.train(name, seed, bar.advance)
          paths.write_text(_file(folder, name, seed), json.dumps(result, indent=1) + '\n')
          say(f'{name}, seed {seed}: loss in domain {result["loss_in"]:.3f}, out of domain {result["loss_out"]:.3f}, '
              f'{result["wall_seconds"]:.0f} s')
        if timed:
          batches = texts.training(settings.seeds[0], False)
          speed = router_speed.measure(run, settings.variants, batches, settings.speed_rounds, bar.advance)
    results = [json.loads(file.read_text()) for file in (folder / 'runs').glob('*.json')]
  order = list(VARIANTS)
  return sorted(results, key=lambda result: (order.index(result['variant']), result['seed'])), speed


def _file(folder: Any, name: str, seed: int) -> Any:
  return folder / 'runs' / f'{name}_{seed}.json'


def _same_settings(file: Any, run: RunConfig, settings: Settings) -> None:
  """Writes down what all results of a folder share, or compares it with what is written there."""
  own = {**{name: getattr(settings, name) for name in ('steps', 'warmup', 'domains', 'batches')},
         'mt_bench': bool(settings.questions),
         **{part: to_dict(getattr(run, part)) for part in ('model', 'data', 'optimizer')}}
  own = json.loads(json.dumps(own))
  if not file.exists():
    paths.write_text(file, json.dumps(own, indent=1) + '\n')
    return
  before = json.loads(file.read_text())
  changed = [name for name in own if before.get(name) != own[name]]
  require(not changed, f'{file.parent} holds a study with other settings ({", ".join(changed)}); give another '
          '--output')


def report(results: Sequence[Result], speed: Sequence[Result]) -> List[str]:
  """All tables in Markdown."""
  lines = []
  for title, columns in TABLES.items():
    lines += [f'{title}:', '', *seeds_lib.table(results, columns, BASELINE), '']
  if speed:
    lines += ['Speed:', '', *seeds_lib.table(speed, SPEED, BASELINE, counted='rounds')]
  return lines


def write_report(output: paths.PathLike, results: Sequence[Result], speed: Sequence[Result]) -> List[str]:
  """Writes results.csv (a line a run), summary.json, tables.md and the pictures; returns their paths."""
  folder = paths.path(output)
  columns = list(dict.fromkeys(name for result in results for name, value in result.items()
                               if isinstance(value, (int, float, str))))
  stream = io.StringIO()
  writer = csv.DictWriter(stream, columns, extrasaction='ignore', restval='')
  writer.writeheader()
  writer.writerows(results)
  plain = lambda estimate: estimate and [None if np.isnan(x) else x for x in estimate]
  summary = {figure: {variant: {'mean': plain(own.mean), 'difference': plain(own.difference), 'seeds': own.seeds}
                      for variant, own in seeds_lib.summarise(found, figure, BASELINE).items()}
             for found, figures in ((results, itertools.chain(*TABLES.values())), (speed, SPEED)) for figure in figures}
  texts = {'results.csv': stream.getvalue(), 'tables.md': '\n'.join(report(results, speed)) + '\n',
           'summary.json': json.dumps(summary, indent=1) + '\n'}
  for name, text in texts.items():
    paths.write_text(folder / name, text)
  pictures = {
      'losses.png': seeds_lib.difference_figure(results, LOSSES, BASELINE, 'nats per token, minus the default'),
      'drops.png': seeds_lib.curve_figure(results, 'drop_by_position', 'Share of the choices dropped in training',
                                          'place in the row, from the first token to the last')}
  written = [str(folder / name) for name in texts]
  for name, figure in pictures.items():
    written += plots.write_figure(figure, folder / name)
  return written


if __name__ == '__main__':
  main()
