"""The released chat model's template, letter by letter, and conversations that outgrow the window."""

from openmoe_jax import chat

BEGINNING = '<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n'


def test_prompts():
  assert chat.prompt('Hi?') == BEGINNING + '<s>[INST] Hi? [/INST]'
  assert chat.prompt('And?', [('Hi?', 'Yes.')]) == (
      BEGINNING + '<s>[INST] Hi? [/INST] Yes. </s><s>[INST] And? [/INST]')
  assert chat.prompt('x', system='Be brief.').startswith('<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>')


def test_an_answer_ends_at_its_stop():
  assert chat.answer(' Yes. </s><s>[INST] more') == 'Yes.'
  assert chat.answer(' no end ') == 'no end'


def test_the_oldest_turns_are_left_out_first():
  conversation = chat.Conversation()
  conversation.turns += [('one', '1'), ('two', '2'), ('three', '3')]
  whole = chat.prompt('four', conversation.turns)
  assert conversation.prompt('four') == (whole, 0)
  shorter = chat.prompt('four', conversation.turns[1:])
  assert conversation.prompt('four', lambda text: len(text) <= len(shorter)) == (shorter, 1)
  # Where nothing fits, the question alone is what the caller has to refuse.
  assert conversation.prompt('four', lambda text: False) == (chat.prompt('four'), 3)
