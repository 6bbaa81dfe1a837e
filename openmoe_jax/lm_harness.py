"""openmoe-lm-eval: a checkpoint through lm-evaluation-harness.

  openmoe-lm-eval runs/demo --tasks=openmoe_13 --data_dir=data --output=results
  openmoe-lm-eval runs/demo --tasks=my_task.yaml --limit=100
  openmoe-lm-eval openmoe-8b --tasks=piqa,arc_easy --num_fewshot=5 --dtype=bfloat16 --mesh=1,4,1

Tasks are lm-eval's own, `openmoe_13` (the 13 of the paper), or YAML files in lm-eval's format. See docs/lm_eval.md.
"""

import argparse
import contextlib
import json
import multiprocessing
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence
import zlib

from openmoe_jax import checkpoint_flags, checkpoints, command_line, lm_harness_tasks, loading, paths
from openmoe_jax.config import ConfigError, require


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def parser() -> command_line.Parser:
  """The program's flags."""
  flags = command_line.Parser(configured=False, prog='openmoe-lm-eval', description=__doc__)
  checkpoint_flags.add_flags(flags)
  flags.add_argument('--window', type=int, help='most positions of a sequence; default: the row length of training, or '
                     '2048')
  group = flags.add_argument_group('the tasks')
  group.add_argument('--tasks', required=True, metavar='NAME[,NAME]', help="lm-eval's names of tasks, groups and tags, "
                     f'with * and ?; {lm_harness_tasks.GROUP}; YAML files')
  group.add_argument('--include_path', metavar='DIR', help='folder with more tasks as YAML files')
  group.add_argument('--data_dir', metavar='DIR', help='local data: DIR/TASK/SPLIT.jsonl in the published layout; '
                     'tasks without a folder there read what their definition says')
  group.add_argument('--num_fewshot', type=int, metavar='N', help="worked examples in front; default: the task's own")
  group.add_argument('--limit', type=float, metavar='N', help='examples of each task: a number, or a share below 1')
  group.add_argument('--gen_kwargs', metavar='NAME=VALUE[,..]', help='generation settings that win over those of the '
                     'tasks: max_gen_toks, do_sample, temperature, top_k, top_p, until')
  group.add_argument('--seed', type=int, metavar='N', help='of worked examples and of samples; default: those of '
                     'lm-eval, and 0')
  group = flags.add_argument_group('results')
  group.add_argument('--output', metavar='DIR', help='write results.json and results.md, over older ones')
  group.add_argument('--log_samples', action='store_true', help='write samples_TASK.jsonl, too: every example with '
                     'what the model made of it')
  group.add_argument('--use_cache', metavar='FILE', help='keep answers in FILE.*.db, one file for each model and its '
                     'settings; a run that was stopped goes on with them')
  return flags


def _main(argv: Optional[Sequence[str]]) -> None:
  args = parser().parse_args(argv)
  _check(args)
  try:
    import lm_eval
    from openmoe_jax.lm_harness_model import HarnessModel
  except ImportError as error:
    raise ConfigError(f'lm-evaluation-harness is missing ({error}): pip install openmoe_jax[eval], or make '
                      'install-eval in a checkout') from error
  loaded = lm_harness_tasks.load(args.tasks.split(','), args.include_path, args.data_dir)
  wanted = _gen_kwargs(args.gen_kwargs)
  model = HarnessModel(checkpoint_flags.load_model(args), args.batch_size, args.window, args.capacity_mode,
                       args.seed or 0)
  _check_tasks(loaded.tasks, wanted, model)
  seeds = {f'{name}_seed': args.seed for name in ('random', 'numpy_random', 'fewshot_random') if args.seed is not None}
  with _no_forks():
    results = lm_eval.simple_evaluate(
        model, **loaded._asdict(), num_fewshot=args.num_fewshot, batch_size=args.batch_size,
        limit=args.limit if args.limit is None or args.limit < 1 else int(args.limit), gen_kwargs=wanted or None,
        use_cache=_cache_name(args, model), log_samples=args.log_samples, torch_random_seed=None, **seeds)
  results['config'].update(checkpoint=args.checkpoint, int8=args.int8)
  table = tables(results)
  print(table)
  if args.output:
    write(args.output, results, table)


