"""The table of drops and their cost by policy and data set: counts from the files, and a cost that is known."""

import csv
import json

import numpy as np
from pyarrow import parquet
import pytest

from openmoe_jax.analysis.figures import drop_table, selection
from openmoe_jax.analysis.figures.report import Report
from openmoe_jax.config import ConfigError
from tests import synthetic_recording

POLICIES = ('none', 't5x_train', 'colossalai_train')


def counted(folder, policy, domain):
  """Choices and dropped choices of the last step's files."""
  files = sorted((folder / f'step=100/policy={policy}/domain={domain}').glob('*.parquet'))
  tables = [parquet.read_table(file) for file in files]
  kept = np.concatenate([table[f'kept_{rank}'].to_numpy(zero_copy_only=False) for table in tables for rank in (0, 1)])
  return len(kept), int((~kept).sum())


@pytest.fixture(scope='module')
def recording(tmp_path_factory):
  folder = tmp_path_factory.mktemp('recording')
  synthetic_recording.write(folder, names=POLICIES)
  return folder


def test_counts_and_costs(recording, tmp_path):
  chosen = selection.Selection(recording)
  found = drop_table.lines(chosen)
  assert len(found) == 3 * 3  # two domains, and both together
  for domain in chosen.all_domains:
    assert found['none', domain].dropped == 0 and found['none', domain].cost is None
    for policy in POLICIES[1:]:
      line = found[policy, domain]
      assert (line.choices, line.dropped) == counted(recording, policy, domain) and line.dropped
      # A dropped choice costs 0.2 nats of the synthetic model; log-probabilities are float32 of a size of 4.
      tokens = line.choices / (chosen.choices * len(chosen.layers))
      assert line.cost.value == pytest.approx(.2 * line.dropped / tokens, abs=1e-6)
      assert line.cost.low < line.cost.value < line.cost.high
      assert line.along.mean.value == pytest.approx(line.dropped / line.choices, rel=1e-12)
  # Experts fill up along a sequence that is a group.
  assert found['colossalai_train', None].along.slope.low > 0
  report = Report(tmp_path, {})
  drop_table.add(report, chosen)
  report.finish([])
  headline, = (f for f in json.loads((tmp_path / 'findings.json').read_text())['findings'] if f['headline'])
  total = sum(counted(recording, 'none', domain)[0] for domain in chosen.all_domains)
  assert headline['statement'].startswith(f'The dropless router (policy none) drops 0 of {total:,} choices; against it')
  dearest = max((found[policy, domain].cost.value, policy, domain) for policy in POLICIES[1:]
                for domain in chosen.all_domains)
  assert headline['statement'].endswith('to {0:+.4f} on {2} under {1}).'.format(*dearest))
  assert (headline['value'], headline['low'], headline['high']) == (0, 0, 0)
  rows = list(csv.DictReader((tmp_path / 'figures' / 'drops_by_domain.csv').open()))
  assert [(row['policy'], row['domain']) for row in rows[:4]] == [
      ('none', 'all'), ('none', 'demo_code_full_lm'), ('none', 'demo_prose_full_lm'), ('t5x_train', 'all')]
  cost = found['t5x_train', None].cost
  assert [float(rows[3][name]) for name in ('cost', 'cost_low', 'cost_high')] == pytest.approx(list(cost), rel=1e-5)


def test_it_needs_the_dropless_router(recording, tmp_path):
  chosen = selection.Selection(recording, selection.Wanted(policies=['t5x_train']))
  with pytest.raises(ConfigError, match='lacks the policy none, or others to compare it with'):
    drop_table.add(Report(tmp_path, {}), chosen)
