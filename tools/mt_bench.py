"""MT-Bench: answers of a checkpoint for FastChat's judge, and a report on the scores that it gave.

  python -m openmoe_jax.tools.mt_bench answer CHECKPOINT --questions=question.jsonl --answers=model_answer/NAME.jsonl
  python -m openmoe_jax.tools.mt_bench report gpt-4_single.jsonl --questions=question.jsonl --output=DIR

Questions, answers and scores are files in FastChat's format. An interrupted `answer` goes on where it was. `report`
prints a table and writes it with mt_bench.json and mt_bench.png, a radar of the categories.
"""

import argparse
import functools
import json
from typing import Optional, Sequence

from rich import progress
from rich.console import Console

from openmoe_jax import checkpoint_flags, command_line, mt_bench, paths
from openmoe_jax.config import require


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = parser().parse_args(argv)
  require(not args.gin_bindings, f'--gin.{"".join(args.gin_bindings[:1])}: this program takes its configuration from '
          'the checkpoint')
  args.run(args)


def parser() -> command_line.Parser:
  """The program's flags."""
  flags = command_line.Parser(configured=False, prog='mt_bench', description=__doc__)
  commands = flags.add_subparsers(required=True, metavar='answer|report', parser_class=functools.partial(
      command_line.Parser, configured=False))
  answer = commands.add_parser('answer', description='Answers the questions, both turns, with the chat template.')
  answer.set_defaults(run=_answer)
  checkpoint_flags.add_flags(answer)
  answer.add_argument('--questions', required=True, metavar='FILE', help='question.jsonl')
  answer.add_argument('--answers', required=True, metavar='FILE', help='where answers go, and where those are that '
                      'need not be made again')
  answer.add_argument('--model_id', metavar='NAME', help='of the model in the answers; default: the name of that file')
  answer.add_argument('--num_choices', type=int, default=1, help='answers to each question; default 1')
  answer.add_argument('--max_new_tokens', type=int, default=1024, help='of an answer; default 1024')
  answer.add_argument('--window', type=int, help='positions of a conversation and its answer; default: the row length '
                      "of the checkpoint's run, if it is known")
  answer.add_argument('--top_p', type=float, default=1., help='default 1: off')
  answer.add_argument('--seed', type=int, default=0, help='of the random draws; default 0')
  report = commands.add_parser('report', description='Mean scores by turn and category.')
  report.set_defaults(run=_report)
  report.add_argument('scores', metavar='FILE', help='of judgments, gpt-4_single.jsonl')
  report.add_argument('--questions', required=True, metavar='FILE', help='question.jsonl')
  report.add_argument('--models', metavar='NAME[,NAME]', help='only these; default: all')
  report.add_argument('--output', metavar='DIR', help='where mt_bench.json, mt_bench.md and mt_bench.png go')
  return flags


def _answer(args: argparse.Namespace) -> None:
  questions = mt_bench.read_questions(args.questions)
  model_id = args.model_id or paths.path(args.answers).name.removesuffix('.jsonl')
  mt_bench.read_answers(args.answers, model_id, args.num_choices)  # a mistake need not wait for the model
  model = checkpoint_flags.load_model(args)
  window = args.window or sum(model.run['data']['task_feature_lengths'].values()) or None
  console = Console()
  with progress.Progress(*progress.Progress.get_default_columns(), progress.MofNCompleteColumn(), console=console,
                         transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task('questions', total=len(questions))
    answered, shortened = mt_bench.write_answers(
        model, questions, args.answers, model_id, num_choices=args.num_choices, max_new_tokens=args.max_new_tokens,
        window=window, batch_size=args.batch_size, seed=args.seed, top_p=args.top_p, capacity_mode=args.capacity_mode,
        progress=lambda count: bar.advance(task, count))
  print(f'{args.answers}: {answered} of {len(questions)} questions answered now, all of them are there')
  if shortened:
    print(f'{shortened} answers were given without an earlier turn, which did not fit the window of {window} positions')


def _report(args: argparse.Namespace) -> None:
  questions = mt_bench.read_questions(args.questions)
  scores, without = mt_bench.read_scores(args.scores, questions)
  if args.models is not None:
    known = {score.model for score in scores}
    wanted = args.models.split(',')
    for name in wanted:
      require(name in known, f'--models={args.models}: {args.scores} has no scores of {name!r}, but of '
              f'{", ".join(sorted(known))}')
    scores = [score for score in scores if score.model in wanted]
  summaries = mt_bench.summarise(scores, questions)
  table = mt_bench.table(summaries)
  print(table, end='')
  if without:
    print(f'\n{without} judgments without a score are left out')
  if args.output:
    from openmoe_jax.analysis import radar  # matplotlib
    folder = paths.path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    radar.write_radar(folder / 'mt_bench.png', {summary.model: summary.categories for summary in summaries},
                      title='MT-Bench: mean score by category')
    paths.write_text(folder / 'mt_bench.md', table)
    records = [summary._asdict() for summary in summaries]
    paths.write_text(folder / 'mt_bench.json', json.dumps(records, indent=2) + '\n')
    print(f'\nwrote mt_bench.md, mt_bench.json and mt_bench.png to {args.output}')


if __name__ == '__main__':
  main()