@contextlib.contextmanager
def _no_forks() -> Iterator[None]:
  """lm-eval estimates some standard errors in a pool of processes; forks of one that runs JAX may wait for ever."""
  before = multiprocessing.get_start_method(allow_none=True)
  multiprocessing.set_start_method('forkserver', force=True)
  try:
    yield
  finally:
    multiprocessing.set_start_method(before, force=True)


def _check(args: argparse.Namespace) -> None:
  """What can be seen to be wrong at once."""
  require(all(args.tasks.split(',')), f'--tasks={args.tasks!r} must be names with commas between them')
  require(args.num_fewshot is None or args.num_fewshot >= 0, f'--num_fewshot={args.num_fewshot} must not be negative')
  require(args.limit is None or args.limit > 0 and (args.limit < 1 or args.limit == int(args.limit)),
          f'--limit={args.limit} must be a number of examples, or a share below 1')
  require(args.seed is None or 0 <= args.seed < 2**32, f'--seed={args.seed} must be from 0 to 2**32 - 1')
  require(args.output or not args.log_samples, '--log_samples needs --output=DIR, where they are written')
  if not loading.is_hugging_face(args.checkpoint):
    checkpoints.resolve(args.checkpoint)
  if args.output:
    try:
      paths.require_writable(args.output)
    except OSError as error:
      raise ConfigError(f'--output={args.output} cannot be written to: {error}') from error


def _gen_kwargs(text: Optional[str]) -> Dict[str, Any]:
  from lm_eval.utils import simple_parse_args_string
  require(not text or all('=' in part for part in text.split(',')), f'--gen_kwargs={text!r} must be NAME=VALUE pairs '
          'with commas between them')
  return simple_parse_args_string(text)


def _check_tasks(tasks: Sequence[Any], wanted: Mapping[str, Any], model: Any) -> None:
  """Raises `ConfigError` for what a task asks for and this model cannot give, before anything runs."""
  for item in tasks:
    for task in item.get_all_tasks() if hasattr(item, 'get_all_tasks') else [item]:
      name = task.config.task
      require(not getattr(task, 'UNSAFE_CODE', False), f'task {name} runs programs that the model writes, which this '
              'program never does')
      require(not getattr(task, 'MULTIMODAL', False), f'task {name} shows more than text to the model')
      if task.get_config('output_type') == 'generate_until':
        try:
          model.settings({**(task.config.generation_kwargs or {}), **wanted})
        except ConfigError as error:
          raise ConfigError(f'task {name}: {error}') from error


def _cache_name(args: argparse.Namespace, model: Any) -> Optional[str]:
  """lm-eval looks answers up by request alone: another model, or the same one run otherwise, gets another file."""
  if not args.use_cache:
    return None
  told = (args.checkpoint, args.int8, model.seed, model.get_model_info(), model.model.run['data']['vocabulary'],
          model.model.run['data']['extra_ids'])
  return f'{args.use_cache}.{zlib.crc32(json.dumps(told).encode()):08x}'


def tables(results: Mapping[str, Any]) -> str:
  """lm-eval's Markdown tables of results, and the paper's figures beside those of its group."""
  from lm_eval.utils import make_table
  parts = [make_table(results)]
  if results.get('groups'):
    parts.append(make_table(results, 'groups'))
  if lm_harness_tasks.GROUP in results.get('groups', {}):
    parts.append(lm_harness_tasks.paper_table(results))
  return '\n'.join(part.rstrip() + '\n' for part in parts)


def write(directory: paths.PathLike, results: Mapping[str, Any], table: str) -> None:
  """results.json, results.md, and samples_TASK.jsonl if there are samples, into a folder."""
  from lm_eval.utils import handle_non_serializable
  text = lambda value, **layout: json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **layout)
  folder = paths.path(directory)
  kept = {key: value for key, value in results.items() if key != 'samples'}
  paths.write_text(folder / 'results.json', text(kept, indent=2) + '\n')
  paths.write_text(folder / 'results.md', table)
  for task, samples in results.get('samples', {}).items():
    paths.write_text(folder / f'samples_{task}.jsonl', ''.join(text(sample) + '\n' for sample in samples))


if __name__ == '__main__':
  main()
