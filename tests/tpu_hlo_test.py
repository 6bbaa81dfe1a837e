"""Reading compiled programs: counts by hand of small programs, and of what XLA for CPU compiles."""

import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import tpu_slices
from openmoe_jax.tpu import collectives, hlo, operations

LOOP = textwrap.dedent('''
    HloModule jit_step, is_scheduled=true

    %fused (param_0: f32[10,8,4], param_1: s32[]) -> f32[8,4] {
      %param_0 = f32[10,8,4]{2,1,0:T(8,128)} parameter(0)
      %param_1 = s32[]{:T(128)} parameter(1)
      %zero = s32[]{:T(128)} constant(0)
      %slice = f32[1,8,4]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,4}
      ROOT %out = f32[8,4]{1,0:T(8,128)} bitcast(%slice)
    }

    %body (arg: (s32[], f32[8,16], f32[10,8,4])) -> (s32[], f32[8,16], f32[10,8,4]) {
      %arg = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[10,8,4]{2,1,0}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
      %x = f32[8,16]{1,0} get-tuple-element(%arg), index=1
      %stack = f32[10,8,4]{2,1,0} get-tuple-element(%arg), index=2
      %w = f32[8,4]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%fused
      %near = f32[8,4]{1,0:T(8,128)S(1)} copy(%w)
      %dot = f32[4,16]{1,0} dot(%near, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}
      %sum = f32[4,16]{1,0} all-reduce(%dot), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
      %one = s32[] constant(1)
      %next = s32[]{:T(128)} add(%i, %one)
      ROOT %result = (s32[], f32[8,16]{1,0}, f32[10,8,4]{2,1,0}) tuple(%next, %x, %stack)
    }

    %condition (arg.1: (s32[], f32[8,16], f32[10,8,4])) -> pred[] {
      %arg.1 = (s32[], f32[8,16]{1,0}, f32[10,8,4]{2,1,0}) parameter(0)
      %i.1 = s32[] get-tuple-element(%arg.1), index=0
      %ten = s32[] constant(10)
      ROOT %less = pred[] compare(%i.1, %ten), direction=LT
    }

    ENTRY %main (p: f32[8,16], q: f32[10,8,4]) -> f32[8,16] {
      %p = f32[8,16]{1,0} parameter(0), metadata={op_name="x, {of} (it)"}
      %q = f32[10,8,4]{2,1,0} parameter(1)
      %none = s32[] constant(0)
      %start = (s32[], f32[8,16]{1,0}, f32[10,8,4]{2,1,0}) tuple(%none, %p, %q)
      %loop = (s32[], f32[8,16]{1,0}, f32[10,8,4]{2,1,0}) while(%start), condition=%condition, body=%body
      ROOT %end = f32[8,16]{1,0} get-tuple-element(%loop), index=1
    }
''')


def test_loops_are_counted_as_often_as_they_run():
  module = hlo.parse(LOOP)
  assert module.entry == 'main'
  times = {i.name: n for _, i, n in module.executed(fused=True)}
  assert times['dot'] == times['slice'] == 10 and times['loop'] == 1
  done = operations.work(module)
  assert done.flops == 10 * 2 * 4 * 16 * 8
  # Each time: three numbers to count up; the fusion reads an index, and reads and writes a slice of 8 x 4; the copy reads it, and writes to fast memory; the product reads x
  # and writes 4 x 16; the all-reduce reads and writes that.
  assert done.bytes == 10 * 4 * (1 + 3 + 8 * 4 * 3 + (8 * 16 + 4 * 16) + 2 * 4 * 16)


def test_the_compilers_count_of_a_loop_comes_first():
  text = LOOP.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert operations.work(hlo.parse(text)).flops == 7 * 2 * 4 * 16 * 8


def test_kernels_describe_themselves_over_several_lines():
  """As Pallas' splash attention does: the loop around it goes on behind it."""
  kernel = ('%kernel = f32[8,4]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes='
            '{kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="jit(f)/splash"}\n  %near')
  module = hlo.parse(LOOP.replace('%near', kernel, 1))
  assert module.by_name['body']['kernel'].source == 'jit(f)/splash'
  assert operations.matrix_flops(module, 'body', module.by_name['body']['dot']) == 2 * 4 * 16 * 8
  assert {i.name: n for _, i, n in module.executed()}['dot'] == 10 and not module.unknown_loops


