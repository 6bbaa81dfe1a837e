"""A process that makes no steps ends itself and shows its stacks; one that compiles, evaluates or sleeps does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from openmoe_jax.hang_detector import HangDetector

HANGING = '''
import threading, time
from openmoe_jax.hang_detector import HangDetector
def load_the_next_batch():
  time.sleep(100)
def computes():
  threading.Event().wait()
threading.Thread(target=load_the_next_batch, daemon=True).start()
with HangDetector(MINUTES) as hang:
  print('compiling', flush=True)
  time.sleep(1)
  for step in range(1, 4):
    hang.alive(step)
    time.sleep(.1)
  print('hanging', flush=True)
  computes()
'''


def start(minutes):
  return subprocess.Popen([sys.executable, '-c', textwrap.dedent(HANGING).replace('MINUTES', str(minutes))], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})


def test_a_hang_ends_with_stacks_and_a_status_of_its_own():
  process = start(.5 / 60)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 3 and out == 'compiling\nhanging\n'
  assert 'in computes' in err and 'in load_the_next_batch' in err
  line = err.strip().splitlines()[-1]
  assert 'no step for 0.00833333 minutes (TrainConfig.hang_minutes = 0.00833333) after step 3' in line


@pytest.mark.slow
def test_a_stopped_process_is_no_hang():
  process = start(2 / 60)
  assert process.stdout.readline() == 'compiling\n' and process.stdout.readline() == 'hanging\n'
  process.send_signal(signal.SIGSTOP)
  time.sleep(4)
  process.send_signal(signal.SIGCONT)
  time.sleep(.3)
  assert process.poll() is None
  assert process.wait(60) == 3  # it hangs all the same


def watched(use, minutes=.3 / 60):
  """What the detector said while `use` ran."""
  said = []
  with HangDetector(minutes, end=said.append) as hang:
    use(hang)
  return said


def test_pauses_and_steps_are_no_hang():
  def use(hang):
    time.sleep(.4)  # before the first step: compiling
    for step in range(8):
      hang.alive(step)
      time.sleep(.05)
    hang.pause()  # an evaluation
    time.sleep(.4)
    hang.alive(8)
  assert not watched(use)


def test_after_a_pause_it_counts_again():
  def use(hang):
    hang.pause()
    hang.alive(7)
    time.sleep(1)
  line, = watched(use)
  assert 'after step 7' in line


def test_what_is_no_step_may_take_ten_times_as_long_and_not_for_ever():
  line, = watched(lambda hang: time.sleep(1.5), minutes=.05 / 60)
  assert 'no step for 0.00833333 minutes' in line and 'after step 0' in line


def test_zero_is_off():
  def use(hang):
    hang.alive(1)
    time.sleep(.1)
  assert not watched(use, 0)
