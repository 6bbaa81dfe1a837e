"""Domains: the standard library by package, other programming languages, and manual pages in other languages."""

import gzip

import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import mixtures, vocabulary
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tasks import domains, standard_library

PAGE = r'''.\" a comment
.TH CAT 1 "2020"
.SH BEZEICHNUNG
cat \- Dateien \fBverketten\fP
.TP
\fB\-n\fR, \-\-number
.BR \-E " und " \-\-ends
Zeilen\e
'''


def test_the_words_of_a_manual_page():
  assert domains.manual_text(PAGE) == 'BEZEICHNUNG\ncat - Dateien verketten\n\n-n, --number\n-E " und " --ends\nZeilen\\\n'


def test_packages_of_the_standard_library():
  whole = domains.module_documents('email', 'all')
  assert all(document.file.startswith('email/') for document in whole) and len(whole) > 10
  parts = [set(domains.module_documents('email', split)) for split in standard_library.SPLITS]
  assert parts[0] | parts[1] == set(whole) and not parts[0] & parts[1]


SOURCE = '''"""First.

>>> f(1)
2
>>> f(
...   2)
3

Last.
"""
# why
class A:
  def f(self):  # how
    return 1  # not at the beginning
'''


def test_parts_of_a_source():
  got = {name: part(SOURCE) for name, part in domains.PARTS.items()}
  assert got == {'comments': 'why', 'sessions': '>>> f(1)\n2\n>>> f(\n...   2)\n3', 'headings': 'class A:',
                 'docstrings': 'First.\n\n>>> f(1)\n2\n>>> f(\n...   2)\n3\n\nLast.'}
  assert len(domains.part_documents('sessions', 'all')) < len(domains.part_documents('docstrings', 'all'))


def test_what_a_machine_has(tmp_path, monkeypatch):
  folder = tmp_path / 'pl' / 'man1'
  folder.mkdir(parents=True)
  with gzip.open(folder / 'cat.1.gz', 'wt', encoding='utf-8') as stream:
    stream.write(PAGE)
  (folder / 'dog.1.gz').write_bytes(b'no gzip')
  monkeypatch.setattr(domains, '_MANUAL_FOLDER', str(tmp_path))
  domains.manual_documents.cache_clear()
  assert [document.file for document in domains.manual_documents('pl')] == ['pl/man1/cat.1.gz']
  assert domains.available('manual_') == []
  monkeypatch.setattr(domains, '_LEAST_CHARACTERS', 10)
  assert domains.available('manual_') == ['manual_pl']
  with pytest.raises(ConfigError, match="manual_de: this machine has no such text in the split 'all'; it has manual_pl"):
    domains.DomainSource('manual_de').get_dataset()
  domains.manual_documents.cache_clear()


def test_a_domain_as_batches():
  data = DataConfig(task_feature_lengths={'targets': 64}, batch_size=4, eval_split='all', eval_batches=1)
  batch = next(data_lib.eval_batches(data, 'module_email_full_lm'))
  text = vocabulary.decode(batch['decoder_target_tokens'][0])
  assert any(text[:60].strip() in document.text for document in domains.module_documents('email', 'all'))
  with pytest.raises(ConfigError, match="module_email_full_lm has no split 'test'"):
    mixtures.provider_for(data, 'module_email_full_lm', 'test')