def test_loops_of_unknown_length_are_named():
  module = hlo.parse(LOOP.replace('%ten = s32[] constant(10)', '%ten = s32[] get-tuple-element(%arg.1), index=0'))
  assert module.unknown_loops == ('loop',)
  assert operations.work(module).flops == 2 * 4 * 16 * 8


@pytest.mark.parametrize('old, new, trips', (
    ('constant(10)', 'constant(9)', 9), ('direction=LT', 'direction=LE', 11), ('%none = s32[] constant(0)', '%none = s32[] constant(4)', 6),
    # Unrolled once: two steps in one run of the body, nine of which are four and a half.
    ('add(%i, %one)\n', 'add(%i, %one)\n  %after = s32[] add(%one, %next)\n', 5)))
def test_counters_steps_and_bounds(old, new, trips):
  text = LOOP.replace(old, new)
  if '%after' in text:
    text = text.replace('tuple(%next,', 'tuple(%after,')
  module = hlo.parse(text)
  assert module.trips(module.by_name['main']['loop']) == trips


def test_parts_of_an_instruction():
  line = ('  ROOT %all-gather-start.3 = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x.1),'
          ' channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(f)/a, b={c}"}')
  got = hlo.parse_instruction(line)
  assert (got.name, got.opcode, got.operands, got.root) == ('all-gather-start.3', 'all-gather-start', ('x.1',), True)
  assert got.arrays == (hlo.Array('bf16', (4, 8), 0), hlo.Array('bf16', (16, 8), 1))
  assert got.attribute('replica_groups') == '{{0,1,2,3},{4,5,6,7}}'
  assert got.source == 'jit(f)/a, b={c}'
  assert got.bytes == 2 * (32 + 128)


