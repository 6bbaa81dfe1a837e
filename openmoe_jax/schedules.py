"""Learning-rate schedules written as T5X writes them: names of factors joined by '*'."""

from typing import Callable

import jax
import jax.numpy as jnp

from openmoe_jax.config import OptimizerConfig, require

Schedule = Callable[[jax.Array], jax.Array]

FACTORS = ('constant', 'linear_warmup', 'linear_decay', 'rsqrt_decay', 'cosine_decay')
_TO_THE_END = ('linear_decay', 'cosine_decay')


def learning_rate_schedule(config: OptimizerConfig, train_steps: int) -> Schedule:
  """The schedule `config.schedule`, a product of factors that is never below `config.min_learning_rate`.

  With step s (0 for the first update), w = warmup_steps and d = decay_steps:

    constant        learning_rate
    linear_warmup   min(1, s / w)
    rsqrt_decay     1 / sqrt(max(s, w)): constant during the first w steps, then decaying
    linear_decay    falls from 1 to 0 over d steps, then stays 0
    cosine_decay    falls from 1 to 0 along half a cosine over d steps, then stays 0

  The last two begin at step w where there is a linear_warmup, else at step 0. Their default, decay_steps = 0, lets them
  end with the run: d = train_steps less the step where they begin.

  Args:
    config: optimizer settings.
    train_steps: length of the whole run in steps.

  Returns:
    A function from the step (integer, traced or not) to the float32 learning rate.

  Raises:
    ConfigError: an unknown factor, or a decay that would have to end before it begins.
  """
  factors = [factor.strip() for factor in config.schedule.split('*')]
  unknown = [factor for factor in factors if factor not in FACTORS]
  require(not unknown, f'OptimizerConfig.schedule = {config.schedule!r} has unknown factors '
          f'{", ".join(map(repr, unknown))}; valid, joined by *: {", ".join(FACTORS)}')
  warmup = max(config.warmup_steps, 1)
  begin = config.warmup_steps if 'linear_warmup' in factors else 0
  length = config.decay_steps or train_steps - begin
  if any(factor in _TO_THE_END for factor in factors):
    require(length > 0, f'OptimizerConfig.schedule = {config.schedule!r} has nothing left to decay over: warmup_steps '
            f'= {config.warmup_steps} must be below TrainConfig.train_steps = {train_steps}, or set decay_steps')

  def schedule(step) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - begin) / length, 0.0, 1.0)
    rate = jnp.float32(1.0)
    for factor in factors:
      if factor == 'constant':
        rate *= config.learning_rate
      elif factor == 'linear_warmup':
        rate *= jnp.minimum(1.0, step / warmup)
      elif factor == 'rsqrt_decay':
        rate /= jnp.sqrt(jnp.maximum(step, warmup))
      elif factor == 'linear_decay':
        rate *= 1.0 - progress
      elif factor == 'cosine_decay':
        rate *= 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.maximum(rate, config.min_learning_rate).astype(jnp.float32)

  return schedule
