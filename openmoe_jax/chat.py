"""The released chat model's template and stopping rules (SPEC 12).

A conversation is text to the vocabulary, '<s>' and '</s>' included. Without an EOS between the turns, what ends an answer
is an EOS or a written-out '</s>', whichever way the vocabulary cuts it.
"""

from typing import List, Sequence, Tuple

SYSTEM = 'You are a helpful, respectful and honest assistant.'
STOP = '</s>'


def prompt(query: str, turns: Sequence[Tuple[str, str]] = (), system: str = SYSTEM) -> str:
  """What the model continues with its answer to `query`.

  Args:
    query: of the user.
    turns: (user, assistant), earlier ones first.
    system: what the assistant is told about itself.
  """
  told = ''.join(f'<s>[INST] {user} [/INST] {assistant} </s>' for user, assistant in turns)
  return f'<<SYS>>\n{system}\n<</SYS>>\n\n{told}<s>[INST] {query} [/INST]'


def answer(text: str) -> str:
  """The answer in a continuation."""
  return text.split(STOP)[0].strip()


class Conversation:
  """Turns that are shortened from the front until they fit a window.

  Args:
    system: as for `prompt`.
  """

  def __init__(self, system: str = SYSTEM):
    self.system = system
    self.turns: List[Tuple[str, str]] = []

  def prompt(self, query: str, fits=lambda text: True) -> Tuple[str, int]:
    """The prompt for the next answer, with as many of the last turns as `fits`, and how many were left out."""
    for left_out in range(len(self.turns) + 1):
      text = prompt(query, self.turns[left_out:], self.system)
      if fits(text):
        break
    return text, left_out
