"""openmoe-infer: texts continued by a trained model.

  openmoe-infer runs/demo "def main("
  openmoe-infer runs/demo - --temperature=0.8 --top_p=0.95 --num_samples=3 < prompt.txt
  openmoe-infer runs/demo --input=prompts.jsonl --output=answers.jsonl
  openmoe-infer runs/chat --chat
  openmoe-infer runs/chat --chat "What is a mixture of experts?"

CHECKPOINT is a model_dir, its checkpoints folder, one step in it, or a Hugging Face folder; local or gs://. Files hold
a JSON object a line, {"prompt": "..."}; the same command after a stop goes on where it was. --chat uses the template of
the released chat model.
"""

import argparse
import hashlib
import json
import sys
from typing import Any, Dict, Iterable, Optional, Sequence

from openmoe_jax import checkpoint_flags
from openmoe_jax import command_line
from openmoe_jax.config import require

DEFAULT_WINDOW = 2048  # where the checkpoint does not say how long its rows were: what the original trained with
_HELP = 'Ask something. /reset forgets the conversation, /system TEXT replaces what the assistant is told, /quit ends.'


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = _parser().parse_args(argv)
  _check(args)
  prompt = sys.stdin.read() if args.prompt == '-' else args.prompt
  require(prompt != '', 'the prompt is empty')
  records = []
  if args.input:  # what is wrong with files should be told before a model is read
    from openmoe_jax import generation_files
    records = generation_files.read_prompts(args.input)
    generation_files.check_output(args.output, _settings(args, records), len(records))
  model = checkpoint_flags.load_model(args)
  args.window = args.window or sum(model.run['data']['task_feature_lengths'].values()) or DEFAULT_WINDOW
  if args.input:
    _files(args, model, records)
  elif prompt is not None:
    _answer(args, model, prompt)
  else:
    _talk(args, model)


def _parser() -> command_line.Parser:
  parser = command_line.Parser(configured=False, prog='openmoe-infer', description=__doc__)
  checkpoint_flags.add_flags(parser)
  parser.add_argument('prompt', nargs='?', metavar='PROMPT', help='a text to continue; - reads it from standard input')
  group = parser.add_argument_group('what to continue')
  group.add_argument('--input', metavar='FILE', help='JSON lines with a field "prompt"; local or gs://')
  group.add_argument('--output', metavar='FILE', help='JSON lines: the same records with a field "output"')
  group.add_argument('--chat', action='store_true', help="use the chat template; without a PROMPT or --input, talk")
  group.add_argument('--system', help='what the assistant of a chat is told about itself')
  group = parser.add_argument_group('how')
  group.add_argument('--max_new_tokens', type=int, default=128, help='a continuation ends there; default 128')
  group.add_argument('--temperature', type=float, default=0., help='0, the default, takes the likeliest token')
  group.add_argument('--top_k', type=int, default=0, help='draw from the k likeliest tokens; 0, the default, from all')
  group.add_argument('--top_p', type=float, default=1., help='draw from the likeliest tokens that together have this '
                     'probability; 1, the default, from all')
  group.add_argument('--seed', type=int, default=0, help='of the draws; default 0')
  group.add_argument('--num_samples', type=int, help='continuations of each prompt')
  group.add_argument('--stop', action='append', default=[], metavar='TEXT', help='ends a continuation in front of this '
                     'text; may be given several times')
  group.add_argument('--window', type=int, help='most positions that the model sees; default: the row length of '
                     'training')
  return parser


def _check(args: argparse.Namespace) -> None:
  """Mistakes that can be told without reading anything."""
  given = [name for name, value in (('PROMPT', args.prompt), ('--input', args.input)) if value is not None]
  require(len(given) < 2, 'PROMPT and --input are two answers to one question: give one of them')
  require(given or args.chat, 'nothing to continue: give a PROMPT, --input=FILE or --chat')
  require(bool(args.input) == bool(args.output), '--input and --output go together')
  require(args.system is None or args.chat, '--system belongs to --chat')
  require(args.max_new_tokens >= 1, f'--max_new_tokens={args.max_new_tokens} must be at least 1')
  require(args.num_samples is None or args.num_samples >= 1, f'--num_samples={args.num_samples} must be at least 1')
  require(args.window is None or args.window >= 2, f'--window={args.window} must be at least 2')
  require(args.temperature >= 0, f'--temperature={args.temperature} must be 0 (greedy) or a positive number')
  require(0 < args.top_p <= 1, f'--top_p={args.top_p} must be above 0 and at most 1')
  require(args.top_k >= 0, f'--top_k={args.top_k} must be 0 (off) or a number of tokens')
  require(all(args.stop), '--stop is an empty text')
  require(args.num_samples is None or given, '--num_samples needs a PROMPT or --input: a conversation has one answer')


