"""Warnings: of what, how often, and the same after a restart."""

import json

import numpy as np

from openmoe_jax.alarms import DeadExperts, LossSpikes


def warned(spikes, losses):
  """Indices of the losses that a warning came with."""
  return [i for i, loss in enumerate(losses) if spikes.after_step(loss)]


def test_a_spike_is_told_once():
  rng = np.random.default_rng(0)
  losses = 3 + .05 * rng.standard_normal(300)
  assert warned(LossSpikes(6.), losses) == []
  losses[100:105] = 5  # one episode
  losses[250] = 4
  assert warned(LossSpikes(6.), losses) == [100, 250]
  assert warned(LossSpikes(0.), losses) == []


def test_what_a_spike_says():
  spikes = LossSpikes(6.)
  for i in range(40):
    spikes.after_step(2. + .1 * (-1) ** i)  # mean 2, standard deviation .1
  line, = spikes.after_step(3.)
  assert line == 'loss spike: 3 is 10.0 standard deviations above 2, the mean of the 40 steps before'


def test_a_threshold_is_a_threshold():
  for loss, warns in ((2.59, False), (2.61, True)):
    spikes = LossSpikes(6.)
    assert not warned(spikes, [1.9, 2.1] * 20)
    assert bool(spikes.after_step(loss)) == warns


def test_the_first_steps_and_falling_losses_are_no_spikes():
  assert warned(LossSpikes(6.), [9.] * 10 + [20.] + [9.] * 10) == []  # too little to compare with
  assert warned(LossSpikes(6.), 9 - 6 * np.arange(200) / 200) == []
  assert warned(LossSpikes(6.), [3.] * 100 + [3.05] + [3.] * 100) == []  # no fluctuation at all: 1.7 % are no spike


def test_spikes_go_on_after_a_restart():
  rng = np.random.default_rng(1)
  losses = 3 + .05 * rng.standard_normal(200)
  losses[[60, 61, 62, 150]] = 6
  whole = LossSpikes(6.)
  expected = warned(whole, losses)
  for cut in (50, 61, 149):
    first = LossSpikes(6.)
    before = warned(first, losses[:cut])
    second = LossSpikes(6., json.loads(json.dumps(first.state())))
    assert before + [cut + i for i in warned(second, losses[cut:])] == expected
    assert second.state() == whole.state()


def test_dead_experts():
  load = np.ones((2, 4))
  load[1, 2] = .05
  experts = DeadExperts(.1, [3, 7])
  lines = [experts.after_window(load, 10) for _ in range(30)]
  assert [i for i, line in enumerate(lines) if line] == [9]  # once, after ten windows
  assert lines[9] == ['dead experts: 2 of layer 7 have got less than 0.1 of the mean load for 100 steps']
  load[0, :] = 0  # others
  lines = [experts.after_window(load, 10) for _ in range(10)]
  assert [line for line in lines if line] == [['dead experts: 0 of layer 3, 1 of layer 3, 2 of layer 3, 3 of layer 3 have got '
                                               'less than 0.1 of the mean load for 100 steps']]
  experts.after_window(np.ones((2, 4)), 10)  # alive again: what dies now is told again
  assert [bool(experts.after_window(load, 10)) for _ in range(10)] == [False] * 9 + [True]


def test_an_expert_that_gets_tokens_now_and_then_is_not_dead():
  experts = DeadExperts(.1, [1])
  for i in range(100):
    assert not experts.after_window([[1., .2 if i % 9 == 0 else 0.]], 1)
  assert not any(DeadExperts(0., [1]).after_window([[1., 0.]], 1) for _ in range(20))


def test_dead_experts_go_on_after_a_restart_and_with_another_number():
  first = DeadExperts(.1, [1])
  for _ in range(6):
    first.after_window([[1., 0.]], 5)
  saved = json.loads(json.dumps(first.state()))
  second = DeadExperts(.1, [1], saved)
  assert [bool(second.after_window([[1., 0.]], 5)) for _ in range(5)] == [False] * 3 + [True, False]
  grown = DeadExperts(.1, [1], saved)  # counts anew
  assert [bool(grown.after_window([[1., 0., 1.]], 5)) for _ in range(10)] == [False] * 9 + [True]


def test_many_dead_experts_are_one_line():
  experts = DeadExperts(.1, [1])
  load = np.zeros((1, 64))
  load[0, 0] = 64
  line, = [lines[0] for lines in (experts.after_window(load, 1) for _ in range(10)) if lines]
  assert '12 of layer 1 and 51 more have got less' in line
