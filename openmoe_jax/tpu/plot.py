"""A compile report as a picture: stacked bars of a device's memory, and of the step's time by unit and by part."""

from typing import Any, Mapping

from openmoe_jax.analysis.plots import styled_pyplot, write_figure
from openmoe_jax.tpu.parts import UNITS
from openmoe_jax.tpu_slices import GIB


def write(report: Mapping[str, Any], file: str) -> None:
  """Draws the programs of a report that fit into a file, PNG if its name does not end otherwise."""
  pyplot = styled_pyplot()
  programs = [report[name] for name in ('train', 'decode') if report.get(name, {}).get('fits')]
  figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5))
  gibibytes = lambda p: {name: size / GIB for name, size in p['memory'].items()}
  milliseconds = lambda p: {name: 1e3 * seconds for name, seconds in p['roofline']['terms'].items()}
  spent = lambda p: {part['name']: 1e3 * sum(part[unit] for unit in UNITS) for part in p['parts']}
  for axis, title, parts_of in ((axes[0], 'memory of a device, GiB', gibibytes),
                                (axes[1], 'time of a step at least, ms', milliseconds),
                                (axes[2], 'the same by part of the model', spent)):
    names = list(dict.fromkeys(name for program in programs for name in parts_of(program)))
    bottom = [0.] * len(programs)
    for name in names:
      heights = [parts_of(program).get(name, 0.) for program in programs]
      axis.bar(range(len(programs)), heights, .6, bottom, label=name)
      bottom = [b + h for b, h in zip(bottom, heights)]
    axis.set_xticks(range(len(programs)), [program['program'] for program in programs])
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7)
  axes[0].axhline(report['hbm_bytes_per_device'] / GIB, color='black', linewidth=1, linestyle='--')
  figure.suptitle(f'{report["topology"]}, mesh ' + ' x '.join(map(str, report['mesh'].values())), fontsize=11)
  figure.tight_layout()
  write_figure(figure, file)
