"""Times generation beside Hugging Face transformers' Qwen2-MoE of the same size, in the same process.

  python -m openmoe_jax.tools.bench_decode            # or: make bench-decode

Both models have random float32 parameters, the vocabulary, layers and experts of the training benchmark
(`bench_train_step`): a sparse layer in four, 16 experts of which a token uses two, and one that all tokens use. Qwen2-MoE's
gate has three kernels where ours has the area of four, so its hidden layers are 4/3 as wide; sizes that differ by more than
5 % end the program. Prompt and greedy continuation are timed together; runs of both alternate, medians count. Of
transformers' ways to run experts the fastest one is taken. CPU-seconds are of the whole process. Needs no TensorFlow;
without PyTorch only ours is timed.
"""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Callable, Dict, List, Optional, Sequence

import jax
import numpy as np

from openmoe_jax import decoding
from openmoe_jax.analysis.parameters import count_parameters
from openmoe_jax.command_line import run_main
from openmoe_jax.config import require
from openmoe_jax.tools.bench_timing import cpu_seconds
from openmoe_jax.tools.bench_train_step import CONFIG
from openmoe_jax.train_state import init_params

EXPERTS = ('eager', 'batched_mm', 'grouped_mm')
ALIGNED = 4  # numbers: torch's grouped product wants rows of whole 16 bytes
CLOSE = 0.05  # most that the sizes of the two models may differ by
PAUSE = 0.5  # seconds between runs: the threads of either library spin for a while after its last product


@dataclasses.dataclass
class Times:
  """Wall-clock and CPU-seconds of runs."""
  wall: List[float] = dataclasses.field(default_factory=list)
  cpu: List[float] = dataclasses.field(default_factory=list)

  def take(self, function: Callable[[], None]) -> None:
    time.sleep(PAUSE)
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    self.wall.append(time.perf_counter() - wall)
    self.cpu.append(cpu_seconds() - cpu)


def ours(args) -> Dict[int, Callable[[], None]]:
  """Batch size -> a run."""
  params = jax.jit(init_params, static_argnums=0)(CONFIG, 0)

  def run(rows):
    tokens = np.random.RandomState(rows).randint(3, CONFIG.vocab_size, (rows, args.prompt)).astype(np.int32)
    lengths = np.full(rows, args.prompt)
    got = decoding.generate(CONFIG, params, tokens, lengths, args.new, eos_id=None)
    assert (got.lengths == args.new).all()

  return {rows: (lambda rows=rows: run(rows)) for rows in args.rows}


def qwen2_moe(args, experts: Optional[str]):
  """(parameters, activated parameters, batch size -> a run)."""
  import torch
  from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
  hidden = CONFIG.mlp_dim * 4 // 3 // ALIGNED * ALIGNED
  torch.manual_seed(0)
  more = {'experts_implementation': experts} if experts else {}
  config = Qwen2MoeConfig(
      vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.emb_dim, num_hidden_layers=CONFIG.num_layers,
      num_attention_heads=CONFIG.num_heads, num_key_value_heads=CONFIG.num_heads, intermediate_size=hidden,
      moe_intermediate_size=hidden, shared_expert_intermediate_size=hidden, decoder_sparse_step=CONFIG.moe_interval,
      num_experts=CONFIG.num_experts, num_experts_per_tok=CONFIG.num_selected_experts, tie_word_embeddings=False,
      bos_token_id=None, eos_token_id=None, pad_token_id=0, **more)
  model = Qwen2MoeForCausalLM(config).eval()
  total = sum(p.numel() for p in model.parameters())
  idle = CONFIG.num_experts - CONFIG.num_selected_experts
  active = total - CONFIG.num_sparse_layers * idle * 3 * CONFIG.emb_dim * hidden

  def run(rows):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, CONFIG.vocab_size, (rows, args.prompt), generator=generator)
    with torch.inference_mode():
      out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new,
                           min_new_tokens=args.new, do_sample=False)
    assert out.shape == (rows, args.prompt + args.new)

  return total, active, {rows: (lambda rows=rows: run(rows)) for rows in args.rows}


def fastest_qwen2_moe(args):
  """The run of the fastest way that this version of transformers has, and its name."""
  best = None
  for experts in (*EXPERTS, None):
    try:
      total, active, runs = qwen2_moe(args, experts)
      times = Times()
      for _ in range(2):
        times.take(runs[max(args.rows)])
    except Exception as error:  # pylint: disable=broad-except  # each version knows other ways, and says so differently
      print(f'  transformers, experts {experts!r}: not here ({type(error).__name__})', flush=True)
      continue
    print(f'  transformers, experts {experts!r}: {times.wall[-1]:.2f} s', flush=True)
    if best is None or times.wall[-1] < best[0]:
      best = times.wall[-1], experts, total, active, runs
  require(best is not None, 'transformers runs Qwen2-MoE in none of the ways known here: see the lines above')
  return best[1:]


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, nargs='+', default=[1, 16], help='batch sizes')
  parser.add_argument('--prompt', type=int, default=128, help='tokens of each prompt')
  parser.add_argument('--new', type=int, default=128, help='tokens to generate')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--json', help='write the figures to this file')
  args = parser.parse_args(argv)

  counts = count_parameters(CONFIG)
  contestants = {'openmoe_jax': (counts.total, counts.active, ours(args))}
  try:
    import torch
    import transformers
    experts, *qwen = fastest_qwen2_moe(args)
    name = f'Qwen2-MoE, transformers {transformers.__version__}, experts {experts!r}, {torch.get_num_threads()} threads'
    contestants[name] = tuple(qwen)
  except ImportError as error:
    print(f'PyTorch and transformers are not installed ({error}): only openmoe_jax is timed')
  for name, (total, active, runs) in contestants.items():
    print(f'{name}: {total:,} parameters ({total / counts.total - 1:+.2%}), {active:,} activated '
          f'({active / counts.active - 1:+.2%})', flush=True)
    require(all(abs(a / b - 1) <= CLOSE for a, b in ((total, counts.total), (active, counts.active))),
            f'{name} differs by more than {CLOSE:.0%} in size from openmoe_jax: these speeds say nothing')
    for run in runs.values():
      run()  # compiles

  times = {(name, rows): Times() for name in contestants for rows in args.rows}
  for _ in range(args.repeats):
    for rows in args.rows:
      for name, (_, _, runs) in contestants.items():
        times[name, rows].take(runs[rows])

  print(f'\n{jax.devices()[0].device_kind}, float32, prompt {args.prompt}, {args.new} new tokens, medians of '
        f'{args.repeats} alternating runs\n\n| batch | model | tokens/s | CPU-s a token |\n|---|---|---|---|')
  figures = []
  for (name, rows), t in sorted(times.items(), key=lambda item: item[0][1]):
    tokens = rows * args.new
    figures.append({'model': name, 'batch': rows, 'tokens_per_second': tokens / statistics.median(t.wall),
                    'cpu_seconds_per_token': statistics.median(t.cpu) / tokens})
    print(f'| {rows} | {name} | {figures[-1]["tokens_per_second"]:.1f} | {figures[-1]["cpu_seconds_per_token"]:.5f} |')
  if len(contestants) == 2:
    first, second = contestants
    for rows in args.rows:
      a, b = times[first, rows], times[second, rows]
      print(f'batch {rows}: {statistics.median(b.wall) / statistics.median(a.wall):.2f} times as fast by wall clock, '
            f'{statistics.median(b.cpu) / statistics.median(a.cpu):.2f} by CPU-seconds')
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(figures, file, indent=2)


if __name__ == '__main__':
  run_main(main)