def _options(args: argparse.Namespace) -> Dict[str, Any]:
  """What `text_decoding.generate_texts` and `stream_texts` both take."""
  from openmoe_jax import chat
  return {'temperature': args.temperature, 'top_k': args.top_k, 'top_p': args.top_p, 'seed': args.seed,
          'stop': [*args.stop, chat.STOP] if args.chat else args.stop, 'window': args.window,
          'capacity_mode': args.capacity_mode}


def _prompt_of(args: argparse.Namespace, text: str) -> str:
  from openmoe_jax import chat
  return chat.prompt(text, system=_system(args)) if args.chat else text


def _system(args: argparse.Namespace) -> str:
  from openmoe_jax import chat
  return chat.SYSTEM if args.system is None else args.system


def _settings(args: argparse.Namespace, records: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
  """Everything that results depend on and that is known before the checkpoint is read."""
  options = {name: value for name, value in _options(args).items() if name != 'window'}
  return {**{name: getattr(args, name) for name in ('checkpoint', 'dtype', 'int8', 'vocabulary', 'extra_ids', 'chat',
                                                    'system', 'max_new_tokens', 'num_samples')},
          'input_sha256': hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest(), **options}


def _files(args: argparse.Namespace, model: Any, records: Sequence[Dict[str, Any]]) -> None:
  from openmoe_jax import generation_files
  settings = {**_settings(args, records), 'step': model.step, 'window': args.window}
  job = generation_files.Job(records, args.input, args.output, settings)
  done = generation_files.run(job, model, args.max_new_tokens, lambda text: _prompt_of(args, text), args.batch_size,
                              num_samples=args.num_samples, **_options(args), mesh=model.mesh)
  print(f'{done} new results in {args.output}')


def _stream(args: argparse.Namespace, model: Any, text: str, **more) -> Iterable[Any]:
  from openmoe_jax import text_decoding
  return text_decoding.stream_texts(model, [text], args.max_new_tokens, **_options(args), mesh=model.mesh, **more)


def _answer(args: argparse.Namespace, model: Any, prompt: str) -> None:
  """Writes the continuation of one prompt as it comes; of several samples, one after the other when all are there."""
  text = _prompt_of(args, prompt)
  if args.num_samples is None:
    for piece in _stream(args, model, text):
      print(piece.text, end='', flush=True)
    print()
    return
  samples, = model.generate([text], args.max_new_tokens, num_samples=args.num_samples, batch_size=args.batch_size,
                            **_options(args))
  for number, sample in enumerate(samples, 1):
    print(f'--- {number} of {len(samples)}\n{sample}')


def _talk(args: argparse.Namespace, model: Any) -> None:
  """A conversation: questions from standard input, answers as they come."""
  from openmoe_jax import chat, text_decoding
  try:
    import readline  # pylint: disable=unused-import  # gives `input` a history
  except ImportError:
    pass
  conversation = chat.Conversation(_system(args))
  room = args.window - 1 - args.max_new_tokens
  require(room > 0, f'--max_new_tokens={args.max_new_tokens} leaves no room for a question in the window of '
          f'{args.window} positions (--window)')
  fits = lambda text: len(text_decoding.encode(model, [text])[0]) <= room
  print(_HELP, file=sys.stderr)
  count = 0
  while True:
    try:
      query = input('> ' if sys.stdin.isatty() else '').strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if query in ('/quit', '/exit'):
      return
    if query == '/reset' or query.startswith('/system '):
      conversation = chat.Conversation(query.partition(' ')[2] or conversation.system)
    elif query.startswith('/'):
      print(_HELP, file=sys.stderr)
    elif query:
      text, left_out = conversation.prompt(query, fits)
      if not fits(text):
        print(f'that is too long: {room} tokens fit beside an answer of --max_new_tokens={args.max_new_tokens}',
              file=sys.stderr)
        continue
      if left_out:
        print(f'(the first {left_out} turns no longer fit and are left out)', file=sys.stderr)
      answer = _say(_stream(args, model, text, row_ids=[count]))
      count += 1
      if answer is not None:
        conversation.turns.append((query, answer))


def _say(pieces: Iterable[Any]) -> Optional[str]:
  """Prints an answer as it comes and returns it; None if Ctrl-C ended it."""
  answer = ''
  try:
    for piece in pieces:
      print(piece.text if answer else piece.text.lstrip(), end='', flush=True)
      answer = (answer + piece.text).lstrip()
  except KeyboardInterrupt:
    print('\n(interrupted; this turn is forgotten)', file=sys.stderr)
    return None
  print()
  return answer.strip()


if __name__ == '__main__':
  main()