@pytest.mark.parametrize('function, shapes, flops', (
    (lambda a, b: a @ b, ((3, 4), (4, 5)), 2 * 3 * 4 * 5),
    (lambda a, b: jnp.einsum('bij,bjk->bik', a, b), ((2, 3, 4), (2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    (lambda a, b: jax.lax.scan(lambda x, w: (x @ w, None), a, b)[0], ((3, 4), (6, 4, 4)), 6 * 2 * 3 * 4 * 4),
    (lambda a, b: jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ b), a), ((3, 4), (4, 4)), 5 * 2 * 3 * 4 * 4)))
def test_flops_of_compiled_programs(function, shapes, flops):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  text = jax.jit(function).lower(*arguments).compile().as_text()
  assert operations.work(hlo.parse(text)).flops == flops


@pytest.mark.parametrize('text, left, right, out, flops', (
    ('window={size=1}, dim_labels=b0f_0io->b0f', (2, 5, 3), (1, 3, 7), (2, 5, 7), 2 * 2 * 5 * 3 * 7),
    # Three taps with padding 1: the first and last of 5 positions meet two inputs, the others three.
    ('window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f', (1, 5, 1), (3, 1, 1), (1, 5, 1), 2 * 13),
    # A batch of 4 products as one convolution: each output position meets one element of the kernel.
    ('window={size=4 stride=3 pad=3_3 lhs_dilate=4}, dim_labels=0bf_0io->0bf', (4, 6, 8), (4, 8, 9), (4, 6, 9), 2 * 4 * 6 * 8 * 9),
    ('dim_labels=bf_io->bf', (6, 8), (8, 9), (6, 9), 2 * 6 * 8 * 9)))
def test_flops_of_convolutions(text, left, right, out, flops):
  instruction = hlo.parse_instruction(f'  %c = f32[{",".join(map(str, out))}] convolution(%a, %b), {text}')
  assert operations._convolution(left, right, out, instruction) == flops


def test_convolutions_against_direct_counting():
  """Random windows: pairs of an output and a kernel position that meet an input, one after the other."""
  rng = np.random.RandomState(0)
  for _ in range(50):
    size, kernel, stride, low, high, dilation, kernel_dilation = rng.randint(1, 6, 7)
    dilated = (size - 1) * dilation + 1
    positions = dilated + low + high - ((kernel - 1) * kernel_dilation + 1)
    if positions < 0:
      continue
    out = positions // stride + 1
    inputs = {low + i * dilation for i in range(size)}
    want = sum((o * stride + k * kernel_dilation) in inputs for o in range(out) for k in range(kernel))
    assert operations._valid_pairs(size, kernel, out, stride, low, dilation, kernel_dilation) == want


def test_a_fusion_that_writes_in_place():
  """Only the row that is written counts, read from the update and written to the array."""
  text = '''
%fused (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%a, %b, %i, %z)
}

ENTRY %main (p: f32[100,8], q: f32[1,8], n: s32[]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = f32[100,8]{1,0} fusion(%p, %q, %n), kind=kLoop, calls=%fused
}
'''
  assert operations.work(hlo.parse(text)).bytes == 2 * 8 * 4 + 4


# Collectives.


def devices_of(slice_):
  """Fake devices in the order x, then y, then z; cores of a chip side by side."""
  shape = slice_.shape
  places = [tuple(p) for p in np.ndindex(*shape)]
  return [types.SimpleNamespace(coords=p, core_on_chip=core, slice_index=s) for s in range(slice_.slices) for p in places
          for core in range(slice_.chip.devices)]


def found(line, name, mesh_shape, kind_shape='f32[1024]'):
  """The only collective of a program with this instruction."""
  text = f'ENTRY %main (x: {kind_shape}) -> f32[] {{\n  %x = {kind_shape} parameter(0)\n  {line}\n}}\n'
  slice_ = tpu_slices.parse(name)
  (one,) = collectives.collectives(hlo.parse(text), mesh_shape, devices_of(slice_), slice_)
  return one


RING = {'data': 4, 'expert': 4, 'model': 4}  # of v4-128, 4x4x4, rings of 50 GB/s each way


@pytest.mark.parametrize('line, kind, axes, sent, seconds', (
    # 4 KiB each; a ring of 4 receives 3 parts over two links.
    ('%y = f32[4096] all-gather(%x), replica_groups=[16,4]<=[64], dimensions={0}', 'all-gather', 'model', 3 * 4096, 3 * 4096 / 100e9),
    ('%y = f32[1024] all-reduce(%x), replica_groups=[16,4]<=[16,4]T(0,1), to_apply=%add', 'all-reduce', 'model', 2 * 3072, 6144 / 100e9),
    ('%y = f32[64] reduce-scatter(%x), replica_groups=[4,16]<=[4,16], to_apply=%add', 'reduce-scatter', 'expert+model',
     4096 * 15 / 16, 3840 / 200e9),
    ('%y = f32[1024] all-reduce(%x), replica_groups=[16,4]<=[4,16]T(1,0), to_apply=%add', 'all-reduce', 'data', 6144, 6144 / 100e9),
    # The busiest link of a ring of 4 carries half of what one device sends.
    ('%y = f32[1024] all-to-all(%x), replica_groups=[16,4]<=[64], dimensions={0}', 'all-to-all', 'model', 3072, 3072 / 2 / 50e9),
    # To the neighbour, and around the ring to the other neighbour.
    ('%y = f32[1024] collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', 'collective-permute', 'model', 4096,
     4096 / 50e9),
    ('%y = f32[1024] all-reduce(%x), replica_groups={}, to_apply=%add', 'all-reduce', 'data+expert+model', 8192 * 63 / 64,
     8192 * 63 / 64 / 300e9)))
def test_collectives(line, kind, axes, sent, seconds):
  got = found(line, 'v4-128', RING)
  assert (got.kind, got.axes, got.network) == (kind, axes, 'ici')
  np.testing.assert_allclose((got.bytes, got.seconds), (sent, seconds), rtol=1e-12)


@pytest.mark.parametrize('text, groups', (
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=1,'c'=4] {'a','c'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]])))
def test_groups(text, groups):
  line = f'  %y = f32[8] all-reduce(%x), channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add'
  assert collectives._groups(hlo.parse_instruction(line), 8) == groups


