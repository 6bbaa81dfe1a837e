"""Several processes of one run on this machine, and what they say."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import time

import tiny_run


class Processes:
  """`count` processes of the program, with `devices` devices each; ended when the `with` block is left.

  Args:
    folder: for their logs.
    flags: of openmoe-train, or a script.
    environments: {process: more variables}.
  """

  def __init__(self, count, folder, *flags, devices=1, script='', environments={}):
    port = tiny_run.free_port()
    self.logs = [pathlib.Path(folder) / f'log_{i}_of_{count}' for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      log.write_text('')
      where = (f'--coordinator_address=localhost:{port}', f'--num_processes={count}', f'--process_id={i}')
      command = [sys.executable, '-c', script, str(port), str(count), str(i)] if script else tiny_run.command(*flags, *where)
      with open(log, 'a') as out:
        self.processes.append(subprocess.Popen(
            command, env=tiny_run.environment(devices, **environments.get(i, {})), stdout=out, stderr=subprocess.STDOUT))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()
      process.wait()

  def text(self, i=0) -> str:
    return self.logs[i].read_text()

  def last_line(self, i=0) -> str:
    return self.text(i).strip().splitlines()[-1]

  def wait_for(self, text, i=0, seconds=300.) -> None:
    """Until process i says `text`."""
    end = time.monotonic() + seconds
    while text not in self.text(i):
      assert self.processes[i].poll() is None and time.monotonic() < end, (self.processes[i].poll(), self.text(i))
      time.sleep(.01)

  def send(self, i, number=signal.SIGKILL) -> None:
    self.processes[i].send_signal(number)

  def statuses(self, seconds=300., without=()) -> list:
    """Of all that are not in `without`, once they have ended; None where one has not within `seconds`."""
    end, found = time.monotonic() + seconds, []
    for i, process in enumerate(self.processes):
      if i not in without:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(max(end - time.monotonic(), .1))
        found.append(process.poll())
    return found