def test_what_is_computed_meanwhile_hides_a_collective():
  """Two under way share the product between; what comes before the start or behind the done hides nothing."""
  product = lambda name: f'  %{name} = f32[512,512] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}'
  start = lambda name, kind, more: f'  %{name} = (f32[512,512], f32[512,512]) {kind}-start(%x), replica_groups=[16,4]<=[64]{more}'
  done = lambda name, of, kind: f'  %{name} = f32[512,512] {kind}-done(%{of})'
  lines = [product('p'), start('a', 'all-to-all', ', dimensions={0}'), product('q'), start('b', 'all-reduce', ', to_apply=%add'),
           product('r'), done('c', 'a', 'all-to-all'), done('d', 'b', 'all-reduce'), product('s')]
  text = 'ENTRY %main (x: f32[512,512]) -> f32[] {\n  %x = f32[512,512] parameter(0)\n' + '\n'.join(lines) + '\n}\n'
  slice_ = tpu_slices.parse('v4-128')
  hidden = {c.kind: c.hidden for c in collectives.collectives(hlo.parse(text), RING, devices_of(slice_), slice_)}
  one = 2 * 512 ** 3 / 275e12
  assert hidden == {'all-to-all': pytest.approx(1.5 * one), 'all-reduce': pytest.approx(.5 * one)}


def test_lines_have_half_the_links():
  """8 of 16 chips of a v5e row: no ring; one way of 50 GB/s."""
  got = found('%y = f32[8192] all-gather(%x), replica_groups=[8,8]<=[64], dimensions={0}', 'v5e-64', {'data': 8, 'expert': 8, 'model': 1})
  np.testing.assert_allclose(got.seconds, 7 * 4096 / 50e9)


def test_cores_of_a_chip_share_its_links():
  """Both cores in a group: the chip's whole links are theirs. Groups of one core a chip: half of them."""
  both = found('%y = f32[16384] all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}', 'v3-8', {'data': 8})
  assert both.seconds == pytest.approx(7 * 4096 / (2 * 82e9))
  single = found('%y = f32[4096] all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}', 'v3-8', {'data': 4, 'model': 2})
  assert single.seconds == pytest.approx(3 * 4096 / (2 * 41e9))
  inside = found('%y = f32[2048] all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}', 'v3-8', {'data': 4, 'model': 2})
  assert inside.seconds == 0 and inside.axes == 'model'


def test_between_slices():
  """Two v5e slices of 4 chips: half of what a device sends in an all-reduce of 2 crosses, over its share of the network."""
  got = found('%y = f32[1024] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add', '2*v5e-4', {'data': 2, 'expert': 4})
  assert (got.network, got.axes) == ('dcn', 'data')
  np.testing.assert_allclose((got.bytes, got.seconds), (4096, 4096 / (25e9 / 8)))


def test_an_all_reduce_of_which_a_slice_is_kept():
  text = '''
%all-reduce-scatter (a: f32[64,8]) -> f32[16,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %sum = f32[64,8]{1,0} all-reduce(%a), replica_groups=[16,4]<=[64], to_apply=%add
  %i = s32[] constant(0)
  ROOT %mine = f32[16,8]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0} parameter(0)
  ROOT %y = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
'''
  slice_ = tpu_slices.parse('v4-128')
  (got,) = collectives.collectives(hlo.parse(text), RING, devices_of(slice_), slice_)
  assert (got.kind, got.bytes) == ('reduce-scatter', 64 * 8 * 4 * 3 / 4)


def test_compiled_for_fake_devices():
  """What XLA inserts for a sum over 8 fake devices is found, with its axes."""
  mesh = jax.make_mesh((4, 2), ('data', 'expert'), devices=jax.devices()[:8])
  from jax.sharding import NamedSharding, PartitionSpec
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(('data', 'expert'))))
  text = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile().as_text()
  slice_ = tpu_slices.parse('v5e-8')
  got = collectives.collectives(hlo.parse(text), dict(mesh.shape), devices_of(slice_), slice_)
  assert [(c.kind, c.axes, c.bytes) for c in got] == [('all-reduce', 'data+expert', 2 * 64 * 7 / 8)]
